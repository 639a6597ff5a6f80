"""What a report measures, one thing after the other, so that nothing runs beside what is timed.

Rates are over steps after a warm-up, of the slowest rank, in source images of all ranks. inscon/report/page.py names the figures.
"""

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from inscon import distributed, guard, train
from inscon.batch import Batch
from inscon.clock import BACKWARD, REST, WAIT, WIRE, StepClock, listen, part
from inscon.config import Config
from inscon.graph import WARM_UP
from inscon.methods.method import resolve
from inscon.report import verdict
from inscon.report.device import Traffic, read_trace, summary
from inscon.report.flops import measure_copy_rate, measure_matrix_rate, step_flops, wait_for
from inscon.train import Training, run_step, take_step
from pipelines import auto, open_pipeline
from pipelines.feed import Feed
from pipelines.prefetch import Pipeline

PACKAGES = ("numpy", "numba", "torch", "torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "ffcv")
"""Whose versions a figure depends on."""
KEPT, TRACED = 4, 3  # Batches of the loader that cached ones repeat; steps of a trace.


def run_steps(
    training: Training, batches: Iterable[Batch], steps: int, warm_up: int, begin: Callable[[], object] = int,
    eager: bool = False,
) -> dict:  # fmt: skip
    """The trainer's own loop over `batches`, timed; `begin` is called when the warm-up is over. `eager`: no step is a graph."""
    coming = iter(batches)
    training.method.train()

    def step(batch: Batch) -> None:
        if eager:
            training.losses.add(run_step(training, batch))
        else:
            take_step(training, batch, 10**6)  # of an epoch that doesn't end
        distributed.any_rank(False)  # as the trainer asks whether to stop

    for _ in range(warm_up):
        step(next(coming))
    begin()
    start, cpu, clock = _together(training.device), time.process_time(), StepClock(training.device)
    with listen(clock.at):
        for _ in range(steps):
            with part(WAIT):
                batch = next(coming)
            step(batch)
            del batch
            clock.lap()
    wait_for(training.device)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    found = step_figures(clock.read(), wall, cpu, training.config.optim.batch_size)
    return {"steps": steps, "warm_up": warm_up} | found


def _together(device: torch.device) -> float:
    """The moment from which all ranks measure."""
    wait_for(device)
    distributed.any_rank(False)
    return time.perf_counter()


def step_figures(times: Sequence[dict[str, float]], wall: float, cpu: float, batch_size: int) -> dict:
    """Of steps that took so long by part, and `wall` seconds all together by a clock of its own."""
    steps, step_ms = len(times), [1e3 * sum(parts.values()) for parts in times]
    seen = dict.fromkeys([*(name for parts in times for name in parts), WIRE])
    names = [WAIT, *(name for name in seen if name not in (WAIT, REST)), REST]
    means = [1e3 * sum(parts.get(name, 0.0) for parts in times) / steps for name in names]
    of_ranks = distributed.gather(torch.tensor([means], dtype=torch.float64))
    worst = distributed.worst({"wall": wall, "cpu": cpu / wall})
    # Of the rank that waited least for others: whom they wait for tells why a step takes as long as it does.
    parts_ms = of_ranks[of_ranks[:, names.index(WIRE)].argmin()].tolist()
    return {
        "images_per_s": batch_size * steps / worst["wall"], "step_ms": statistics.median(step_ms),
        "step_ms_p99": sorted(step_ms)[round(0.99 * (steps - 1))], "parts_ms": dict(zip(names, parts_ms)),
        "wall_ms": 1e3 * wall / steps, "cpu_cores": worst["cpu"],
    }  # fmt: skip


def divided(parts_ms: dict[str, float], eager_ms: dict[str, float]) -> dict[str, float]:
    """The parts of a step that is a graph, in which no clock sees any: all but waiting for data as an eager step is divided."""
    share = (sum(parts_ms.values()) - parts_ms[WAIT]) / (sum(eager_ms.values()) - eager_ms[WAIT])
    return {name: share * ms for name, ms in eager_ms.items()} | {WAIT: parts_ms[WAIT]}


def machine() -> dict[str, str | int]:
    """The hardware that a figure was measured on: CPU, cores this process may use, system, GPU if there is one."""
    model = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "system": platform.system()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    """Python's, and those of the installed ones of PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class Measurement:
    """All that goes to report.json. `config`: not resolved; `feed_of`: the work of this rank, for a resolved one; `out`: folder of
    traces."""

    def __init__(self, config: Config, feed_of: Callable[[Config], Feed], device, out: Path, steps: int, warm_up: int):
        # A folder that does not exist: nothing is continued, nothing is written.
        self.config = resolve(config.replaced(run_dir=out / "no-run"), distributed.world_size())
        self.feed, self.device, self.out, self.steps, self.warm_up = feed_of(self.config), device, out, steps, warm_up
        self._feed_of, self.training = feed_of, train.set_up(self.config, device, self.feed.index.fingerprint)
        if self.training.graph:
            self.warm_up = max(warm_up, WARM_UP + 1)  # with the capture
        self._color = config.loader.color

    def report(self) -> dict:
        """What is measured, and the verdict."""
        on_gpu, dtype = self.device.type == "cuda", self.training.precision.pixel_dtype
        matrix_rate = measure_matrix_rate(self.device, dtype)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)  # the matrices are not the run's
        model = self.synthetic()
        of_rank, where = model["images_per_s"] / distributed.world_size(), {"device": self.device, "dtype": dtype}
        self._color = auto.placed(self.feed, self.config.loader, of_rank, start_step=0, **where)  # as a training does
        loader = {} if self.config.loader.pipeline == "synthetic" else self.loader()
        with self.open(self.config, 0, self.warm_up + self.steps) as pipeline:
            end_to_end = run_steps(self.training, pipeline, self.steps, self.warm_up, pipeline.read)
            said, name = distributed.worst(pipeline.read()), "DATA" if loader else "noise"
        memory = {"host memory at its peak, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if on_gpu:
            memory["PyTorch's device memory at its peak, MB"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        graphed = BACKWARD not in end_to_end["parts_ms"]
        if graphed:
            end_to_end["parts_ms"] = divided(end_to_end["parts_ms"], self.synthetic(eager=True)["parts_ms"])
        rates = loader.get("images_per_s"), model["images_per_s"], end_to_end["images_per_s"]
        found = self.basis() | {
            "ceilings": dict(zip(verdict.CEILINGS, rates)),
            "shares": {name: 100 * ms / end_to_end["wall_ms"] for name, ms in end_to_end["parts_ms"].items()},
            "end_to_end": end_to_end, "loader": loader | said, "memory": memory,
            "described": pipeline.description.replace(str(self.feed.index.path), name),
            "graphed": graphed, "copy_bytes_per_s": measure_copy_rate(self.device),
            "device": self.on_device(end_to_end, bool(loader)) if on_gpu else None,
            # What the device can do, not what others left of it.
            "matrix_flops_per_s": max(matrix_rate, measure_matrix_rate(self.device, dtype)),
        }  # fmt: skip
        return found | verdict.conclusions(found)

    def basis(self) -> dict:
        """What is measured, and on what."""
        flops, settings, on = step_flops(self.config), self.config.to_dict(), machine()
        settings["loader"].pop("data"), settings["run"].pop("run_dir")  # paths of this machine
        return {
            "report_version": verdict.VERSION, "date": datetime.date.today().isoformat(), "machine": on, "versions": versions(),
            "ranks": distributed.world_size(), "cores_of_rank": on["cores"] / int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "precision": self.training.precision.name, "settings": settings, "flops_per_image": flops.per_image,
            "trainings": flops.trainings, "steps_per_epoch": self.feed.steps_per_epoch,
        }  # fmt: skip

    def open(self, config: Config, first: int, steps: int) -> Pipeline:
        """Batches of steps first .. first + steps - 1."""
        dtype, loader = self.training.precision.pixel_dtype, config.replaced(color=self._color).loader
        where = {"device": self.device, "dtype": dtype}
        return open_pipeline(self._feed_of(config), loader, **where, start_step=first, total_steps=first + steps)

    def synthetic(self, eager: bool = False) -> dict:
        """Training on noise that is there already."""
        with self.open(self.config.replaced(pipeline="synthetic"), 0, self.warm_up + self.steps) as batches:
            return run_steps(self.training, batches, self.steps, self.warm_up, eager=eager)

    def on_device(self, end_to_end: dict, fed: bool) -> dict:
        """Of eager steps: the `bytes` that one moves, and `step`, on noise, as `inscon.report.device.summary` tells. Where a loader
        feeds them: `fed_kernel_ms`, of its kernels and theirs, and `taken_ms`, by which it makes a step of the run longer."""
        with self.open(self.config.replaced(pipeline="synthetic"), 0, 2 + TRACED) as batches:
            kept = list(batches)
        with Traffic() as traffic:
            run_step(self.training, kept[0])
        found = {"bytes": traffic.moved, "step": self.traced(kept)}
        if not fed:
            return found
        with self.open(self.config, 0, KEPT) as pipeline:
            kept = [batch.each(torch.clone) for batch in pipeline]
        cached = run_steps(self.training, itertools.cycle(kept), self.steps, self.warm_up)
        fed_ms, cached_ms = (run["wall_ms"] - run["parts_ms"][WAIT] for run in (end_to_end, cached))
        found["taken_ms"] = max(fed_ms - cached_ms, 0.0)
        # More than were made before the trace begins, so that the loader is at work in it.
        with self.open(self.config, 0, 2 + TRACED + self.config.loader.prefetch + 2) as pipeline:
            return found | {"fed_kernel_ms": self.traced(pipeline)["kernel_ms"]}

    def traced(self, batches: Iterable[Batch]) -> dict:
        """What host and device do in eager steps, two for warm-up left out."""
        coming, cuda = iter(batches), torch.profiler.ProfilerActivity.CUDA
        profiler = torch.profiler.profile(activities=[cuda], acc_events=True)
        for batch in itertools.islice(coming, 2):
            run_step(self.training, batch)
        with profiler:
            for batch in itertools.islice(coming, TRACED):
                wait_for(self.device)
                run_step(self.training, batch)
            wait_for(self.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            return summary(read_trace(path), TRACED)

    def loader(self) -> dict:
        """Take batches as fast as they come, across the end of an epoch."""
        first, begun = max(self.feed.steps_per_epoch - self.warm_up - self.steps // 2, 0), time.perf_counter()
        with self.open(self.config, first, self.warm_up + self.steps) as pipeline:
            for number, _ in enumerate(pipeline, 1):
                if number == 1:
                    first_batch_s = time.perf_counter() - begun
                if number == self.warm_up:
                    start = _together(self.device)
            wait_for(self.device)
            wall = distributed.worst({"wall": time.perf_counter() - start})["wall"]
        return {"images_per_s": self.config.optim.batch_size * self.steps / wall, "first_batch_s": first_batch_s}

    def trace(self, steps: int, warm_up: int = 2) -> None:
        """Of eager steps: OUT/trace-rankN.json, for chrome://tracing or Perfetto."""
        profiler = torch.profiler.profile(acc_events=True)
        with self.open(self.config, 0, warm_up + steps) as batches, listen(torch.profiler.record_function):
            for batch in itertools.islice(batches, warm_up):
                run_step(self.training, batch)
            with profiler:
                for batch in batches:
                    run_step(self.training, batch)
                wait_for(self.device)
        with guard.whole_file(self.out / f"trace-rank{distributed.rank()}.json") as file:
            profiler.export_chrome_trace(file.name)

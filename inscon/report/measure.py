"""What a report measures, one thing after the other, so that nothing runs beside what is timed.

Rates are over steps after a warm-up, of the slowest rank, in source images of all ranks. What is measured goes to report.json as
it is; inscon/report/page.py says in words what each figure is.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import os
import platform
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from data_prep.index import RAW
from inscon import distributed, guard, train
from inscon.batch import Batch
from inscon.clock import REST, WAIT, WIRE, Labels, StepClock, part
from inscon.config import Config
from inscon.meters import LossMeter
from inscon.methods.method import resolve
from inscon.report import verdict
from inscon.report.flops import measure_matrix_rate, step_flops
from inscon.report.run import percentile_99
from inscon.train import Training, take_step
from pipelines import open_pipeline
from pipelines.feed import Feed, color_on_host, threads_per_rank
from pipelines.finish import Finish
from pipelines.prefetch import Pipeline

READY_S = 1e-3
"""A batch that comes within this time was ready."""
CACHED = 4
"""Real batches that the model is measured on over and over."""
PICTURES = 128
"""Over so many are the loader's stages measured."""
REPEATS = 10
"""How often a copy, or a GPU's part of the loader, is repeated."""
PACKAGES = ("numpy", "numba", "torch", "torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "ffcv")
"""Whose versions a figure depends on."""


def run_steps(
    training: Training, batches: Iterable[Batch], steps: int, warm_up: int, begin: Callable[[], object] = int
) -> dict:
    """The trainer's own loop over `batches`, timed; `begin` is called when the warm-up is over."""
    losses = LossMeter()
    training.method.train()

    def step(batch: Batch) -> None:
        take_step(training, batch, 10**6, losses)  # of an epoch that doesn't end
        distributed.any_rank(False)  # as the trainer asks whether to stop

    times, wall, cpu = _timed_steps(step, batches, steps, warm_up, training.device, begin)
    return {"steps": steps, "warm_up": warm_up} | step_figures(times, wall, cpu, training.config.optim.batch_size)


def _timed_steps(
    step: Callable[[Batch], None], batches: Iterable[Batch], steps: int, warm_up: int, device: torch.device, begin: Callable
) -> tuple[list[dict[str, float]], float, float]:  # fmt: skip
    """Of steps behind the warm-up: the seconds of each by part; wall and processor time of all of them."""
    coming = iter(batches)
    with StepClock(device) as clock:
        for number in range(warm_up + steps):
            if number == warm_up:
                begin()
                _wait(device)
                distributed.any_rank(False)  # all ranks begin together
                start, cpu = time.perf_counter(), time.process_time()
                clock.restart()
            with part(WAIT):
                batch = next(coming)
            step(batch)
            del batch
            clock.lap()
        _wait(device)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        return clock.read(), wall, cpu


def step_figures(times: list[dict[str, float]], wall: float, cpu: float, batch_size: int) -> dict:
    """Of steps that took so long by part, and `wall` seconds all together by a clock of its own."""
    steps, step_ms = len(times), [1e3 * sum(parts.values()) for parts in times]
    seen = dict.fromkeys(name for parts in times for name in parts)
    names = [WAIT, *(name for name in seen if name not in (WAIT, REST)), REST]
    means = [1e3 * sum(parts.get(name, 0.0) for parts in times) / steps for name in names]
    of_ranks = distributed.gather(torch.tensor([means], dtype=torch.float64))
    waits = [parts.get(WAIT, 0.0) for parts in times]
    late = sum(wait > READY_S for wait in waits) / steps
    worst = distributed.worst({"wall": wall, "wait": sum(waits) / wall, "late": late, "cpu": cpu / wall})
    # Of the rank that waited least for others: whom they wait for tells why a step takes as long as it does.
    parts_ms = of_ranks[of_ranks[:, names.index(WIRE)].argmin()].tolist()
    return {
        "images_per_s": batch_size * steps / worst["wall"], "step_ms": statistics.median(step_ms),
        "step_ms_p99": percentile_99(step_ms), "parts_ms": dict(zip(names, parts_ms)), "wall_ms": 1e3 * wall / steps,
        "wait_percent": 100 * worst["wait"], "ready_percent": 100 * (1 - worst["late"]), "cpu_cores": worst["cpu"],
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_loader(
    open_at: Callable[[int, int], Pipeline], feed: Feed, steps: int, warm_up: int, device: torch.device
) -> tuple[dict, list[Batch]]:
    """Take batches as fast as they come, across the end of an epoch; then CACHED more, for whoever wants real ones at hand.

    `open_at(first, count)` opens the pipeline for steps first .. first + count - 1.
    """
    ids, weights, moments = [], [], [time.perf_counter()]
    first = max(feed.steps_per_epoch - warm_up - steps // 2, 0)

    def note(batch: Batch) -> None:
        # Not the batch: one that is kept takes its memory with it.
        ids.append(batch.sample_ids)
        weights.extend(overlap.weight for overlap in batch.overlaps.values())
        moments.append(time.perf_counter())

    with open_at(first, warm_up + steps + CACHED) as pipeline:
        coming = iter(pipeline)
        moments.append(time.perf_counter())
        times, wall, _ = _timed_steps(note, coming, steps, warm_up, device, pipeline.read)
        substituted = distributed.total({"n": pipeline.read().get("loader_substituted", 0.0)})["n"]
        cached = list(itertools.islice(coming, CACHED))
    took_ms, wall = [1e3 * parts[WAIT] for parts in times], distributed.worst({"wall": wall})["wall"]
    epochs = [(first + number) // feed.steps_per_epoch for number in range(warm_up + steps)]
    return {
        "batches": steps, "images_per_s": feed.batch_size * feed.world_size * steps / wall, "opened_s": moments[1] - moments[0],
        "first_batch_s": moments[2] - moments[1], "batch_ms": statistics.median(took_ms), "batch_ms_p99": percentile_99(took_ms),
        "substituted": int(substituted), **seams(took_ms, epochs[warm_up - 1 :]), **data_health(ids, weights, epochs),
    }, cached  # fmt: skip


def seams(took_ms: Sequence[float], epochs: Sequence[int]) -> dict:
    """How many epochs begin among batches that took so long, and how much longer those took than the others, median minus median;
    None without both kinds. `epochs` begins with that of the batch before them."""
    first = [took for took, before, own in zip(took_ms, epochs, epochs[1:]) if own != before]
    other = [took for took, before, own in zip(took_ms, epochs, epochs[1:]) if own == before]
    stall = statistics.median(first) - statistics.median(other) if first and other else None
    return {"seams": len(first), "seam_stall_ms": stall}


def data_health(ids: Sequence[Tensor], weights: Sequence[Tensor], epochs: Sequence[int]) -> dict:
    """Of batches of these epochs, with these sample ids: how many images of all ranks from how many epochs, how many of them were
    seen again within one, and what share of these weights of overlaps says that two views share enough; None without any."""
    seen: dict[int, list[int]] = {}
    for epoch, of_batch in zip(epochs, distributed.gather(torch.stack(list(ids), 1)).T.tolist(), strict=True):
        seen.setdefault(epoch, []).extend(of_batch)
    valid = (torch.cat(list(weights)) > 0).double().mean().item() if weights else 0.0
    return {
        "images": sum(map(len, seen.values())),
        "epochs": len(seen),
        "repeated": sum(len(of_epoch) - len(set(of_epoch)) for of_epoch in seen.values()),
        "overlap_percent": 100 * distributed.mean({"share": valid})["share"] if weights else None,
    }


def stages_alone(feed: Feed, host_color: bool, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds per source image of each of the loader's stages by itself, over the run's own pictures and plan.

    The host's are measured in one thread, one after the other; "views", its compiled kernel, is missing without numba; a GPU has
    "finish" on top. ShardError as a pipeline.
    """
    spent, render, steps = Counter(), _compiled_kernel(feed, host_color), max(PICTURES // feed.batch_size, 1)
    for step in range(steps):
        work = _timed(spent, "plan", feed.work, step)
        _, stored, _ = _timed(spent, "read", feed.load, step, None, True)
        raw = feed.index.records(work.sample_ids)["encoding"] == RAW
        for content, size, is_raw, rows in zip(stored, work.sizes, raw, work.rows(), strict=True):
            image = content.reshape(*size, 3) if is_raw else _timed(spent, "decode", simplejpeg.decode_jpeg, content)
            if render is not None:
                _timed(spent, "views", render, image, rows)
    found = {stage: 1e3 * seconds / (steps * feed.batch_size) for stage, seconds in spent.items()}
    if device.type == "cuda":
        finish, shapes = (
            Finish(feed, device, dtype, host_color),
            {s.name: (s.count, s.side, s.side, 3) for s in feed.views},
        )
        made = {n: torch.zeros(feed.batch_size, *s, dtype=torch.uint8).pin_memory() for n, s in shapes.items()}
        found["finish"] = 1e3 * _repeated(lambda: finish(work, made), device) / feed.batch_size
    return found


def _timed(spent: Counter, stage: str, call: Callable, *arguments):
    start = time.perf_counter()
    made = call(*arguments)
    spent[stage] += time.perf_counter() - start
    return made


def _compiled_kernel(feed: Feed, color: bool) -> Callable | None:
    """Of a picture and its rows of the plan: makes its views, compiled. None without numba."""
    try:
        from pipelines.kernels import render_view
    except ModuleNotFoundError:
        return None
    views = [np.empty((spec.side, spec.side, 3), np.uint8) for spec in feed.views for _ in range(spec.count)]

    def render(image, rows):
        for row, view in zip(rows, views, strict=True):
            render_view(image, row, view, color)

    render(np.zeros((*feed.work(0).sizes[0], 3), np.uint8), feed.work(0).rows()[0])  # compiles
    return render


def _repeated(call: Callable, device: torch.device) -> float:
    """Seconds of a call on a GPU that nobody waits for."""
    call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    _wait(device)
    return (time.perf_counter() - start) / REPEATS


def copy_rate(device: torch.device) -> float | None:
    """Bytes per second from page-locked memory to the GPU, measured now; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.numel() / _repeated(lambda: target.copy_(source, non_blocking=True), device)


def machine() -> dict[str, str | int]:
    """The hardware that a figure was measured on: CPU, cores this process may use, system, GPU if there is one."""
    model = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {"cpu": model, "cores": cores, "system": platform.system()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    """Python's, and those of the installed ones of PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class Measurement:
    """All that goes to report.json.

    Args:
        config: of the run, not resolved, so that other batch sizes can be tried.
        feed_of: the work of this rank, for a resolved configuration.
        out: folder of the report; traces go there.
    """

    def __init__(self, config: Config, feed_of: Callable[[Config], Feed], device, out: Path, steps: int, warm_up: int):
        # A folder that does not exist: nothing is continued, nothing is written.
        self._asked = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=out / "no-run"))
        self.config, self.feed_of = resolve(self._asked, distributed.world_size()), feed_of
        self.feed = feed_of(self.config)
        self.device, self.out, self.steps, self.warm_up = device, out, steps, warm_up
        self.training = self.set_up(self.config)
        self.dtype = self.training.precision.pixel_dtype

    def set_up(self, config: Config) -> Training:
        return train.set_up(config, self.device, self.feed.index.fingerprint)

    def report(self, engines: Sequence[str]) -> dict:
        """Everything of the first of `engines`, what the others deliver beside it, and the verdict."""
        on_gpu, matrix_rate = self.device.type == "cuda", measure_matrix_rate(self.device, self.dtype)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)  # the matrices are not the run's
        model, cached, of_engines = self.synthetic(self.training, self.config, self.steps, self.warm_up), None, {}
        for name in engines:
            of_engines[name], batches = self.engine(with_engine(self.config, name))
            if name == engines[0] and batches:
                cached = run_steps(self.training, itertools.cycle(batches), self.steps, self.warm_up)
            del batches
        memory = {
            "host_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "torch_peak_mb": torch.cuda.max_memory_allocated(self.device) / 2**20 if on_gpu else None,
        }
        loader, end_to_end = of_engines[engines[0]]["loader"], of_engines[engines[0]]["end_to_end"]
        of_ceilings = zip(verdict.CEILINGS, (loader, model, cached, end_to_end))
        found = self.basis() | {
            "memory": memory,
            "engines": of_engines,
            "ceilings": {name: figures and figures["images_per_s"] for name, figures in of_ceilings},
            "shares": {name: 100 * ms / end_to_end["wall_ms"] for name, ms in end_to_end["parts_ms"].items()},
            "scaling": self.scaling(),
            # What the device can do, not what others left of it.
            "matrix_flops_per_s": max(matrix_rate, measure_matrix_rate(self.device, self.dtype)),
            "copy_bytes_per_s": copy_rate(self.device),
        }
        return found | verdict.conclusions(found)

    def basis(self) -> dict:
        """What is measured, and on what."""
        config, flops, manifest = self.config, step_flops(self.config), getattr(self.feed.index, "manifest", None)
        settings, on = config.to_dict(), machine()
        settings["loader"].pop("data"), settings["run"].pop("run_dir")  # paths of this machine
        return {
            "report_version": verdict.VERSION, "date": datetime.date.today().isoformat(), "machine": on, "versions": versions(),
            "ranks": distributed.world_size(), "cores_of_rank": on["cores"] / int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "threads": threads_per_rank(config.loader.threads), "torch_threads": torch.get_num_threads(),
            "precision": self.training.precision.name, "optimizer": self.training.optimizer_name, "settings": settings,
            "flops_per_image": flops.per_image, "trainings": flops.trainings,
            "view_bytes": sum(3 * spec.side**2 * spec.count for spec in self.feed.views),
            "steps_per_epoch": self.feed.steps_per_epoch, "left_out": sum(manifest.rejected.values()) if manifest else 0,
        }  # fmt: skip

    def open(self, config: Config, first: int, steps: int) -> Pipeline:
        return open_pipeline(
            self.feed_of(config), config.loader, device=self.device, dtype=self.dtype, start_step=first,
            total_steps=first + steps,
        )  # fmt: skip

    def synthetic(self, training: Training, config: Config, steps: int, warm_up: int) -> dict:
        with self.open(with_engine(config, "synthetic"), 0, warm_up + steps) as batches:
            return run_steps(training, batches, steps, warm_up)

    def engine(self, config: Config) -> tuple[dict, list[Batch]]:
        """The loader alone, its stages, and training through it; and some batches of it."""
        feed, found, batches = self.feed_of(config), {"loader": None, "stages_alone_ms": {}}, []
        if config.loader.pipeline != "synthetic":
            opener = functools.partial(self.open, config)
            found["loader"], batches = run_loader(opener, feed, self.steps, self.warm_up, self.device)
            host_color = color_on_host(config.loader, self.device)
            found["stages_alone_ms"] = stages_alone(feed, host_color, self.device, self.dtype)
        with self.open(config, 0, self.warm_up + self.steps) as pipeline:
            found["end_to_end"] = run_steps(self.training, pipeline, self.steps, self.warm_up, pipeline.read)
            found["said"] = distributed.worst(pipeline.read())
            found["described"] = pipeline.description.replace(str(feed.index.path), "DATA")
        return found, batches

    def scaling(self) -> dict | None:
        """What computing takes at this batch and at half of it, or twice a small one; None where no such batch is possible."""
        batch, world = self.config.optim.batch_size, distributed.world_size()
        other = batch // 2 if batch // world >= 64 else 2 * batch
        try:
            config = resolve(with_batch(self._asked, other), world)
        except ValueError:
            return None
        training = self.set_up(config)
        # By turns, and the fastest of each: what else a machine does is not the batch's.
        runs = [(self.computing_ms(self.training, self.config), self.computing_ms(training, config)) for _ in range(3)]
        here, there = (min(times) for times in zip(*runs))
        found = {"batch_size": batch, "compute_ms": here, "other_batch_size": other, "other_compute_ms": there}
        return found | {"fixed_percent": verdict.fixed_percent(**found)}

    def computing_ms(self, training: Training, config: Config) -> float:
        """Milliseconds of a step that go into computing: not into waiting, and not into what no part claims."""
        parts = self.synthetic(training, config, steps=4, warm_up=2)["parts_ms"]
        return sum(ms for name, ms in parts.items() if name not in (WAIT, WIRE, REST))

    def trace(self, steps: int, warm_up: int = 2) -> None:
        """OUT/trace-rankN.json, for chrome://tracing or Perfetto."""
        losses, profiler = LossMeter(), torch.profiler.profile(acc_events=True)
        with self.open(self.config, 0, warm_up + steps) as batches, Labels():
            for number, batch in enumerate(batches):
                if number == warm_up:
                    profiler.start()
                take_step(self.training, batch, self.feed.steps_per_epoch, losses)
            losses.read()
            profiler.stop()
        with guard.whole_file(self.out / f"trace-rank{distributed.rank()}.json") as file:
            profiler.export_chrome_trace(file.name)


def with_engine(config: Config, name: str) -> Config:
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, pipeline=name))


def with_batch(config: Config, batch_size: int) -> Config:
    """The same at another batch size, with as many BatchNorm groups."""
    split_size = config.model.split_size and config.model.split_size * batch_size // config.optim.batch_size
    model = dataclasses.replace(config.model, split_size=split_size)
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, batch_size=batch_size))

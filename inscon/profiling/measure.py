"""What a report measures: steps with their parts, a loader by itself, the health of what it delivers, what a process uses.

Every rate is over steps after a warm-up, of the slowest rank, in source images of all ranks; too few steps give no rate.
"""

import contextlib
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inscon import distributed
from inscon.batch import Batch
from inscon.clock import PARTS, WAIT, WIRE, StepClock
from inscon.config import ViewConfig
from inscon.geometry import find_overlap
from inscon.meters import LossMeter, Stopwatch
from inscon.profiling.rates import FEWEST_STEPS, check_steps
from inscon.train import Training, over_ranks, take_step

READY_S = 1e-3
"""A batch that comes within this time was ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """Of steps of the trainer, the warm-up left out."""

    steps: int
    warm_up: int
    images_per_s: float
    """Source images of all ranks."""
    step_ms: float
    """Median."""
    step_ms_p99: float
    parts_ms: dict[str, float]
    """Mean milliseconds of a step by part (`inscon.clock.PARTS`), of the rank that waited least for others."""
    wall_ms: float
    """Mean milliseconds of a step, by a clock of its own: what the parts must add up to."""
    worst_wait_percent: float
    """Data wait of the rank that waited most."""
    ready_percent: float
    """How often a batch was there within a millisecond."""
    marks_per_step: float
    timing_percent: float
    """What the marks cost, measured, of the step."""
    cpu_cores: float
    """Processor cores kept busy by this rank's process, in the mean."""


def run_steps(
    training: Training,
    batches: Iterable[Batch],
    *,
    steps: int,
    warm_up: int,
    steps_per_epoch: int,
    after_warm_up: Callable[[], object] = lambda: None,
    fewest: int = FEWEST_STEPS,
) -> StepFigures:
    """The trainer's own loop over `batches`, timed. Raises ValueError where the batches end before the steps do, and for less than
    `fewest` steps: smaller only where several runs make one figure."""
    check_steps(steps, warm_up, fewest)
    model = over_ranks(training.model, training.config.optim.gradient_wire, timed=True).train()
    meter, watch, clock = LossMeter(), Stopwatch(), StepClock(training.device)
    coming = iter(watch.waits(batches))
    with clock:
        for number in range(warm_up + steps):
            if number == warm_up:
                clock.read()  # which waits for the device
                meter.read()
                distributed.any_rank(False)  # all ranks begin together
                after_warm_up()
                watch.read()
                start, cpu = time.perf_counter(), time.process_time()
                clock.read()
            try:
                batch = next(coming)
            except StopIteration:
                raise ValueError(
                    f"the batches ended after {number} of {warm_up + steps} steps; set a smaller --steps, or take more data"
                ) from None
            take_step(training, model, batch, steps_per_epoch, meter)
            del batch
            distributed.any_rank(False)  # as the trainer asks whether to stop
            clock.lap()
        times = clock.read()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        mark_s = clock.cost_s()
    each = {name: sum(parts.get(name, 0.0) for parts in times.parts) / steps for name in PARTS}
    ready = sum(parts.get(WAIT, 0.0) <= READY_S for parts in times.parts) / steps
    slowest = _of_the_rank_that_waited_least(each)
    shared = distributed.worst({"wall": wall, "wait": each[WAIT] * steps / wall, "late": 1 - ready, "cpu": cpu / wall})
    ordered = sorted(times.steps)
    return StepFigures(
        steps=steps,
        warm_up=warm_up,
        images_per_s=training.config.optim.batch_size * steps / shared["wall"],
        step_ms=1e3 * statistics.median(ordered),
        step_ms_p99=1e3 * ordered[min(round(0.99 * (steps - 1)), steps - 1)],
        parts_ms={name: 1e3 * seconds for name, seconds in slowest.items()},
        wall_ms=1e3 * wall / steps,
        worst_wait_percent=100 * shared["wait"],
        ready_percent=100 * (1 - shared["late"]),
        marks_per_step=times.marks / steps,
        timing_percent=100 * mark_s * times.marks / wall,
        cpu_cores=shared["cpu"],
    )


def _of_the_rank_that_waited_least(parts: dict[str, float]) -> dict[str, float]:
    """Who waits for others in a collective has time to spare; whom they wait for tells why the step takes as long as it does."""
    if distributed.world_size() == 1:
        return parts
    of_ranks = distributed.gather(torch.tensor([list(parts.values())], dtype=torch.float64))
    least = of_ranks[of_ranks[:, list(parts).index(WIRE)].argmin()]
    return dict(zip(parts, least.tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderFigures:
    """Of a pipeline with nobody behind it, the warm-up left out."""

    batches: int
    warm_up: int
    images_per_s: float
    """Source images of all ranks."""
    opened_s: float
    first_batch_s: float
    """From asking to having, once the pipeline is open."""
    batch_ms: float
    """Median time between batches."""
    batch_ms_p99: float
    seams: int
    """Ends of epochs within what was measured."""
    seam_stall_ms: float | None
    """How much longer the first batch of an epoch took than the others: median minus median. None without a seam."""
    said: dict[str, float]
    """What the pipeline measured of itself meanwhile."""
    cpu_cores: float
    """Cores kept busy by this process, workers of its own left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataHealth:
    """Of the batches that the loader was measured with."""

    images: int
    """Seen, of all ranks."""
    epochs: int
    """From how many epochs, each in part."""
    repeated: int
    """Of them, how many were seen again within an epoch."""
    overlap_percent: float
    """How many pairs of views share a region that is large enough (METHOD 9)."""
    substituted: int
    """Samples that stood in for bad ones."""


def run_loader(
    open_pipeline: Callable[[], contextlib.AbstractContextManager],
    *,
    batches: int,
    warm_up: int,
    start_step: int,
    steps_per_epoch: int,
    batch_size: int,
    views: ViewConfig,
    keep: int,
) -> tuple[LoaderFigures, DataHealth, list[Batch]]:
    """Take batches as fast as they come; then `keep` more, for whoever wants real ones at hand."""
    check_steps(batches, warm_up)
    start = time.perf_counter()
    with open_pipeline() as pipeline:
        opened = time.perf_counter()
        coming = iter(pipeline)
        times, facts = [], []
        for number in range(warm_up + batches):
            if number == warm_up:
                _synchronize(batch)
                distributed.any_rank(False)
                pipeline.read()
                begin, cpu = time.perf_counter(), time.process_time()
            asked = time.perf_counter()
            batch = next(coming)
            if number == 0:
                _synchronize(batch)
                first = time.perf_counter()
            times.append(time.perf_counter() - asked)
            # Boxes, not pixels: a batch that is kept takes its memory with it.
            facts.append(
                (batch.sample_ids, batch.query.crop_box, batch.query.flipped, batch.key.crop_box, batch.key.flipped)
            )
        _synchronize(batch)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        said = pipeline.read()
        cached = list(itertools.islice(coming, keep))
    epochs = [(start_step + number) // steps_per_epoch for number in range(warm_up + batches)]
    seam = [number for number in range(warm_up, len(epochs)) if epochs[number] != epochs[number - 1]]
    inner = [times[number] for number in range(warm_up, len(epochs)) if number not in seam]
    stall = 1e3 * (statistics.median(times[n] for n in seam) - statistics.median(inner)) if seam and inner else None
    ordered = sorted(times[warm_up:])
    shared = distributed.worst({"wall": wall, "cpu": cpu / wall, **{k: v for k, v in said.items() if k != SUBSTITUTED}})
    substituted = distributed.total({"n": said.get(SUBSTITUTED, 0.0)})["n"]
    figures = LoaderFigures(
        batches=batches,
        warm_up=warm_up,
        images_per_s=batch_size * batches / shared.pop("wall"),
        opened_s=opened - start,
        first_batch_s=first - opened,
        batch_ms=1e3 * statistics.median(ordered),
        batch_ms_p99=1e3 * ordered[min(round(0.99 * (batches - 1)), batches - 1)],
        seams=len(seam),
        seam_stall_ms=stall,
        cpu_cores=shared.pop("cpu"),
        said=shared,
    )
    return figures, data_health(facts, epochs, views, int(substituted)), cached


SUBSTITUTED = "loader_substituted"


def data_health(facts: list[tuple[Tensor, ...]], epochs: list[int], views: ViewConfig, substituted: int) -> DataHealth:
    """Look at sample ids and boxes of batches that belong to these `epochs`, over all ranks."""
    ids = torch.stack([distributed.gather(of_batch) for of_batch, *_ in facts])
    seen: dict[int, list[int]] = {}
    for epoch, of_batch in zip(epochs, ids.tolist(), strict=True):
        seen.setdefault(epoch, []).extend(of_batch)
    weights = [
        find_overlap(*boxes, views.view_size, views.overlap_min_side, views.overlap_min_iou).weight
        for _, *boxes in facts
    ]
    accepted = distributed.mean({"share": (torch.cat(weights) > 0).double().mean().item()})["share"]
    return DataHealth(
        images=ids.numel(),
        epochs=len(seen),
        repeated=sum(len(of_epoch) - len(set(of_epoch)) for of_epoch in seen.values()),
        overlap_percent=100 * accepted,
        substituted=substituted,
    )


def _synchronize(batch: Batch) -> None:
    if batch.query.pixels.is_cuda:
        torch.cuda.synchronize(batch.query.pixels.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one rank, MB of 2**20 bytes; None where there is no such thing."""

    host_mb: float
    """In memory now."""
    host_peak_mb: float
    torch_peak_mb: float | None
    """Taken by PyTorch on the GPU at most."""


def memory(device: torch.device) -> Memory:
    """Of this process; children are left out."""
    lines = {}
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    now, most = (float(lines[key].split()[0]) / 1024 if key in lines else peak for key in ("VmRSS", "VmHWM"))
    on_gpu = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return Memory(host_mb=now, host_peak_mb=most, torch_peak_mb=on_gpu)


def cores_of_rank() -> float:
    """Processor cores that this rank may use: those of the process, divided by the ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def copy_rate(device: torch.device) -> float | None:
    """Bytes per second from page-locked memory to the GPU, measured now; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    return 8 * source.numel() / (time.perf_counter() - start)


def shares(figures: StepFigures) -> dict[str, float]:
    """Each part in percent of the step as the other clock has it; they add up to 100 as far as the clocks agree."""
    return {name: 100 * ms / figures.wall_ms for name, ms in figures.parts_ms.items()}

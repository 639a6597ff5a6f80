"""DALI executing the plan: each JPEG is read from its shard, decoded once, cropped as often as needed.

Where the host decodes, DALI's threads decode and then call the compiled kernels of pipelines/kernels.py, which write views
and mosaic tiles straight into the memory of the batch (pipelines/slots.py): finished float32 for training on a CPU, uint8 for a
GPU, as finished views or as crops that the GPU colors (pipelines/color.py). With decode "mixed", DALI decodes with nvJPEG,
and the GPU's JPEG engine where it has one, and cuts the crops there.

The order, the bytes and the plan come from our own source, never from a DALI reader: a run of the graph makes one part of
a batch, and which one is counted from `start_step`, so resuming needs no state.
"""

import copy
import ctypes
import functools
import importlib.metadata
import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

# Decoded pictures come from DALI's own pool: malloc would give their memory back and have it cleared again by the system, up
# to 50 page faults a picture. Read when DALI is imported.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1k")

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import Pipeline as Graph
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction
from torch import Tensor

from data_prep.index import ShardError
from inscon.batch import Batch
from inscon.config import LoaderConfig
from inscon.plan import ViewSpec
from pipelines.color import normalization
from pipelines.decoding import Decode, candidates, choose
from pipelines.feed import (
    Feed,
    Pipeline,
    Refusal,
    Work,
    color_on_host,
    threads_per_rank,
    undecodable,
    wrong_size,
)
from pipelines.finish import Finish
from pipelines.kernels import render_at
from pipelines.prefetch import Ahead, StageClock
from pipelines.slots import Slot, Slots

LOG = logging.getLogger(__name__)
PART, PARTS_OF_THREADS = 32, 8
"""Pictures in one run of the graph: these many, or so many for each thread, lest threads wait for the last picture of a run."""
DEVICE_PART = 64
"""The same where a GPU decodes; bounds the memory that decoded pictures take there."""
READY_S = 1e-3
"""A run of the graph that takes no longer than this to hand out was ready."""
MIXED = "mixed"
"""DALI's name for decoders that take bytes on the host and leave pictures on the GPU; tests without one say "cpu"."""
DEPTH = 2
"""Runs of the graph that DALI works ahead."""
TRIAL_S = 1.5
"""How long each way to decode is tried, seconds."""
OUT_OF_MEMORY = re.compile(r"out of memory|bad_alloc|MemoryAllocation|OUT_OF_MEMORY", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """What one run of the graph makes: pictures `first` to `first + count - 1` of a batch."""

    work: Work
    first: int
    count: int
    slot: Slot | None
    inputs: tuple[list[np.ndarray] | np.ndarray, ...]
    """JPEG bytes, rows and places of each picture. Held until the run is over: DALI is given their memory, not a copy."""
    memory: np.ndarray
    """What the bytes of the whole batch lie in."""

    @property
    def last(self) -> bool:
        return self.first + self.count == len(self.work.sample_ids)


class Source:
    """Called by DALI once per run of the graph, ahead of the consumer; keeps what is in flight."""

    def __init__(self, feed: Feed, slots: Slots | None, steps: range, part: int, clock: StageClock):
        self._feed, self._slots, self._clock, self._size = feed, slots, clock, part
        self._parts = self._cut(steps)
        self._memory: deque[np.ndarray] = deque()
        self.in_flight: deque[Part] = deque()
        self.read_s = 0.0
        """Seconds spent here so far."""

    def __call__(self, batch_info):
        # DALI only prefetches what was asked for, but once more than there is; then StopIteration goes up from here.
        start = time.perf_counter()
        part = next(self._parts)
        self.in_flight.append(part)
        self.read_s += time.perf_counter() - start
        return part.inputs

    def done(self) -> Part:
        """The oldest part in flight, whose run is over."""
        part = self.in_flight.popleft()
        if part.last:
            self._memory.append(part.memory)
        return part

    def _cut(self, steps: range) -> Iterator[Part]:
        for step in steps:
            with self._clock.at(f"reading the samples of step {step}", "read"):
                work, jpegs, memory = self._feed.load(step, self._memory.popleft() if self._memory else None)
                if step + 1 < steps.stop:
                    self._feed.expect(step + 1)
            columns = [jpegs, work.rows()]
            slot = self._slots.take() if self._slots else None
            if slot is not None:
                columns.append(slot.places)
            for first in range(0, len(jpegs), self._size):
                inputs = tuple(column[first : first + self._size] for column in columns)
                yield Part(work, first, len(inputs[0]), slot, inputs, memory)


def build_graph(
    source,
    *,
    batch_size: int,
    views: tuple[ViewSpec, ...],
    threads: int,
    device_id: int | None,
    decode: Decode,
) -> Graph:
    """The DALI pipeline, for up to `batch_size` pictures a run.

    decode on the "cpu": (JPEG bytes, rows, places) from `source` -> (shape of the
    picture, a byte) per sample; the views are where `places` says. "mixed": (JPEG bytes, rows) -> (shape of the picture, and for
    each row a crop [S S 3] uint8 on GPU `device_id`).
    """
    mixed = decode.device == "mixed"
    graph = Graph(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id if mixed else None,
        prefetch_queue_depth=DEPTH,
        exec_dynamic=True,
    )
    with graph:
        inputs = [(types.UINT8, 1), (types.FLOAT, 2), (types.INT64, 1)][: 2 if mixed else 3]
        jpegs, rows, *places = fn.external_source(
            source=source, num_outputs=len(inputs), batch=True, batch_info=True, no_copy=True,
            dtype=[dtype for dtype, _ in inputs], ndim=[ndim for _, ndim in inputs],
        )  # fmt: skip
        # Boxes are in px as stored; DALI would turn the picture by its EXIF tag.
        settings = {"output_type": types.RGB, "adjust_orientation": False}
        if mixed:
            images = fn.decoders.image(jpegs, device=MIXED, hw_decoder_load=decode.engine_share, **settings)
            specs = [spec for spec in views for _ in range(spec.count)]
            made = [crop_by_dali(images, rows[number], spec) for number, spec in enumerate(specs)]
        else:
            images = fn.decoders.image(jpegs, device="cpu", **settings)
            made = [_render(max(spec.side for spec in views))(images, rows, *places)]
        graph.set_outputs(images.shape(device="cpu"), *made)
    graph.build()
    return graph


def crop_by_dali(images, row, spec: ViewSpec):
    """Cut first, so that the filter sees no pixel outside of the crop, then resize and mirror, as the compiled kernel; of a jigsaw,
    the patch at the row's offset."""
    cut = fn.slice(images, row[0:2], row[2:4] - row[0:2], axes=(1, 0), normalized_anchor=False, normalized_shape=False)
    made = fn.resize(cut, size=[spec.size, spec.size], interp_type=types.INTERP_LINEAR, antialias=True)
    made = fn.flip(made, horizontal=fn.cast(row[4], dtype=types.INT32), vertical=0)
    if spec.grid is None:
        return made
    return fn.slice(made, start=fn.cast(row[17:19], dtype=types.INT32), shape=[spec.side, spec.side], axes=(1, 0))


@functools.cache
def _render(widest: int) -> NumbaFunction:
    """The operator (picture, rows, places) -> a byte; kept, because DALI takes a second to wrap a compiled function."""
    # numba freezes what these two find around them, which is meant here.
    subtract, multiply = (row.ctypes.data for row in normalization(widest))  # whose cache keeps them
    render_picture = render_at()

    def shape(outs, ins):
        for out in outs[0]:
            out[0] = 1

    def render(out, image, rows, places):
        height, width, _ = image.shape
        picture, plan, place = image.ctypes.data, rows.ctypes.data, places.ctypes.data
        render_picture(picture, height, width, plan, rows.shape[0], place, subtract, multiply, widest)
        out[0] = 1

    return NumbaFunction(
        run_fn=render,
        setup_fn=shape,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.FLOAT, types.INT64],
        outs_ndim=[1],
        ins_ndim=[3, 2, 1],
        device="cpu",
    )


class Engine:
    """A running graph and the batches it makes, in this thread.

    Args:
        decode: where JPEGs are decoded.
        host_color: color and blur by the compiled kernels; else on `device`.
    """

    def __init__(
        self,
        feed: Feed,
        steps: range,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        decode: Decode,
        host_color: bool,
    ):
        self._feed, self._steps, self.device, self._decode, self._threads = feed, steps, device, decode, threads
        self._finish = Finish(feed, device, dtype, host_color)
        self.clock = StageClock()
        self.substituted = 0
        """Samples that stood in for bad ones, in the batches made so far."""
        self._runs = self._images = self._starved_runs = 0
        self.part = min(
            DEVICE_PART if decode.device == "mixed" else max(PART, PARTS_OF_THREADS * threads), feed.batch_size
        )
        self._slots = self._finish.slots if decode.device == "cpu" else None
        self._graph, self._source = None, None
        self._device_bytes = _used_beside_torch(device)
        self._start(steps)

    def batches(self) -> Iterator[Batch]:
        """One batch per step. Whoever asks for the next one has waited until the device was done with the one before."""
        for work, made in self.steps():
            self.substituted += work.substituted
            try:
                with self.clock.at("color and copy", "finish"):
                    batch = self._finish(work, made)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise self._explain(error) from None
            yield batch
            del batch, made

    def steps(self) -> Iterator[tuple[Work, "Slot | dict[str, Tensor]"]]:
        """Batches before they are finished: the slot they are in, or the crops of each part, on the device."""
        for step in self._steps:
            work, made = self._make(step)
            yield work, made
            self._finish.release(made)
            del made

    def read(self) -> dict[str, float]:
        """Since the last reading: milliseconds per source image and stage, and how often a run of the graph was not ready."""
        seconds, runs, images, starved = self.clock.read(), max(self._runs, 1), max(self._images, 1), self._starved_runs
        self._runs = self._images = self._starved_runs = 0
        found = {f"loader_{name}_ms": 1e3 * seconds.get(name, 0.0) / images for name in ("read", "decode", "finish")}
        found |= {"loader_graph_starved_percent": 100 * starved / runs, "loader_substituted": float(self.substituted)}
        if self.device.type == "cuda":
            found["loader_device_mb"] = max(_used_beside_torch(self.device) - self._device_bytes, 0) / 2**20
        return found

    def end(self) -> None:
        """DALI's threads end with the last reference to the graph."""
        self._graph = None
        self._source = None

    def _start(self, steps: range) -> None:
        self._graph = None  # first: its threads still write into slots
        self._source = Source(self._feed, self._slots, steps, self.part, self.clock)
        self._graph = build_graph(
            self._source,
            batch_size=self.part,
            views=self._feed.views,
            threads=self._threads,
            device_id=_device_id(self.device),
            decode=self._decode,
        )

    def _make(self, step: int) -> tuple[Work, "Slot | dict[str, Tensor]"]:
        """All parts of a batch. A sample that DALI refuses goes to `Feed.reject`; if that one returns, the graph begins anew."""
        while True:
            try:
                return self._run_step(step)
            except Refusal as refusal:
                found = refusal
            except (RuntimeError, MemoryError) as error:
                found = self._explain(error)
            self._feed.reject(*found.args)
            self._start(range(step, self._steps.stop))

    def _run_step(self, step: int) -> tuple[Work, "Slot | dict[str, Tensor]"]:
        crops = []
        while True:
            start = time.perf_counter() - self._source.read_s
            with self.clock.at(f"decoding the samples of step {step}", "decode"):
                shapes, *made = self._graph.run()
            took = time.perf_counter() - self._source.read_s - start
            self._runs, self._starved_runs = self._runs + 1, self._starved_runs + (took > READY_S)
            part = self._source.done()
            self._images += part.count
            assert part.work.step == step
            wrong = wrong_size(self._feed.index, part.work, part.first, np.asarray(shapes.as_array())[:, :2])
            if wrong is not None:
                raise Refusal(*wrong)
            if part.slot is None:
                crops.append([torch.from_dlpack(row.as_tensor()) for row in made])
            if part.last:
                return part.work, part.slot or self._by_view(crops)

    def _by_view(self, crops: list[list[Tensor]]) -> dict[str, Tensor]:
        """[B P S S 3] of each view, from parts of the batch that have [n S S 3] for each row of the plan."""
        rows = iter([made[0] if len(made) == 1 else torch.cat(made) for made in zip(*crops, strict=True)])
        return {spec.name: torch.stack([next(rows) for _ in range(spec.count)], 1) for spec in self._feed.views}

    def _explain(self, error: Exception) -> Refusal:
        """What DALI stumbled over. It does not say whose bytes it could not decode: try those in flight, one by one.

        Raises MemoryError, in one sentence, where memory ran out, and `error` itself where no picture is to blame.
        """
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            where = f"{self.device}, decode {self._decode.device}" if self.device.type == "cuda" else "the host"
            raise MemoryError(
                f"the pipeline dali ran out of memory on {where}: set {'--decode cpu, ' * (self._decode.device == 'mixed')}a "
                "smaller --prefetch or a smaller --batch-size, and run again"
            ) from error
        self._graph = None
        for part in self._source.in_flight:
            for i, jpeg in enumerate(part.inputs[0]):
                reason = refusal_of(jpeg, self._decode, _device_id(self.device))
                if reason is not None:
                    sample_id = int(part.work.sample_ids[part.first + i])
                    return Refusal(
                        sample_id,
                        undecodable(self._feed.index, sample_id, reason, f"DALI, decode {self._decode.device}"),
                    )
        raise error


def refusal_of(jpeg: np.ndarray, decode: Decode, device_id: int | None) -> str | None:
    """Why DALI cannot decode a JPEG there, in its own words, or None if it can."""
    mixed = decode.device == "mixed"
    graph = Graph(batch_size=1, num_threads=1, device_id=device_id if mixed else None, exec_dynamic=True)
    with graph:
        source = fn.external_source(source=lambda: [jpeg], batch=True)
        where = MIXED if mixed else "cpu"
        graph.set_outputs(fn.decoders.image(source, device=where, output_type=types.RGB, adjust_orientation=False))
    try:
        graph.run()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "rror" in line and "encountered" not in line), lines[0])
    return None


def open_dali(feed: Feed, loader: LoaderConfig, device: torch.device, dtype: torch.dtype, steps: range) -> Pipeline:
    """See `pipelines.open_pipeline`. `loader.threads` are DALI's threads; compiling is over when this returns."""
    threads = threads_per_rank(loader.threads)
    if threads < 1:
        raise ValueError(f"the pipeline dali needs at least 1 thread. Found: {threads}; set --threads 1 or more")
    if device.type == "cuda":
        check_dali(driver_cuda_version(), installed_flavour())
    elif loader.decode == "mixed":
        raise ValueError("decode=mixed needs a GPU, and the device is cpu; set --decode cpu or auto")
    host_color = color_on_host(loader, device)
    arguments = device, dtype, threads
    decode, why = Decode(loader.decode, None), ""
    if loader.decode == "auto":
        ways = candidates(torch.cuda.get_device_capability(device) if device.type == "cuda" else None, host_color)
        rates = try_out(feed, ways, arguments, host_color, steps.start) if len(ways) > 1 else {}
        decode, why = choose(ways, rates)
    engine = Engine(feed, steps, *arguments, decode, host_color)
    description = (
        f"dali {nvidia.dali.__version__}: decode {decode.describe()}{why}, color on the "
        f"{'host' if host_color else device.type}, {threads} threads, {loader.prefetch} batches ahead, {feed.index.path}"
    )
    ahead = Ahead(
        engine.batches(), depth=loader.prefetch, device=device, clock=engine.clock, timeout_s=loader.stall_timeout
    )
    return Pipeline(ahead, engine.end, description, engine.read)


def try_out(feed: Feed, ways: list[Decode], arguments: tuple, host_color: bool, start_step: int) -> dict[Decode, float]:
    """Source images/s of each way to decode, color included, over the run's own first batches; 0 for a way that fails.

    What a trial stumbles over is no verdict on a sample: the way that is taken meets it again, or decodes it.
    """
    rates = dict.fromkeys(ways, 0.0)
    for way in ways:
        try:
            rates[way] = _rate(
                Engine(copy.copy(feed), range(start_step, start_step + 10**6), *arguments, way, host_color)
            )
        except (RuntimeError, MemoryError, ShardError) as error:  # no nvJPEG for this driver, say, or too little memory
            LOG.warning("decode %s is left out, it fails: %s", way.describe(), str(error).strip().splitlines()[0])
    return rates


def _rate(engine: Engine) -> float:
    """Source images/s of an engine, from its second batch on; ends it."""
    try:
        with Ahead(engine.batches(), depth=1, device=engine.device, clock=engine.clock, timeout_s=60.0) as batches:
            next(batches)
            start, images = time.perf_counter(), 0
            while time.perf_counter() - start < TRIAL_S or not images:
                images += next(batches).size
            return images / (time.perf_counter() - start)
    finally:
        engine.end()


def _used_beside_torch(device: torch.device) -> int:
    """Bytes of a GPU that are in use, but not by this process's PyTorch; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def check_dali(driver_cuda_version: int, flavour: str) -> None:
    """Refuse a DALI built for a newer CUDA than the driver offers: it would fail later with a bare error code.

    Args:
        driver_cuda_version: 1000 * major + 10 * minor, e.g. 12040, as cuDriverGetVersion gives it.
        flavour: what follows "nvidia-dali-" in the name of the installed package, e.g. "cuda120".

    Raises ValueError naming the package to install.
    """
    offered, built_for = driver_cuda_version // 1000, int(re.fullmatch(r"cuda(\d+)0", flavour)[1])
    if built_for > offered:
        raise ValueError(
            f"DALI for CUDA {built_for} is installed (nvidia-dali-{flavour}) and this driver offers CUDA {offered}: "
            f"pip uninstall nvidia-dali-{flavour} && pip install nvidia-dali-cuda{offered}0"
        )


def installed_flavour() -> str:
    """ "cuda120" or "cuda130", from the name of the installed distribution."""
    names = importlib.metadata.packages_distributions()["nvidia"]
    return next(match[1] for name in names if (match := re.fullmatch(r"nvidia-dali-(?:\w+-)?(cuda\d+)", name)))


def driver_cuda_version() -> int:
    """The newest CUDA that the installed driver runs, as 1000 * major + 10 * minor."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value

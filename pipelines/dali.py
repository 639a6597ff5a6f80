"""DALI executing the plan: each JPEG is read from its shard, decoded once, cropped as often as needed.

Where the host decodes, DALI's threads decode and then call the compiled kernels of pipelines/kernels.py, which write views
and mosaic tiles straight into the memory of the batch (pipelines/slots.py): finished float32 for training on a CPU, uint8 for a
GPU, as finished views or as crops that the GPU colors (pipelines/color.py). With decode "mixed", DALI decodes with nvJPEG,
and the GPU's JPEG engine where it has one, and cuts the crops there.

The order, the bytes and the plan come from our own source, never from a DALI reader: a run of the graph makes one part of
a batch, and which one is counted from `start_step`, so resuming needs no state.
"""

import ctypes
import dataclasses
import functools
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Decoded pictures come from DALI's own pool: malloc would give their memory back and have it cleared again by the system, up
# to 50 page faults a picture. Read when DALI is imported.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1k")

import numpy as np
import nvidia.dali
import torch
from numba import carray, cfunc
from nvidia.dali import Pipeline as Graph
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction
from torch import Tensor

from inscon import guard
from inscon.config import LoaderConfig
from inscon.plan import ViewSpec
from pipelines import auto
from pipelines.feed import Engine, Feed, Refusal, Work, threads_per_rank, undecodable, wrong_size
from pipelines.finish import Finish
from pipelines.kernels import render_views
from pipelines.prefetch import StageClock
from pipelines.slots import Slot
from pipelines.vectors import pointer_to

PART, PARTS_OF_THREADS = 32, 8
"""Pictures in one run of the graph: these many, or so many for each thread, lest threads wait for the last picture of a run."""
DEVICE_PART = 64  # the same where a GPU decodes; bounds the memory that decoded pictures take there
MIXED = "mixed"
"""DALI's name for decoders that take bytes on the host and leave pictures on the GPU; tests without one say "cpu"."""
DEPTH = 2  # runs of the graph that DALI works ahead
JPEG_ENGINE_SHARES = (0.12, 0.3, 0.65, 0.9, 0.99)
"""Of a batch's JPEGs, which are tried for the GPU's JPEG engine; the GPU's other cores decode the rest."""
OUT_OF_MEMORY = re.compile(r"out of memory|bad_alloc|MemoryAllocation|OUT_OF_MEMORY", re.IGNORECASE)


class Part(NamedTuple):
    """What one run of the graph makes: some pictures of a batch, from the one at `first` on."""

    work: Work
    first: int
    slot: Slot | None
    inputs: tuple[list[np.ndarray] | np.ndarray, ...]
    """JPEG bytes, rows and places of each picture. Held until the run is over: DALI is given their memory, not a copy."""
    memory: np.ndarray  # what the bytes of the whole batch lie in


def decoded(jpegs, decode: str, jpeg_engine: float = 0.65):
    """DALI's node for pictures as RGB; boxes are in px as stored, where DALI would turn a picture by its EXIF tag."""
    device = MIXED if decode == "mixed" else "cpu"
    return fn.decoders.image(
        jpegs, device=device, output_type=types.RGB, adjust_orientation=False, hw_decoder_load=jpeg_engine
    )


def crop_by_dali(images, row, spec: ViewSpec):
    """Cut first, so that the filter sees no pixel outside of the crop, then resize and mirror, as the compiled kernel; of a jigsaw,
    the patch at the row's offset."""
    cut = fn.slice(images, row[0:2], row[2:4] - row[0:2], axes=(1, 0), normalized_anchor=False, normalized_shape=False)
    made = fn.resize(cut, size=[spec.size, spec.size], interp_type=types.INTERP_LINEAR, antialias=True)
    made = fn.flip(made, horizontal=fn.cast(row[4], dtype=types.INT32), vertical=0)
    if spec.grid is None:
        return made
    return fn.slice(made, start=fn.cast(row[17:19], dtype=types.INT32), shape=[spec.side, spec.side], axes=(1, 0))


class Render(NumbaFunction):
    """The operator (picture, rows, places) -> a byte, of functions with DALI's signatures that numba keeps on the disk. Around
    other ones DALI would compile its own, for two seconds at every start."""

    def __init__(self):
        super().__init__(
            run_fn=_render, setup_fn=_one_byte, device="cpu", out_types=[types.UINT8], outs_ndim=[1],
            in_types=[types.UINT8, types.FLOAT, types.INT64], ins_ndim=[3, 2, 1],
        )  # fmt: skip

    def _get_run_fn_cpu(self, run_fn, *_):
        return _kept(run_fn, self._run_fn_sig()).address

    def _get_setup_fn_cpu(self, setup_fn):
        return _kept(setup_fn, self._setup_fn_sig()).address


@functools.cache
def _kept(function, signature):
    """The C function, for good: DALI is given no more than its address."""
    return cfunc(signature, cache=True)(function)


def _render(outs, out_shapes, out_ndims, num_outs, ins, in_shapes, in_ndims, num_ins):
    """As DALI calls it: addresses of the addresses of each array, and of its shape, of one picture."""
    image, rows, places = carray(pointer_to(ins), 3, np.int64)
    shapes = carray(pointer_to(in_shapes), 3, np.int64)
    height, width, _ = carray(pointer_to(shapes[0]), 3, np.int64)
    count = carray(pointer_to(shapes[1]), 1, np.int64)[0]
    render_views(image, height, width, rows, count, places)
    carray(pointer_to(carray(pointer_to(outs), 1, np.int64)[0]), 1, np.uint8)[0] = 1


def _one_byte(out_shapes, out_ndims, num_outs, in_shapes, in_ndims, num_ins, num_samples):
    for shape in carray(pointer_to(out_shapes), num_samples, np.int64):
        carray(pointer_to(shape), 1, np.int64)[0] = 1


class DaliEngine(Engine):
    """A running graph; `loader.threads` are DALI's. Compiling is over when it is made."""

    def __init__(self, feed: Feed, loader: LoaderConfig, steps: range, finish: Finish, clock: StageClock):
        check_device(loader, finish.device)
        self._feed, self._steps, self._device, self._clock = feed, steps, finish.device, clock
        self._threads = threads_per_rank(loader.threads)
        loader, measured = choose_decode(feed, loader, finish, steps.start)
        self._decode, self._jpeg_engine = loader.decode, loader.jpeg_engine
        wanted = DEVICE_PART if self._decode == "mixed" else max(PART, PARTS_OF_THREADS * self._threads)
        self.part = min(wanted, feed.batch_size)
        self._slots = finish.slots if self._decode == "cpu" else None
        self._in_flight: deque[Part] = deque()
        self._memory: deque[np.ndarray] = deque()
        self._device_id = None  # of the GPU that decodes
        if self._decode == "mixed" and self._device.type == "cuda":
            self._device_id = torch.cuda.current_device() if self._device.index is None else self._device.index
            self._device_bytes = _used_beside_torch(self._device)
        on_engine = self._device_id is not None and has_jpeg_engine()
        engine = f" with {self._jpeg_engine:.0%} on the JPEG engine" if on_engine else ""
        self.description = (
            f"dali {nvidia.dali.__version__}: decode {self._decode}{engine}{measured}, color on the "
            f"{'host' if finish.host_color else self._device.type}, {self._threads} threads, {loader.prefetch} batches ahead, "
            f"{feed.index.path}"
        )
        self._start(steps)

    def steps(self):
        for step in self._steps:
            work, slot, crops = self._make(step)
            yield work, (slot.hand_out() if slot else (self._by_view(crops), None))
            del crops

    def figures(self) -> dict[str, float]:
        """Memory that the engine takes of a GPU, where it decodes there."""
        if self._device_id is None:
            return {}
        return {"loader_device_mb": max(_used_beside_torch(self._device) - self._device_bytes, 0) / 2**20}

    def end(self) -> None:
        """DALI's threads end with the last reference to the graph."""
        self._graph = None

    def _start(self, steps: range) -> None:
        """Build the graph. decode on the "cpu": (JPEG bytes, rows, places) -> (shape of the picture, a byte) per sample, the views
        are where `places` says; "mixed": (JPEG bytes, rows) -> (shape, and for each row a crop [S S 3] uint8 on the GPU)."""
        self._graph = None  # first: its threads still write into slots
        self._in_flight.clear()
        parts = self._parts(steps)

        def source(batch_info):
            # DALI only prefetches what was asked for, but once more than there is; then StopIteration goes up from here.
            self._in_flight.append(next(parts))
            return self._in_flight[-1].inputs

        graph = Graph(
            batch_size=self.part, num_threads=self._threads, device_id=self._device_id, prefetch_queue_depth=DEPTH,
            exec_dynamic=True,
        )  # fmt: skip
        mixed = self._decode == "mixed"
        with graph:
            count = 2 if mixed else 3
            jpegs, rows, *places = fn.external_source(
                source=source, num_outputs=count, batch=True, batch_info=True, no_copy=True,
                dtype=[types.UINT8, types.FLOAT, types.INT64][:count], ndim=[1, 2, 1][:count],
            )  # fmt: skip
            images = decoded(jpegs, self._decode, self._jpeg_engine)
            if mixed:
                specs = [spec for spec in self._feed.views for _ in range(spec.count)]
                made = [crop_by_dali(images, rows[number], spec) for number, spec in enumerate(specs)]
            else:
                made = [Render()(images, rows, *places)]
            graph.set_outputs(images.shape(device="cpu"), *made)
        graph.build()
        self._graph = graph

    def _parts(self, steps: range) -> Iterator[Part]:
        for step in steps:
            with self._clock.at(f"reading the samples of step {step}", "read"):
                work, jpegs, memory = self._feed.load(step, self._memory.popleft() if self._memory else None)
                if step + 1 < steps.stop:
                    self._feed.expect(step + 1)
            columns, slot = [jpegs, work.rows()], self._slots and self._slots.take()
            if slot is not None:
                columns.append(slot.places)
            for first in range(0, len(jpegs), self.part):
                yield Part(work, first, slot, tuple(column[first : first + self.part] for column in columns), memory)

    def _make(self, step: int) -> tuple[Work, Slot | None, list[list[Tensor]]]:
        """All parts of a batch. A sample that DALI refuses goes to `Feed.reject`; if that one returns, the graph begins anew."""
        while True:
            try:
                return self._run_step(step)
            except Refusal as found:
                refusal = found
            except RuntimeError as error:
                refusal = self._blamed(error)
            self._feed.reject(*refusal.args)
            self._start(range(step, self._steps.stop))

    def _run_step(self, step: int) -> tuple[Work, Slot | None, list[list[Tensor]]]:
        crops = []
        while True:
            with self._clock.at(f"decoding the samples of step {step}", "decode"):
                shapes, *made = self._graph.run()
            part = self._in_flight.popleft()
            assert part.work.step == step
            wrong_size(self._feed.index, part.work, part.first, np.asarray(shapes.as_array())[:, :2])
            if part.slot is None:
                crops.append([torch.from_dlpack(row.as_tensor()) for row in made])
            if part.first + len(part.inputs[0]) == len(part.work.sample_ids):
                self._memory.append(part.memory)
                return part.work, part.slot, crops

    def _by_view(self, crops: list[list[Tensor]]) -> dict[str, Tensor]:
        """[B P S S 3] of each view, from parts of the batch that have [n S S 3] for each row of the plan."""
        rows = iter([made[0] if len(made) == 1 else torch.cat(made) for made in zip(*crops, strict=True)])
        return {spec.name: torch.stack([next(rows) for _ in range(spec.count)], 1) for spec in self._feed.views}

    def _blamed(self, error: RuntimeError) -> Refusal:
        """The picture that DALI stumbled over. It does not say whose bytes it could not decode: try those in flight, one by one.

        Raises MemoryError where memory ran out, and `error` itself where no picture is to blame.
        """
        if OUT_OF_MEMORY.search(str(error)):
            raise MemoryError from error
        self._graph = None
        for part in self._in_flight:
            for i, jpeg in enumerate(part.inputs[0]):
                reason = refusal_of(jpeg, self._decode, self._device_id)
                if reason is not None:
                    sample_id = int(part.work.sample_ids[part.first + i])
                    return undecodable(self._feed.index, sample_id, reason, f"DALI, decode {self._decode}")
        raise error


def refusal_of(jpeg: np.ndarray, decode: str, device_id: int | None) -> str | None:
    """Why DALI cannot decode a JPEG there, in its own words, or None if it can."""
    graph = Graph(batch_size=1, num_threads=1, device_id=device_id, exec_dynamic=True)
    with graph:
        graph.set_outputs(decoded(fn.external_source(source=lambda: [jpeg], batch=True), decode))
    try:
        graph.run()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "rror" in line and "encountered" not in line), lines[0])
    return None


def choose_decode(feed: Feed, loader: LoaderConfig, finish: Finish, start_step: int) -> tuple[LoaderConfig, str]:
    """Settings that say where to decode, and the rates that were measured, as words for the log.

    Color on the host needs the crops there, which leaves decoding there. Else ways are tried: the host, and the GPU with several
    shares of its JPEG engine.
    """
    if loader.decode != "auto":
        return loader, ""
    host = dataclasses.replace(loader, decode="cpu")
    if finish.device.type == "cpu" or finish.host_color:
        return host, ""
    shares = {"mixed": loader.jpeg_engine}
    if has_jpeg_engine():
        shares = {f"mixed {share:.0%}": share for share in JPEG_ENGINE_SHARES}
    ways = {name: dataclasses.replace(loader, decode="mixed", jpeg_engine=share) for name, share in shares.items()}
    ways = {"cpu": host} | ways
    where = {"device": finish.device, "dtype": finish.dtype, "start_step": start_step}
    with guard.say_if_long(f"{len(ways)} ways to decode to be tried, once on this machine for these data"):
        trials = {name: auto.tried(feed, way, **where) for name, way in ways.items()}
    words = ", ".join(f"{name}: {trial.images_per_s:.0f}" for name, trial in trials.items())
    return ways[auto.steadiest(trials)], f" (measured, images/s: {words})"


@functools.cache
def has_jpeg_engine() -> bool:
    """Whether nvJPEG, which DALI decodes with, finds JPEG engines in the current GPU; no where it cannot be asked."""
    libraries = [file for root in nvidia.__path__ for file in Path(root).glob("*/lib/libnvjpeg.so.*")]
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    try:
        nvjpeg = ctypes.CDLL(str(libraries[0]) if libraries else "libnvjpeg.so")
        if nvjpeg.nvjpegCreateSimple(ctypes.byref(handle)) == 0:
            nvjpeg.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
            nvjpeg.nvjpegDestroy(handle)
    except (OSError, AttributeError):
        return False
    return engines.value > 0


def _used_beside_torch(device: torch.device) -> int:
    """Bytes of a GPU that are in use, but not by this process's PyTorch."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def check_device(loader: LoaderConfig, device: torch.device) -> None:
    """ValueError where there is no GPU to decode on."""
    if device.type == "cpu" and loader.decode == "mixed":
        raise ValueError("decode=mixed needs a GPU, and the device is cpu; set --decode cpu or auto")

"""FFCV executing the plan: one .beton, each picture decoded once, all its views written where they belong in the batch.

FFCV 1.0.2 is used as PyPI has it, for what it does well: its file format, its protocol of operations (`ViewDecoder` is one),
its graph that compiles them, and the libjpeg-turbo it is linked with. Around the graph stands a loader of ours, since
FFCV's own decodes a picture once per view (libffcv/ffcv#77, #285), draws crops with numbers that no seed fixes (#392),
cannot resume, waits for ever when its thread fails (#206), leaks a thread when a loop is left (#345, #393) and pauses
between epochs (#24). Order, bytes and plan come from `pipelines.feed`, as for every engine; threads call the compiled graph
with a few pictures at a time, each outcome is looked at, and the views are those of pipelines/kernels.py, bit for bit.

Raw pixels and JPEGs may be mixed in a .beton. A GPU gets crops or finished views from the host; FFCV has no decoder there.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import importlib.metadata
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import carray, get_num_threads, set_num_threads, types

from data_prep.beton import METADATA_DTYPE, metadata_of, read_header
from data_prep.index import BETON_NAME, DatasetIndex, ShardError
from inscon.batch import Batch
from inscon.config import LoaderConfig
from inscon.plan import ROW
from pipelines.color import normalization
from pipelines.feed import (
    Feed,
    Pipeline,
    Refusal,
    Work,
    color_on_host,
    not_its_pixels,
    threads_per_rank,
    undecodable,
    wrong_size,
)
from pipelines.finish import Finish
from pipelines.kernels import pointer_to, render_at
from pipelines.prefetch import Ahead, StageClock
from pipelines.slots import Slot, huge_pages

APT = "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev"
"""What FFCV is compiled against and loads, on Debian and Ubuntu."""
CONDA = "conda install -c conda-forge cxx-compiler pkg-config opencv libjpeg-turbo"
"""The same for conda."""


def _why_not(error: ImportError) -> str:
    """Why FFCV cannot be imported, and what to do, in one sentence."""
    otherwise = "or set --pipeline dali"
    if (
        isinstance(error, ModuleNotFoundError)
        and (error.name or "").startswith("ffcv")
        and error.name != "ffcv._libffcv"
    ):
        return (
            f"the pipeline ffcv needs the package ffcv, which is not installed and is compiled when it is: {APT} && pip install "
            f"'inscon[ffcv]' (conda: {CONDA}), {otherwise}"
        )
    if (error.name or "").partition(".")[0] == "distutils":
        return f"FFCV needs distutils, which Python no longer has and setuptools brings: pip install setuptools, {otherwise}"
    if isinstance(error, ModuleNotFoundError) and error.name != "ffcv._libffcv":
        return f"FFCV needs the package {error.name}, which is not installed: pip install 'inscon[ffcv]', {otherwise}"
    if "libGL" in str(error) or "libgthread" in str(error):
        return f"FFCV's opencv-python does not load ({error}): apt-get install libgl1 libglib2.0-0, {otherwise}"
    return (
        f"FFCV's compiled part does not load ({error}): {APT} && pip install --force-reinstall --no-deps --no-cache-dir "
        f"ffcv==1.0.2 (conda: {CONDA}), {otherwise}"
    )


@contextlib.contextmanager
def _threads_kept():
    """Importing FFCV's compiler sets PyTorch, and numba, to one thread for the whole process (libffcv/ffcv#13 brought it)."""
    torch_threads, numba_threads = torch.get_num_threads(), get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        set_num_threads(numba_threads)


with _threads_kept(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of distutils and ast, which FFCV uses as they were
    try:
        from ffcv.fields import RGBImageField
        from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
        from ffcv.libffcv import lib
        from ffcv.memory_managers import MemoryManager
        from ffcv.pipeline import PipelineSpec
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.graph import Graph
    except ImportError as error:
        raise ValueError(_why_not(error)) from None

CHUNKS = 4
"""Into so many pieces per thread is a batch cut, lest threads wait for the last picture of one."""
AHEAD = 1
"""Batches in work beside the one that is waited for."""
READY_S = 1e-3
"""A batch that takes no longer than this to hand out was ready."""
KEPT = 1 << 26
"""Bytes of the largest decoded picture whose memory a thread keeps; FFCV keeps that of the set's largest one, a whole batch
of it for every batch ahead and every view."""
FINE, REFUSED, EMPTY, WRONG_SIZE = range(4)
"""Outcomes of a picture."""


def _turbojpeg(name: str, result, *arguments) -> Callable:
    """A function of the libjpeg-turbo that FFCV's extension is linked with."""
    function = lib[name]  # not `lib.name`, which would be the same object for everybody
    function.restype, function.argtypes = result, arguments
    return function


_new_decompressor = _turbojpeg("tjInitDecompress", ctypes.c_void_p)
_read_header = _turbojpeg("tjDecompressHeader3", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong,
                          *[ctypes.c_void_p] * 4)  # fmt: skip
# FFCV calls it with TJFLAG_FASTDCT, up to 21 levels from what others decode (docs/parity.md); flags 0 are PIL's and DALI's pixels.
_decompress = _turbojpeg("tjDecompress2", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p,
                         *[ctypes.c_int] * 5)  # fmt: skip
_last_error = _turbojpeg("tjGetErrorStr2", ctypes.c_char_p, ctypes.c_void_p)
_destroy = _turbojpeg("tjDestroy", ctypes.c_int, ctypes.c_void_p)


class BatchMemory(MemoryManager):
    """Where operations find stored bytes: in memory, by address, already compared with their checksums.

    FFCV's own managers map the file, which ends the process when it is cut short, or read pages without looking whether
    they came; they hold a Python set for every sample (libffcv/ffcv#113: 1.3 million of them seem to hang); and the one that
    maps declares its array type read-only by changing numba's own, after which no function over uint8 compiles in the
    whole process. This one's state is `(addresses, sizes)` of a batch, addresses in ascending order.
    """

    def __init__(self):
        pass  # not MemoryManager's, which makes the sets

    @property
    def state_type(self):
        return types.Tuple([types.uint64[::1], types.uint64[::1]])

    def schedule_epoch(self, schedule):
        raise NotImplementedError("batches are scheduled by pipelines.ffcv.Engine")

    def compile_reader(self) -> Callable:
        """(address, state) -> [byte_count] uint8."""

        def read(address, state):
            addresses, sizes = state
            return carray(pointer_to(np.int64(address)), sizes[np.searchsorted(addresses, address)], np.uint8)

        return Compiler.compile(read)


class ViewDecoder(SimpleRGBImageDecoder):
    """FFCV operation: each picture decoded once, and all its views and mosaic tiles made of it while it is in the cache.

    Memory, as FFCV hands it to operations: rows [B R 20] float32 (`Work.rows`), places [B 3+3R] int64 (`pipelines.slots`),
    tools [2] int64 (decompressor, memory for one decoded picture) and outcome [4] int64, which is also the result: how it
    went, and, of the picture that it did not go well with and where it stopped, place in the batch, height and width found.

    Args:
        widest: side of the largest view, px.
    """

    def __init__(self, widest: int):
        super().__init__()
        self._widest = widest

    def declare_state_and_memory(self, previous_state):
        result = np.dtype(np.int64)
        return dataclasses.replace(previous_state, jit_mode=True, shape=(4,), dtype=result), AllocationQuery(
            (4,), result
        )

    def generate_code(self) -> Callable:
        # numba freezes what it finds around the function, which is meant here.
        subtract, multiply = (row.ctypes.data for row in normalization(self._widest))  # whose cache keeps them
        find, render, jpg = self.memory_read, render_at(), IMAGE_MODES["jpg"]
        read_header, decompress, widest = _read_header, _decompress, self._widest

        def decode(batch_indices, memory, metadata, storage_state):
            rows, places, tools, outcome = memory
            outcome[0] = FINE
            found = np.zeros(4, np.int32)  # width, height, and two that nobody asks for
            at = found.ctypes.data
            for k in range(len(batch_indices)):
                place = batch_indices[k]
                field = metadata[place]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                stored = find(field["data_ptr"], storage_state)
                picture, verdict = stored.ctypes.data, FINE
                if field["mode"] == jpg:
                    picture = tools[1]
                    if read_header(tools[0], stored.ctypes.data, stored.size, at, at + 4, at + 8, at + 12) != 0:
                        verdict = REFUSED
                    elif found[0] == 0:  # tables alone are a sound JPEG
                        verdict = EMPTY
                    elif found[0] != width or found[1] != height:
                        verdict = WRONG_SIZE
                    elif decompress(tools[0], stored.ctypes.data, stored.size, picture, width, 0, height, 0, 0) != 0:
                        verdict = REFUSED
                elif stored.size != 3 * height * width:
                    verdict = REFUSED
                if verdict != FINE:
                    outcome[0], outcome[1], outcome[2], outcome[3] = verdict, place, found[1], found[0]
                    return outcome
                count = rows.shape[1]
                plan, where = (
                    rows.ctypes.data + place * (4 * ROW * count),
                    places.ctypes.data + place * (24 + 24 * count),
                )
                render(picture, height, width, plan, count, where, subtract, multiply, widest)
            return outcome

        decode.is_parallel = False
        return decode


@functools.cache
def compile_decoder(widest: int) -> Callable:
    """FFCV's graph of one `ViewDecoder`: (places in the batch, metadata, state, memory) -> outcome. It releases the GIL."""
    spec, metadata = PipelineSpec("image", decoder=ViewDecoder(widest)), np.zeros(1, METADATA_DTYPE)
    graph = Graph({"image": spec}, {"image": RGBImageField()}, {"image": 0}, metadata, BatchMemory().compile_reader())
    [(stage, [node])], _ = graph.codegen_all(graph.collect_requirements()[1])

    def run(indices, metadata, state, memory):
        return stage(indices, metadata, state, **{f"memory_{node}": memory, f"shared_memory_{node}": None})[0]

    nobody, numbers = np.zeros(0, np.int64), np.zeros(1, np.uint64)
    rows, places = np.zeros((1, 1, ROW), np.float32), np.zeros((1, 6), np.int64)
    run(nobody, metadata, (numbers, numbers), (rows, places, np.zeros(2, np.int64), np.zeros(4, np.int64)))  # compiles
    return run


class Bench:
    """What one thread works with: a decompressor, memory for stored bytes and for one decoded picture."""

    def __init__(self):
        self.tools, self.outcome = np.array([_new_decompressor(), 0], np.int64), np.zeros(4, np.int64)
        self.read_s = self.made_s = 0.0
        """Seconds spent on either, since they were last asked for."""
        self._kept: dict[str, np.ndarray] = {}

    def room(self, purpose: str, num_bytes: int) -> np.ndarray:
        """So many bytes or more, of any content, until room for the same purpose is asked for again."""
        memory = self._kept.get(purpose)
        if memory is None or len(memory) < num_bytes:
            memory = huge_pages(max(num_bytes * 5 // 4, 1 << 21))
            if num_bytes <= KEPT:
                self._kept[purpose] = memory
        return memory

    def refused(self) -> str:
        """Why libjpeg-turbo refused what it was given last."""
        reason = (_last_error(int(self.tools[0])) or b"").decode(errors="replace")
        # After an error within a header it takes the next picture for the rest of this one, so begin with another.
        _destroy(int(self.tools[0]))
        self.tools[0] = _new_decompressor()
        return reason

    def close(self) -> None:
        _destroy(int(self.tools[0]))


@dataclass(frozen=True, slots=True)
class InWork:
    """A step whose pictures are being made."""

    work: Work
    slot: Slot
    rows: np.ndarray
    metadata: np.ndarray
    """[B] METADATA_DTYPE as a .beton has it; positions become addresses in memory when a picture's turn comes."""
    byte_counts: np.ndarray
    """[B], stored."""
    made: list[concurrent.futures.Future]


class Engine:
    """Threads that run the compiled graph, and the batches they make; iterated in one thread.

    Args:
        host_color: color and blur by the compiled kernels; else on `device`.
    """

    def __init__(
        self, feed: Feed, steps: range, device: torch.device, dtype: torch.dtype, threads: int, host_color: bool
    ):
        self._feed, self._steps, self._device = feed, steps, device
        self._finish, self._run = (
            Finish(feed, device, dtype, host_color),
            compile_decoder(max(spec.side for spec in feed.views)),
        )
        self.clock = StageClock()
        self.substituted = 0
        """Samples that stood in for bad ones, in the batches made so far."""
        self._steps_made = self._starved = 0
        chunk = max(feed.batch_size // (CHUNKS * threads), 1)
        self._chunks = [np.arange(i, min(i + chunk, feed.batch_size)) for i in range(0, feed.batch_size, chunk)]
        self._mine, self._benches = threading.local(), []
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, "inscon-decoder")

    def batches(self) -> Iterator[Batch]:
        """One batch per step. Whoever asks for the next one has waited until the device was done with the one before."""
        try:
            for work, slot in self.steps():
                self.substituted += work.substituted
                with self.clock.at("color and copy", "finish"):
                    batch = self._finish(work, slot)
                yield batch
                del batch, slot
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise MemoryError(
                f"the pipeline ffcv ran out of memory on {self._device if self._device.type == 'cuda' else 'the host'}: set a "
                "smaller --prefetch or a smaller --batch-size, and run again"
            ) from error

    def steps(self) -> Iterator[tuple[Work, Slot]]:
        """Batches before they are finished, in the slots they were made in."""
        in_work, coming = deque(), self._steps.start
        for step in self._steps:
            while True:
                while len(in_work) <= AHEAD and coming < self._steps.stop:
                    in_work.append(self._begin(coming))
                    coming += 1
                refusal = self._wait(in_work[0])
                if refusal is None:
                    break
                for begun in in_work:  # which was laid out for the bad samples known before
                    self._wait(begun)
                    self._finish.slots.give_back(begun.slot)
                in_work.clear()
                coming = step
                self._feed.reject(*refusal.args)
            done = in_work.popleft()
            yield done.work, done.slot
            self._finish.release(done.slot)
            del done

    def read(self) -> dict[str, float]:
        """Since the last reading: milliseconds per source image and stage, those of reading and decoding summed over the threads,
        and how often a batch had to be waited for."""
        seconds, steps, starved = self.clock.read(), max(self._steps_made, 1), self._starved
        self._steps_made = self._starved = 0
        found = {"read": 0.0, "decode": 0.0, "finish": seconds.get("finish", 0.0)}
        for bench in self._benches:
            found["read"] += bench.read_s
            found["decode"] += bench.made_s
            bench.read_s = bench.made_s = 0.0
        images = steps * self._feed.batch_size
        return {f"loader_{name}_ms": 1e3 * spent / images for name, spent in found.items()} | {
            "loader_graph_starved_percent": 100 * starved / steps,
            "loader_substituted": float(self.substituted),
        }

    def end(self) -> None:
        """What is being made is finished, what waits is not begun."""
        self._threads.shutdown(cancel_futures=True)
        while self._benches:
            self._benches.pop().close()

    def _begin(self, step: int) -> InWork:
        with self.clock.at(f"planning step {step}", "plan"):
            work = self._feed.work(step)
            if step + 1 < self._steps.stop:
                self._feed.expect(step + 1)
            records = self._feed.index.records(work.sample_ids)
            byte_counts = records["byte_count"].astype(np.int64)
            begun = InWork(work, self._finish.slots.take(), work.rows(), metadata_of(records), byte_counts, [])
        begun.made.extend(self._threads.submit(self._make, begun, chunk) for chunk in self._chunks)
        return begun

    def _make(self, begun: InWork, chunk: np.ndarray) -> Refusal | None:
        """Run in a thread of the pool: the pictures at these places of the batch, up to one that cannot be used."""
        bench = getattr(self._mine, "bench", None)
        if bench is None:
            bench = self._mine.bench = Bench()
            self._benches.append(bench)
        start = time.perf_counter()
        # Read here, a few at a time, so that they are still in this core's cache when they are decoded.
        sizes, stored = begun.byte_counts[chunk], []
        memory = bench.room("stored", int(sizes.sum()))
        for place, behind in zip(chunk.tolist(), np.cumsum(sizes).tolist(), strict=True):
            sample_id = int(begun.work.sample_ids[place])
            try:
                stored.append(
                    self._feed.index.read(sample_id, memory[behind - int(begun.byte_counts[place]) :], pixels=True)
                )
            except ShardError as error:
                return Refusal(sample_id, error)
        addresses = np.array([content.ctypes.data for content in stored], np.uint64)
        begun.metadata["f0"]["data_ptr"][chunk] = addresses
        order = addresses.argsort()
        state = addresses[order], sizes[order].astype(np.uint64)
        picture = bench.room("picture", 3 * int(begun.work.sizes[chunk].prod(1).max()))
        bench.tools[1] = picture.ctypes.data
        bench.read_s -= start - (start := time.perf_counter())
        memories = begun.rows, begun.slot.places, bench.tools, bench.outcome
        outcome, place, height, width = map(int, self._run(chunk, begun.metadata, state, memories))
        bench.made_s += time.perf_counter() - start
        if outcome == FINE:
            return None
        if outcome == WRONG_SIZE:
            return Refusal(*wrong_size(self._feed.index, begun.work, place, np.array([[height, width]])))
        sample_id = int(begun.work.sample_ids[place])
        if begun.metadata["f0"]["mode"][place] == IMAGE_MODES["jpg"]:
            reason = bench.refused() if outcome == REFUSED else "there is no picture in it"
        else:
            reason = not_its_pixels(self._feed.index, sample_id)
        return Refusal(sample_id, undecodable(self._feed.index, sample_id, reason, "FFCV's libjpeg-turbo"))

    def _wait(self, begun: InWork) -> Refusal | None:
        """When all of a step is made: the first picture of it that cannot be used."""
        start = time.perf_counter()
        with self.clock.at(f"reading or decoding the samples of step {begun.work.step}", "decode"):
            refusals = [future.result() for future in begun.made]
        self._steps_made += 1
        self._starved += time.perf_counter() - start > READY_S
        return next((refusal for refusal in refusals if refusal is not None), None)


def check_beton(index: DatasetIndex) -> None:
    """ShardError, in a sentence, for a packed set that is no .beton, or one that FFCV 1.0.2 does not read."""
    if index.manifest.container != "beton":
        raise ShardError(
            f"{index.path} holds tar shards, and the pipeline ffcv reads a .beton: python data_prep/make_ffcv.py --data "
            f"{index.path} --out BETON, or set --pipeline dali."
        )
    path = index.path / BETON_NAME
    header = read_header(path)
    if header["num_samples"] != len(index):
        raise ShardError(
            f"{path} says it holds {header['num_samples']} samples where its index has {len(index)}; the two are not of one run: "
            "copy them again or rerun data_prep/make_ffcv.py."
        )


def open_ffcv(feed: Feed, loader: LoaderConfig, device: torch.device, dtype: torch.dtype, steps: range) -> Pipeline:
    """See `pipelines.open_pipeline`. `loader.threads` decode; compiling is over when this returns."""
    check_beton(feed.index)
    threads, host_color = threads_per_rank(loader.threads), color_on_host(loader, device)
    if threads < 1:
        raise ValueError(f"the pipeline ffcv needs at least 1 thread. Found: {threads}; set --threads 1 or more")
    if loader.decode == "mixed":
        raise ValueError(
            "the pipeline ffcv decodes on the host, and decode is mixed; set --decode cpu or --pipeline dali"
        )
    engine = Engine(feed, steps, device, dtype, threads, host_color)
    description = (
        f"ffcv {importlib.metadata.version('ffcv')}: decode cpu, color on the {'host' if host_color else device.type}, {threads} "
        f"threads, {loader.prefetch} batches ahead, {feed.index.path / BETON_NAME}"
    )
    ahead = Ahead(
        engine.batches(), depth=loader.prefetch, device=device, clock=engine.clock, timeout_s=loader.stall_timeout
    )
    return Pipeline(ahead, engine.end, description, engine.read)

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
import ctypes
import dataclasses
import functools
import importlib.metadata
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from numba import carray, get_num_threads, set_num_threads, typed, types

from data_prep.beton import METADATA_DTYPE, metadata_of
from data_prep.index import BETON_NAME, ShardError
from inscon.config import LoaderConfig
from inscon.plan import ROW
from pipelines.feed import Engine, Feed, Refusal, Work, read, threads_per_rank, undecodable, wrong_size
from pipelines.finish import Finish
from pipelines.kernels import render_at
from pipelines.prefetch import StageClock
from pipelines.slots import Slot, huge_pages
from pipelines.vectors import pointer_to

NUM_THREADS = torch.get_num_threads(), get_num_threads()
try:
    # FFCV makes a dictionary of numba's, of two names, for which numba compiles for 3 to 4 s in every process; Python's will do.
    with warnings.catch_warnings(), mock.patch.object(typed, "Dict", dict):
        warnings.simplefilter("ignore")  # of distutils and ast, which FFCV uses as they were
        from ffcv.fields import RGBImageField
        from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
        from ffcv.libffcv import lib
        from ffcv.memory_managers import MemoryManager
        from ffcv.pipeline import PipelineSpec
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.graph import Graph
except ImportError as error:
    raise ValueError(
        f"the pipeline ffcv does not load ({error}). FFCV is compiled when it is installed: apt-get install g++ pkg-config "
        "python3-dev libopencv-dev libturbojpeg0-dev libgl1 libglib2.0-0 (conda: conda install -c conda-forge cxx-compiler "
        "pkg-config opencv libjpeg-turbo), then pip install 'inscon[ffcv]', or, where it is installed already, pip install "
        "--force-reinstall --no-deps --no-cache-dir ffcv==1.0.2; or set --pipeline dali"
    ) from None
finally:
    # Importing its compiler sets PyTorch, and numba, to one thread for the whole process (libffcv/ffcv#13 brought it).
    torch.set_num_threads(NUM_THREADS[0])
    set_num_threads(NUM_THREADS[1])

CHUNKS = 4  # into so many pieces per thread is a batch cut, lest threads wait for the last picture of one
AHEAD = 1  # batches in work beside the one that is waited for
FINE, REFUSED, WRONG_SIZE = range(3)  # outcomes of a picture


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
        raise NotImplementedError("batches are scheduled by pipelines.ffcv.FfcvEngine")

    def compile_reader(self) -> Callable:
        """(address, state) -> [byte_count] uint8."""

        def read(address, state):
            addresses, sizes = state
            return carray(pointer_to(np.int64(address)), sizes[np.searchsorted(addresses, address)], np.uint8)

        return Compiler.compile(read)


class ViewDecoder(SimpleRGBImageDecoder):
    """FFCV operation: each picture decoded once, and all its views and mosaic tiles made of it while it is in the cache.

    Memory, as FFCV hands it to operations: rows [B R ROW] float32 (`Work.rows`), places [B 3+3R] int64 (`pipelines.slots`),
    tools [2] int64 (decompressor, memory for one decoded picture) and outcome [4] int64, which is also the result: how it
    went, and, of the picture that it did not go well with and where it stopped, place in the batch, height and width found.
    """

    def declare_state_and_memory(self, previous_state):
        result = np.dtype(np.int64)
        state = dataclasses.replace(previous_state, jit_mode=True, shape=(4,), dtype=result)
        return state, AllocationQuery((4,), result)

    def generate_code(self) -> Callable:
        # numba freezes what it finds around the function, which is meant here.
        find, render, jpg = self.memory_read, render_at().ctypes, IMAGE_MODES["jpg"]
        read_header, decompress = _read_header, _decompress

        def decode(batch_indices, memory, metadata, storage_state):
            rows, places, tools, outcome = memory
            found = np.zeros(4, np.int32)  # width, height, and two that nobody asks for
            at, count = found.ctypes.data, rows.shape[1]
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
                    elif found[0] != 0 and (found[0] != width or found[1] != height):  # 0: no picture, tables alone
                        verdict = WRONG_SIZE
                    elif decompress(tools[0], stored.ctypes.data, stored.size, picture, width, 0, height, 0, 0) != 0:
                        verdict = REFUSED
                outcome[0], outcome[1], outcome[2], outcome[3] = verdict, place, found[1], found[0]
                if verdict != FINE:
                    break
                plan, where = rows[place].ctypes.data, places[place].ctypes.data
                render(picture, height, width, plan, count, where)
            return outcome

        decode.is_parallel = False
        return decode


@functools.cache
def compile_decoder() -> Callable:
    """FFCV's graph of one `ViewDecoder`: (places in the batch, metadata, state, memory) -> outcome. It releases the GIL."""
    spec, metadata = PipelineSpec("image", decoder=ViewDecoder()), np.zeros(1, METADATA_DTYPE)
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
        self._kept = {"stored": np.empty(0, np.uint8), "picture": np.empty(0, np.uint8)}

    def room(self, purpose: str, num_bytes: int) -> np.ndarray:
        """So many bytes or more, of any content, until room for the same purpose is asked for again."""
        if len(self._kept[purpose]) < num_bytes:
            self._kept[purpose] = huge_pages(max(num_bytes * 5 // 4, 1 << 21))
        return self._kept[purpose]

    def refused(self) -> str:
        """Why libjpeg-turbo refused what it was given last."""
        reason = (_last_error(int(self.tools[0])) or b"").decode(errors="replace")
        # After an error within a header it takes the next picture for the rest of this one, so begin with another.
        self.close()
        self.tools[0] = _new_decompressor()
        return reason

    def close(self) -> None:
        _destroy(int(self.tools[0]))


class InWork(NamedTuple):
    """A step whose pictures are being made."""

    work: Work
    slot: Slot
    rows: np.ndarray
    metadata: np.ndarray
    """[B] METADATA_DTYPE as a .beton has it; positions become addresses in memory when a picture's turn comes."""
    byte_counts: np.ndarray  # [B] int64, stored
    made: list[concurrent.futures.Future]


class FfcvEngine(Engine):
    """Threads that run the compiled graph; `loader.threads` of them. Compiling is over when it is made."""

    def __init__(self, feed: Feed, loader: LoaderConfig, steps: range, finish: Finish, clock: StageClock):
        if feed.index.manifest.container != "beton":
            raise ShardError(
                f"{feed.index.path} holds tar shards, and the pipeline ffcv reads a .beton: python data_prep/make_ffcv.py --data "
                f"{feed.index.path} --out BETON, or set --pipeline dali."
            )
        if loader.decode == "mixed":
            raise ValueError(
                "the pipeline ffcv decodes on the host, and decode is mixed; set --decode cpu or --pipeline dali"
            )
        self._feed, self._steps, self._slots, self._clock = feed, steps, finish.slots, clock
        self._run, threads = compile_decoder(), threads_per_rank(loader.threads)
        chunk = max(feed.batch_size // (CHUNKS * threads), 1)
        self._chunks = [np.arange(i, min(i + chunk, feed.batch_size)) for i in range(0, feed.batch_size, chunk)]
        self._mine, self._benches = threading.local(), []
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, "inscon-decoder")
        self.description = (
            f"ffcv {importlib.metadata.version('ffcv')}: decode cpu, color on the "
            f"{'host' if finish.host_color else finish.device.type}, {threads} threads, {loader.prefetch} batches ahead, "
            f"{feed.index.path / BETON_NAME}"
        )

    def steps(self):
        begun, coming = deque(), self._steps.start
        for step in self._steps:
            while True:
                while len(begun) <= AHEAD and coming < self._steps.stop:
                    begun.append(self._begin(coming))
                    coming += 1
                doing = f"reading or decoding the samples of step {step}"
                try:
                    with self._clock.at(doing, "wait", waits=True):
                        for future in begun[0].made:
                            future.result()
                    break
                except Refusal as refusal:
                    self._feed.reject(*refusal.args)
                    for other in begun:  # which were laid out for the bad samples known before
                        concurrent.futures.wait(other.made)
                    begun.clear()
                    coming = step
            done = begun.popleft()
            yield done.work, done.slot.hand_out()

    def end(self) -> None:
        """What is being made is finished, what waits is not begun."""
        self._threads.shutdown(cancel_futures=True)
        while self._benches:
            self._benches.pop().close()

    def _begin(self, step: int) -> InWork:
        with self._clock.at(f"planning step {step}", "plan"):
            work = self._feed.work(step)
            if step + 1 < self._steps.stop:
                self._feed.expect(step + 1)
            records = self._feed.index.records(work.sample_ids)
            byte_counts = records["byte_count"].astype(np.int64)
            begun = InWork(work, self._slots.take(), work.rows(), metadata_of(records), byte_counts, [])
        begun.made.extend(self._threads.submit(self._make, begun, chunk) for chunk in self._chunks)
        return begun

    def _make(self, begun: InWork, chunk: np.ndarray) -> None:
        """Run in a thread of the pool: the pictures at these places of the batch. Refusal of the first that cannot be used."""
        bench = getattr(self._mine, "bench", None)
        if bench is None:
            bench = self._mine.bench = Bench()
            self._benches.append(bench)
        start, index, ids = time.perf_counter(), self._feed.index, begun.work.sample_ids
        # Read here, a few at a time, so that they are still in this core's cache when they are decoded.
        sizes = begun.byte_counts[chunk]
        memory = bench.room("stored", int(sizes.sum()))
        places = zip(ids[chunk].tolist(), [0, *np.cumsum(sizes).tolist()])
        stored = [read(index, sample_id, memory[first:]) for sample_id, first in places]
        addresses = np.array([content.ctypes.data for content in stored], np.uint64)
        begun.metadata["f0"]["data_ptr"][chunk] = addresses
        picture = bench.room("picture", 3 * int(begun.work.sizes[chunk].prod(1).max()))
        bench.tools[1] = picture.ctypes.data
        was_read = time.perf_counter()
        memories = begun.rows, begun.slot.places, bench.tools, bench.outcome
        done = self._run(chunk, begun.metadata, (addresses, sizes.astype(np.uint64)), memories)
        self._clock.add("read", was_read - start)
        self._clock.add("decode", time.perf_counter() - was_read)
        outcome, place, height, width = done.tolist()
        if outcome == REFUSED:
            raise undecodable(index, int(ids[place]), bench.refused(), "FFCV's libjpeg-turbo")
        if outcome == WRONG_SIZE:
            wrong_size(index, begun.work, place, np.array([[height, width]]))

"""The open pipeline: batches made ahead by a thread of their own, a bounded queue, an end that leaves nothing behind.

The maker's thread waits for what it makes, disk, decoder or device; the trainer's thread takes finished batches and waits
for nothing else. Each part of the making is timed, and what the thread is at can be told while it hangs.
"""

import atexit
import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator

import torch

from inscon import guard
from inscon.batch import Batch

POLL_S = 0.1
"""How often the maker looks whether it was told to stop, while the queue is full."""
END_S = 60.0
"""How long `close` waits for the maker to finish what it is at."""
READY_S = 1e-3
"""What takes no longer than this to hand out was ready."""


class StageClock:
    """Seconds by stage, told by an engine; a stage that is entered within another stops the outer one's clock."""

    def __init__(self):
        self.doing = "starting"
        """What the pipeline's thread is at, for messages."""
        self.substituted = 0
        """Samples that stood in for bad ones, in the batches made so far."""
        self._stage, self._since = "start", time.perf_counter()
        self._spent: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def at(self, doing: str, stage: str, waits: bool = False):
        """While the block runs, the thread is `doing` this, and its time counts for `stage`; where it `waits` for what others make,
        it is counted whether that was ready."""
        before = self._spent[stage]
        outer = self._switch(doing, stage)
        try:
            yield
        finally:
            self._switch(*outer)
        if waits:
            self.add("waits", 1)
            self.add("late", self._spent[stage] - before > READY_S)

    def _switch(self, doing: str, stage: str) -> tuple[str, str]:
        now, outer = time.perf_counter(), (self.doing, self._stage)
        self.add(self._stage, now - self._since)
        self._since, self.doing, self._stage = now, doing, stage
        return outer

    def add(self, stage: str, seconds: float) -> None:
        """Spent in any thread or process; or so many "images"."""
        with self._lock:
            self._spent[stage] += seconds

    def read(self) -> Counter[str]:
        """What was added since the last reading; a running stage counts when it is over."""
        with self._lock:
            spent, self._spent = self._spent, Counter()
        return spent


class Pipeline(Iterator[Batch], contextlib.AbstractContextManager):
    """Batches of one rank, once through; a context manager that ends the engine.

    Args:
        batches: yields them; closed in the end.
        engine: a `pipelines.feed.Engine`, which makes them and tells `clock` of it; ended in the end.
        depth: batches that wait for the consumer at most, made in a thread, on a side stream where `device` is a GPU. None: made
            in the consumer's thread, when it asks.
        timeout_s: how long the consumer waits for a batch of the thread.

    Raises what `batches` raises, in its turn; MemoryError where memory runs out; TimeoutError, naming the stage, where no batch
    comes.
    """

    def __init__(
        self, batches: Iterator[Batch], engine, clock: StageClock, *, depth: int | None, device: torch.device,
        timeout_s: float,
    ):  # fmt: skip
        self._batches, self._device, self._clock, self._timeout_s = batches, device, clock, timeout_s
        self._engine, self.description, self._closed = engine, engine.description, False
        self._stream = torch.cuda.Stream(device) if depth and device.type == "cuda" else None
        self._queue = None if depth is None else queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inscon-loader", daemon=True)
        self._asked = self._starved = 0
        # For whoever leaves without closing: DALI must not meet threads that still run when the interpreter ends.
        atexit.register(self.close)

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        if self._queue is None:
            return next(self._batches)
        first = self._thread.ident is None
        if first:  # not before, so that an opened pipeline costs nothing yet
            self._thread.start()
        self._asked, self._starved = self._asked + 1, self._starved + self._queue.empty()
        try:
            with guard.say_if_long("the first batch") if first else contextlib.nullcontext():
                item = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"no batch came for {self._timeout_s:.0f} s; the pipeline hangs at: {self._clock.doing}. Look at the disk or "
                "network file system, or set a longer --stall-timeout"
            ) from None
        if isinstance(item, BaseException):
            self._stop.set()
            raise item
        if self._stream is not None:
            # The memory of a batch was taken on the side stream; the allocator must know who reads it.
            for tensor in item.tensors():
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return item

    def read(self) -> dict[str, float]:
        """Since the last reading: milliseconds per source image and stage, those of several threads or processes added up, and how
        often, in percent, a queue was empty when asked; so far: how many samples were substituted. All begin with loader_."""
        if not self._engine.has_stages:
            return {}
        spent = self._clock.read()
        found = {
            f"loader_{name}_ms": 1e3 * spent[name] / max(spent["images"], 1) for name in ("read", "decode", "finish")
        }
        found["loader_substituted"] = float(self._clock.substituted)
        if self._queue is not None:
            asked, starved, self._asked, self._starved = max(self._asked, 1), self._starved, 0, 0
            found["loader_starved_percent"] = 100 * starved / asked
        if spent["waits"]:
            found["loader_graph_starved_percent"] = 100 * spent["late"] / spent["waits"]
        return found | self._engine.figures()

    def close(self) -> None:
        """Stop threads and workers, free buffers; the second call does nothing. RuntimeError, naming the stage, if they hang."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._stop.set()
        deadline = time.monotonic() + END_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._drain()
            self._thread.join(POLL_S)
        if self._thread.is_alive():
            raise RuntimeError(f"the pipeline does not stop, it hangs at: {self._clock.doing}")
        self._drain()
        self._batches.close()
        self._engine.end()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                for batch in self._batches:
                    if self._stream is not None:
                        # Here, not in the trainer's thread: a batch in the queue is finished, and nothing has to be kept for it.
                        done = torch.cuda.Event(blocking=True)  # else this thread would keep a core busy
                        done.record()
                        done.synchronize()
                    if not self._put(batch):
                        return
                    del batch
            self._put(StopIteration())
        except (torch.OutOfMemoryError, MemoryError):
            where, first = (self._device, "--decode cpu, ") if self._stream is not None else ("the host", "")
            self._put(MemoryError(
                f"the pipeline ran out of memory on {where}: set {first}a smaller --prefetch or a smaller --batch-size"
            ))  # fmt: skip
        except BaseException as error:
            self._put(error)

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full), self._clock.at("waiting for the trainer", "wait"):
                self._queue.put(item, timeout=POLL_S)
                return True
        return False

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while self._queue is not None:
                self._queue.get_nowait()

"""Batches made ahead by a thread of their own: a bounded queue, a side stream on a GPU, an end that leaves nothing behind.

The maker's thread waits for what it makes, disk, decoder or device; the trainer's thread takes finished batches and waits
for nothing else. Each part of the making is timed, and what the thread is at can be told while it hangs.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import torch

from inscon.batch import Batch

POLL_S = 0.1
"""How often the maker looks whether it was told to stop, while the queue is full."""
END_S = 60.0
"""How long `close` waits for the maker to finish what it is at."""
_END = object()


class StageClock:
    """Seconds of one thread by stage; a stage that is entered within another stops the outer one's clock."""

    def __init__(self):
        self.doing = "starting"
        """What the thread is at, for messages."""
        self._stage, self._since = "start", time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def at(self, doing: str, stage: str):
        """While the block runs, the thread is `doing` this, and its time counts for `stage`."""
        outer = self._switch(doing, stage)
        try:
            yield
        finally:
            self._switch(*outer)

    def _switch(self, doing: str, stage: str) -> tuple[str, str]:
        now, outer, seconds = time.perf_counter(), (self.doing, self._stage), self._seconds  # which `read` may replace
        seconds[self._stage] = seconds.get(self._stage, 0.0) + now - self._since
        self._since, self.doing, self._stage = now, doing, stage
        return outer

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading. Asked from another thread: a running stage counts when it is over."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class Ahead:
    """An iterator over the batches that `make` yields in a thread of its own, `depth` of them ahead at most.

    Args:
        make: run in the thread, on a side stream where `device` is a GPU; closed in the end.
        clock: what `make` says about its stages.
        timeout_s: how long the consumer waits for a batch.

    Raises what `make` raises, in its turn; TimeoutError, naming the stage, where no batch comes.
    """

    def __init__(self, make: Iterator[Batch], *, depth: int, device: torch.device, clock: StageClock, timeout_s: float):
        self._make, self._device, self._clock, self._timeout_s = make, device, clock, timeout_s
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inscon-loader", daemon=True)
        self._asked = self._starved = 0

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        if self._thread.ident is None:  # with the first batch, so that an opened pipeline costs nothing yet
            self._thread.start()
        self._asked, self._starved = self._asked + 1, self._starved + self._queue.empty()
        try:
            item = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"no batch came for {self._timeout_s:.0f} s; the pipeline hangs at: {self._clock.doing}. Look at the disk or "
                "network file system, or set a longer --stall-timeout"
            ) from None
        if item is _END:
            self._stop.set()
            raise StopIteration
        if isinstance(item, BaseException):
            self._stop.set()
            raise item
        if self._stream is not None:
            _belongs_to(item, torch.cuda.current_stream(self._device))
        return item

    def read(self) -> dict[str, float]:
        """Since the last reading: the share of batches that were not ready when they were asked for."""
        asked, starved, self._asked, self._starved = max(self._asked, 1), self._starved, 0, 0
        return {"loader_starved_percent": 100 * starved / asked}

    def close(self) -> None:
        """Stop the thread and free what it made ahead. RuntimeError, naming the stage, if it does not stop."""
        self._stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            deadline = time.monotonic() + END_S
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._drain()
                self._thread.join(POLL_S)
            if self._thread.is_alive():
                raise RuntimeError(f"the pipeline does not stop, it hangs at: {self._clock.doing}")
        self._drain()
        self._make.close()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                for batch in self._make:
                    if self._stream is not None:
                        # Here, not in the trainer's thread: a batch in the queue is finished, and nothing has to be kept for it.
                        self._stream.synchronize()
                    if not self._put(batch):
                        return
                    del batch
            self._put(_END)
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
            while True:
                self._queue.get_nowait()


def _belongs_to(batch: Batch, stream: torch.cuda.Stream) -> None:
    """The memory of a batch was taken on the side stream; the allocator must know who reads it."""
    for tensor in batch.tensors():
        tensor.record_stream(stream)

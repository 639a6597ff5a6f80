"""A DataLoader's worker processes: waited for with a limit, told of in one sentence when they die, gone with their parent."""

import atexit
import multiprocessing
import queue
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from inscon import guard


def alive(loader: DataLoader, what: str, timeout_s: float, remedy: str) -> Iterator:
    """What the workers of `loader` made, in order; the workers end with this generator.

    `loader` has `worker_init` and a `multiprocessing_context` other than fork, or no workers. Sentences call it `what`, "the
    pipeline reference", and advise `remedy`, what takes less memory, "fewer --threads".

    Raises ChildProcessError where a worker died, TimeoutError where no item comes for `timeout_s`, MemoryError where shared memory
    has no room.
    """
    if not loader.num_workers:
        yield from loader
        return
    # A death would be raised between any two lines here (SIGCHLD) if the workers were children of this very process.
    assert loader.multiprocessing_context.get_start_method() != "fork"
    others = multiprocessing.active_children()
    try:
        iterator = _start(loader)
    except (EOFError, OSError) as error:
        raise _sentence(error, what, remedy) from None
    processes = [process for process in multiprocessing.active_children() if process not in others]
    asked, made = queue.SimpleQueue(), queue.SimpleQueue()
    # In a thread, since a worker that dies or stops while it hands something over keeps the receiver for ever.
    threading.Thread(target=_fetch, args=(iterator, asked, made), name="inscon-workers", daemon=True).start()
    del iterator  # the thread ends it, which may hang likewise

    def end() -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(10)

    atexit.register(end)  # before multiprocessing's own, which waits for them
    try:
        while True:
            asked.put(True)
            item, error = _wait(made, processes, what, timeout_s)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise _sentence(error, what, remedy)
            yield item
            del item  # or its shared memory stays while the next one is waited for
    finally:
        end()
        atexit.unregister(end)
        asked.put(False)


def worker_init(*_: object) -> None:
    """A DataLoader's `worker_init_fn`: the worker ends with its parent, and only so; signals reach every process of a job, and the
    parent still wants its last step."""
    guard.ignore_stops()
    guard.end_with_parent()


def shared(item):
    """A DataLoader's `collate_fn`: the tensors of `item` in shared memory, moved now, where a lack of it can be told; a thread of
    the DataLoader's own would drop what finds no room, and the parent wait."""
    if torch.utils.data.get_worker_info() is None:
        return item
    return tree_map_only(torch.Tensor, torch.Tensor.share_memory_, item)


def _start(loader: DataLoader) -> Iterator:
    """`iter(loader)`, with a fork server that none of `guard.STOPS` ends either: it inherits what is blocked here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, guard.STOPS)
    try:
        resource_tracker.ensure_running()  # which inherits that too, and unblocks two of them when it has started
        signal.pthread_sigmask(signal.SIG_BLOCK, guard.STOPS)
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _fetch(iterator: Iterator, asked: queue.SimpleQueue, made: queue.SimpleQueue) -> None:
    while asked.get():
        try:
            made.put((next(iterator), None))
        except BaseException as error:
            made.put((None, error))


def _wait(made: queue.SimpleQueue, processes: list, what: str, timeout_s: float) -> tuple:
    """The next item and its error; EOFError of a worker that is gone."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return made.get(timeout=max(min(1.0, deadline - time.monotonic()), 0))
        except queue.Empty:
            if not all(process.is_alive() for process in processes):
                return None, EOFError()
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"no batch came for {timeout_s:.0f} s from {what}, whose worker processes hang. Look at the disk or network "
                    f"file system and at shared memory ({_room()}), or set a longer --stall-timeout"
                ) from None


def _sentence(error: BaseException, what: str, remedy: str) -> BaseException:
    """For what the death of a worker, or full shared memory, looks like from here; else the error itself."""
    told = str(error)
    if isinstance(error, (RuntimeError, OSError)) and "shared memory" in told:
        return MemoryError(
            f"{what} found no room for a batch in shared memory ({_room()}), where worker processes hand it over: make it larger "
            f"(docker run --shm-size=8g), or set {remedy}"
        )
    died = isinstance(error, RuntimeError) and ("exited unexpectedly" in told or "DataLoader worker (pid" in told)
    if died or isinstance(error, (EOFError, ConnectionError, FileNotFoundError)):
        return ChildProcessError(
            f"a worker process of {what} died, killed or out of memory ({_room()}): run again, with {remedy} or docker's "
            "--shm-size=8g if memory was short"
        )
    return error


def _room() -> str:
    """State of the shared memory."""
    usage = shutil.disk_usage("/dev/shm")
    return f"/dev/shm has {usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free"

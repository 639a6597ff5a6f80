"""Worker processes of the reference: waited for with a limit, told of in one sentence when they die, gone with their parent."""

import atexit
import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback
from multiprocessing.process import BaseProcess

from inscon import guard


def made_by_workers(make: Callable, items: Sequence, workers: int, timeout_s: float) -> Iterator:
    """`make(item)` of each, in order; a worker makes every n-th and is one ahead. They end with this generator.

    Raises what `make` raises, ChildProcessError where a worker died, TimeoutError where nothing comes for `timeout_s`.
    """
    pool = []

    def end() -> None:
        for process, _ in pool:
            process.kill()
        for process, pipe in pool:
            process.join(10)
            pipe.close()

    atexit.register(end)  # before multiprocessing's own, which waits for them
    try:
        for number in range(workers):
            pool.append(_start(make, items[number::workers]))
        for (_, pipe), _ in zip(itertools.cycle(pool), items):
            made, error = _received(pipe, timeout_s)
            if error is not None:
                raise error
            yield made
    finally:
        end()
        atexit.unregister(end)


def _received(pipe: Connection, timeout_s: float) -> tuple:
    try:
        if pipe.poll(timeout_s):
            return pipe.recv()
    except (EOFError, OSError):  # at the end of a message, and within one
        raise ChildProcessError(
            "a worker process of the pipeline reference died, killed or out of memory: run again, with fewer --threads (0: no "
            "workers) if memory was short"
        ) from None
    raise TimeoutError(
        f"no batch came for {timeout_s:.0f} s from the pipeline reference, whose worker processes hang. Look at the disk or "
        "network file system, or set a longer --stall-timeout"
    )


def _start(make: Callable, items: Sequence) -> tuple[BaseProcess, Connection]:
    """A worker and what it makes, through a pipe of its own: where it dies while it hands over, the pipe ends. Neither it nor the
    fork server is ended by any of `guard.STOPS`: they inherit what is blocked here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, guard.STOPS)
    try:
        resource_tracker.ensure_running()  # which inherits that too, and unblocks two of them when it has started
        signal.pthread_sigmask(signal.SIG_BLOCK, guard.STOPS)
        # Forked from a clean server, not from this process: a fork beside DALI's or OpenMP's threads can hang.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipelines.reference"])
        pipe, end_of_worker = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(end_of_worker, make, items))
        process.start()
        end_of_worker.close()
        return process, pipe
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, make: Callable, items: Sequence) -> None:
    """In the worker, which ends with its parent, and only so: signals reach every process of a job, and the parent still wants its
    last step."""
    guard.ignore_stops()
    guard.end_with_parent()
    with contextlib.suppress(ConnectionError):  # the parent is gone
        for item in items:
            try:
                made = make(item), None
            except Exception as error:
                made = None, ExceptionWithTraceback(error, error.__traceback__)
            pipe.send(made)

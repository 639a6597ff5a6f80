"""Shards packed by several processes, or by this one. What dies or fails ends the run in one sentence."""

import contextlib
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path

from data_prep.job import Job, PackingStopped, Progressed, ShardPacker
from data_prep.reading import Reader


def work_here(job: Job, numbers: Iterable[int], tell: Callable[[Progressed], None]) -> None:
    """Pack these shards one after the other; while one is brought to the disk, the next is begun."""
    with contextlib.closing(Reader(job.listing)) as reader, ThreadPoolExecutor(1) as disk:
        finishing = None
        for number in numbers:
            packer = ShardPacker(job, reader, number)
            try:
                for progressed in packer.steps():
                    tell(progressed)
                if finishing is not None:
                    finishing.result()
            except BaseException:
                packer.discard()
                raise
            finishing = disk.submit(packer.finish)
        if finishing is not None:
            finishing.result()


def work_in_processes(job: Job, todo: list[int], workers: int, tell: Callable[[Progressed], None]) -> None:
    """Hand the shards out, one at a time to each worker. A worker that dies or fails ends the run in one sentence."""
    context = multiprocessing.get_context("spawn")  # forking beside threads (rich has one) may hang
    waiting, processes = deque(todo), {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, job.out), daemon=True)
            process.start()
            theirs.close()  # so that a worker that dies ends `recv`
            processes[ours] = process
        at_work = dict.fromkeys(processes)
        while at_work:
            for connection in wait(at_work):
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise PackingStopped(_death(processes[connection])) from None
                if kind == "progressed":
                    tell(value)
                elif kind == "stopped":
                    raise PackingStopped(value)
                elif kind == "crashed":
                    raise RuntimeError(f"a worker of data_prep/packing.py failed; this is its traceback:\n{value}")
                elif kind == "ready":
                    connection.send(waiting.popleft() if waiting else None)
                else:
                    del at_work[connection]
    finally:
        for connection in processes:
            connection.close()  # a worker sees it within a picture, and leaves nothing
        for process in processes.values():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _death(process: multiprocessing.Process) -> str:
    process.join(5)
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    return (
        f"A worker process {how} while it was packing: run the same command again, it goes on with the shards that are "
        "missing (with fewer --workers, if memory ran out)."
    )


def _worker(connection: Connection, out: Path) -> None:
    """A process that packs the shards whose numbers it is sent, until it is sent None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others

    def numbers() -> Iterator[int]:
        while True:
            connection.send(("ready", None))
            number = connection.recv()
            if number is None:
                return
            yield number

    def tell(progressed: Progressed) -> None:
        connection.send(("progressed", progressed))
        if connection.poll():  # nothing is sent during a shard: the other end is gone
            raise EOFError

    try:
        work_here(Job.open(out), numbers(), tell)
        message = "done", None
    except (EOFError, ConnectionError):
        return
    except ValueError as error:
        message = "stopped", str(error)
    except BaseException:
        message = "crashed", traceback.format_exc()
    with contextlib.suppress(ConnectionError):
        connection.send(message)

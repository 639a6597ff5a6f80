"""Shards packed by several processes, or by this one. What dies or fails ends the run in one sentence."""

import contextlib
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from data_prep.job import Job, PackingStopped, Progressed, pack_shard
from data_prep.reading import Reader


def work_here(job: Job, todo: list[int], tell: Callable[[Progressed], None]) -> None:
    with contextlib.closing(Reader(job.listing)) as reader:
        for number in todo:
            with contextlib.closing(pack_shard(job, reader, number)) as steps:
                for progressed in steps:
                    tell(progressed)


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
            ours.send(waiting.popleft())
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
                elif waiting:
                    connection.send(waiting.popleft())
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
    """A process that packs the shards whose numbers it is sent, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
    try:
        job = Job.open(out)
        with contextlib.closing(Reader(job.listing)) as reader:
            while True:
                number = connection.recv()
                with contextlib.closing(pack_shard(job, reader, number)) as steps:
                    for progressed in steps:
                        connection.send(("progressed", progressed))
                        if connection.poll():  # nothing is sent during a shard: the other end is gone
                            return
                connection.send(("done", number))
    except (EOFError, ConnectionError):
        return
    except ValueError as error:
        message = "stopped", str(error)
    except BaseException:
        message = "crashed", traceback.format_exc()
    with contextlib.suppress(ConnectionError):
        connection.send(message)

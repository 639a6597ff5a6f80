"""One writer per packed set, or one per rank: advisory locks that end with the process that holds them."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.index import ShardError

_WAIT_S = 10.0
"""Long enough for the last processes of a killed run to end."""


@contextlib.contextmanager
def only_writer(state: Path, rank: int, world_size: int) -> Iterator[None]:
    """Holds OUT against other runs. ShardError where another process packs into it (`state` is OUT/packing)."""
    with contextlib.ExitStack() as locks:
        alone = world_size == 1
        _lock(locks, state / "set.lock", fcntl.LOCK_EX if alone else fcntl.LOCK_SH, state.parent)
        _lock(locks, state / f"rank-{rank}.lock", fcntl.LOCK_EX, state.parent)
        yield


def _lock(locks: contextlib.ExitStack, path: Path, kind: int, out: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            if time.monotonic() > deadline:
                raise ShardError(
                    f"Another process is packing into {out} ({holder}): wait until it ends, or give another --out."
                ) from None
            time.sleep(0.1)
            continue
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            locks.callback(file.close)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return
        file.close()  # the former holder removed it with everything else
        path.parent.mkdir(parents=True, exist_ok=True)


def is_held(path: Path) -> bool:
    """Whether a running process holds this lock."""
    with contextlib.suppress(FileNotFoundError), path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

"""One writer per packed set, or one per rank: advisory locks that end with the process that holds them."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from data_prep.index import ShardError
from inscon.guard import take_lock

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
    file = take_lock(path, kind, _WAIT_S)
    if isinstance(file, str):
        raise ShardError(f"Another process is packing into {out} ({file}): wait until it ends, or give another --out.")
    locks.callback(file.close)


def is_held(path: Path) -> bool:
    """Whether a running process holds this lock."""
    with contextlib.suppress(FileNotFoundError), path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

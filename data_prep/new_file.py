"""Files that appear under their name only when they are whole, with their checksum."""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path

import xxhash

from data_prep.index import PARTIAL_SUFFIX, StoredFile

_LOCK_WAIT_S = 30.0
_BUFFER = 1 << 20


class CannotWrite(ValueError):
    """A file that cannot be written: disk full, no permission, somebody else writing it."""


class NewFile:
    """A file being written under a temporary name, hashed on the way; locked, so that no two processes write it.

        with NewFile(path) as file:
            file.write(b"...")
            stored = file.commit(sample_count=1)

    Left without `commit` it is taken away. Raises CannotWrite, one sentence with the remedy.
    """

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """`keep`: go on after this many bytes of what an earlier run left, instead of beginning anew."""
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        try:
            self._file = _open_locked(self._partial)
            self._hash = xxhash.xxh3_128()
            self._file.seek(0)
            for start in range(0, keep, _BUFFER):
                self._hash.update(self._file.read(min(_BUFFER, keep - start)))
            self._file.seek(keep)
            self._file.truncate()
        except OSError as error:
            raise self._cannot(error) from None
        self.byte_count = keep
        self._open = True

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        self.byte_count += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            raise self._cannot(error) from None

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot(error) from None

    def commit(self, sample_count: int) -> StoredFile:
        """Give it its final name, once it is on the disk."""
        self.sync()
        try:
            os.replace(self._partial, self.path)
        except OSError as error:
            raise self._cannot(error) from None
        self._open = False
        self._file.close()
        return StoredFile(
            name=self.path.name,
            byte_count=self.byte_count,
            sample_count=sample_count,
            checksum=self._hash.hexdigest(),
        )

    def discard(self) -> None:
        """Take it away, unless it is committed."""
        if not self._open:
            return
        self._open = False
        self._partial.unlink(missing_ok=True)  # before the lock goes
        self._close_quietly()

    def leave(self) -> None:
        """Close it unfinished, for a later run to go on with `keep`."""
        self._open = False
        self._close_quietly()

    def _close_quietly(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk, closing fails again at what is still buffered
            self._file.close()

    def _cannot(self, error: OSError) -> CannotWrite:
        folder = self.path.parent
        free = f", {shutil.disk_usage(folder).free / 1e6:.0f} MB free" if folder.is_dir() else ""
        return CannotWrite(
            f"{self.path} cannot be written ({error.strerror or error}{free}): see to that and run the same command again, "
            "it goes on where it stopped."
        )


def _open_locked(partial: Path):
    """The partial file, with the only lock on it. A killed run's last process may hold it for a moment."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        # Buffered by ourselves in big pieces, and open for reading too, for `keep`.
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", _BUFFER)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former holder may have renamed or removed the file while we waited: then ours is not the one there.
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise OSError(None, "another process is writing it") from None
            time.sleep(0.05)
        file.close()

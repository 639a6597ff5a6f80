"""Files that appear under their name only when they are whole, with their checksum."""

import fcntl
import os
import shutil
import time
from pathlib import Path

import xxhash

from data_prep.index import PARTIAL_SUFFIX, StoredFile

_LOCK_WAIT_S = 30.0
_PIECE = 1 << 20


class CannotWrite(ValueError):
    """A file that cannot be written: disk full, no permission, somebody else writing it."""


class NewFile:
    """A file being written under a temporary name, hashed on the way; locked, so that no two processes write it.

        with NewFile(path) as file:
            file.write(b"...")
            stored = file.commit(sample_count=1)

    Left without `commit` it is taken away. Raises CannotWrite, one sentence with the remedy.
    """

    def __init__(self, path: Path) -> None:
        self._begin(path, 0)
        self._hash = xxhash.xxh3_128()

    def _begin(self, path: Path, keep: int) -> None:
        self.path, self.byte_count = path, keep
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        try:
            self._file = _open_locked(self._partial)
            self._file.truncate(keep)
            self._file.seek(keep)
        except OSError as error:
            raise self._cannot(error) from None
        self._open = True

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: bytes | memoryview) -> int:
        """Append; the number of bytes, as `np.lib.format` wants it."""
        self._hash.update(data)
        self._append(data)
        return len(data)

    def _append(self, data: bytes | memoryview) -> None:
        self.byte_count += len(data)
        rest = memoryview(data)
        try:
            while rest:  # a disk that fills up takes a part first
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._cannot(error) from None

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot(error) from None

    def commit(self, sample_count: int, *, durable: bool = True) -> StoredFile:
        """Give it its final name; if `durable`, once it is on the disk, so that a power cut leaves it whole."""
        if durable:
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
        self._file.close()

    def _cannot(self, error: OSError) -> CannotWrite:
        folder = self.path.parent
        free = f", {shutil.disk_usage(folder).free / 1e6:.0f} MB free" if folder.is_dir() else ""
        return CannotWrite(
            f"{self.path} cannot be written ({error.strerror or error}{free}): see to that and run the same command again, "
            "it goes on where it stopped."
        )


class KeptFile(NewFile):
    """A file that is written by several runs, if need be: left without `commit` it stays as it is, for the next one.

    Its beginning may be written last, so it is hashed when it is whole, from the disk.
    """

    def __init__(self, path: Path, *, keep: int) -> None:
        """Go on after the first `keep` bytes; where there are fewer, zeros stand for the others."""
        self._begin(path, keep)

    def write(self, data: bytes | memoryview) -> int:
        self._append(data)
        return len(data)

    def write_at(self, position: int, data: bytes) -> None:
        """Write over what lies there."""
        try:
            self._file.seek(position)
            self._append(data)
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._cannot(error) from None
        self.byte_count -= len(data)

    def commit(self, sample_count: int) -> StoredFile:
        self.sync()
        self._hash = xxhash.xxh3_128()
        self._file.seek(0)
        while piece := self._file.read(_PIECE):
            self._hash.update(piece)
        return super().commit(sample_count)

    def discard(self) -> None:
        """Close it, unless it is committed."""
        if self._open:
            self._open = False
            self._file.close()


def _open_locked(partial: Path):
    """The partial file, with the only lock on it. A killed run's last process may hold it for a moment."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        # Unbuffered, for what is written comes in big pieces; open for reading too, for `keep`.
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0)
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

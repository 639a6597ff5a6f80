"""The bytes of listed pictures: of files, and of the members of tars where they lie."""

import errno
import io
import os
import stat
import threading

from data_prep.index import BEGIN_ANEW
from data_prep.listing import NOT_IN_A_TAR, Entry, Listing, as_bytes, as_text

NOT_REGULAR = "not a regular file"
UNREADABLE = "unreadable"
_MAX_OPEN_TARS = 64
_GONE = {errno.ENOENT, errno.ENOTDIR}
OUT_OF_REACH = {
    *(errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
"""What a network file system or a disk says that is not there any more."""
_OUR_OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Unreadable(Exception):
    """A picture that cannot be read and is left out. The message is the whole reason, "unreadable: Permission denied"."""

    @property
    def kind(self) -> str:
        """What to count it as: the reason without its details."""
        return str(self).partition(":")[0]


class SourceVanished(ValueError):
    """The source is not there any more, or is another one: no reason to leave out its pictures, but to stop."""


class Reader:
    """Reads the pictures of a listing. May be pickled, and used by several threads. Checksums are the caller's to check."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._root = os.fsencode(listing.root)
        self._tars: dict[int, _OpenTar] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return Reader, (self._listing,)

    def read(self, entry: Entry) -> bytes:
        """The picture's bytes; of a file of its own, what there is now, whatever was listed.

        Raises Unreadable where the picture is to be left out, SourceVanished where packing is to stop.
        """
        if entry.fault:
            raise Unreadable(entry.fault)
        if entry.container == NOT_IN_A_TAR:
            return self._read_file(entry)
        return self._read_member(entry)

    def close(self) -> None:
        with self._lock:
            self._tars.clear()

    def _read_file(self, entry: Entry) -> bytes:
        path = os.path.join(self._root, as_bytes(entry.name))
        try:
            with open_regular(path) as file:
                return file.read()
        except _NotRegular:
            raise Unreadable(NOT_REGULAR) from None
        except OSError as error:
            raise _fault_of_reading(path, error, stops=_GONE | OUT_OF_REACH) from None

    def _read_member(self, entry: Entry) -> bytes:
        tar = self._tar(entry.container)
        parts, position, end = [], entry.offset, entry.offset + entry.byte_count
        while position < end:
            try:
                parts.append(os.pread(tar.file.fileno(), end - position, position))
            except OSError as error:
                raise _fault_of_reading(tar.path, error, stops=OUT_OF_REACH) from None
            if not parts[-1]:
                raise _vanished(tar.path, f"it ends at byte {position}, within {entry.name}")
            position += len(parts[-1])
        return b"".join(parts)

    def _tar(self, container: int) -> "_OpenTar":
        with self._lock:
            tar = self._tars.pop(container, None)
            if tar is None:
                if len(self._tars) == _MAX_OPEN_TARS:
                    # The one that was not used for longest. A thread that is just reading it keeps it open.
                    del self._tars[next(iter(self._tars))]
                path = os.path.join(self._root, as_bytes(self._listing.containers[container]))
                tar = _OpenTar(path, self._listing.container_bytes[container])
            self._tars[container] = tar
            return tar


class _OpenTar:
    """A tar, open as long as somebody holds this."""

    def __init__(self, path: bytes, byte_count: int) -> None:
        self.path = path
        try:
            self.file = open_regular(path)
        except OSError as error:
            if error.errno in _OUR_OWN_TROUBLE:
                raise
            raise _vanished(path, error.strerror) from None
        found = os.fstat(self.file.fileno()).st_size
        if found != byte_count:
            raise _vanished(path, f"it is {found} bytes long where it was {byte_count}")

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


class _NotRegular(OSError):
    """Something other than a file: opened, but not read."""


def open_regular(path: bytes) -> io.FileIO:
    """A file, open for reading, unbuffered. A pipe or device by that name would make us wait for ever, so O_NONBLOCK."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _NotRegular(errno.EINVAL, NOT_REGULAR)
    return io.FileIO(descriptor)


def _fault_of_reading(path: bytes, error: OSError, *, stops: set[int]) -> Exception:
    if error.errno in _OUR_OWN_TROUBLE:
        return error  # says nothing about the picture
    return _vanished(path, error.strerror) if error.errno in stops else Unreadable(f"{UNREADABLE}: {error.strerror}")


def _vanished(path: bytes, reason: str) -> SourceVanished:
    return SourceVanished(
        f"{as_text(path)} was there when the pictures were listed and cannot be read now ({reason}): mount or restore the "
        f"source and run the same command again, or {BEGIN_ANEW} to list anew."
    )

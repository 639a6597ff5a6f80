"""A packed set read plainly, file by file, whatever they hold; and what is found wrong in one."""

import contextlib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.index import (
    BETON_NAME,
    MANIFEST_NAME,
    RECORD_DTYPE,
    REPAIR,
    Manifest,
    ShardError,
    StoredFile,
    folder_of_beton,
)

PIECE_BYTES = 1 << 22
RECORDS_AT_A_TIME = 1 << 16
_LISTED_PER_FILE = 20
_MAX_NAME_BYTES = 1 << 13


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a packed set is not what it should be."""

    file: str
    sentence: str
    """What is wrong, to be read after the file's name; empty where this stands for `places` that are not listed."""
    sample_id: int | None = None
    offset: int | None = None
    """Of the first byte that differs; where only a checksum tells, of the first that may."""
    places: int = 1

    def __str__(self) -> str:
        return f"{self.file} {self.sentence}" if self.sentence else f"... and {self.places:,} more in {self.file}"


def capped(findings: Iterable[Finding]) -> list[Finding]:
    """The first 20 of each file, and one Finding that counts the others. May be applied to its own results."""
    listed, others = defaultdict(list), Counter()
    for finding in findings:
        of_file = listed[finding.file]
        if finding.sentence and len(of_file) < _LISTED_PER_FILE:
            of_file.append(finding)
        else:
            others[finding.file] += finding.places
    rest = {file: [Finding(file, "", places=count)] for file, count in others.items()}
    return [finding for file, some in listed.items() for finding in some + rest.get(file, [])]


class PlainFile:
    """A file read from its beginning to its end, and hashed on the way.

    Not mapped: a process dies where a file that it mapped is cut short.
    """

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        self._file, self._hash = open_plainly(path, PIECE_BYTES), xxhash.xxh3_128()
        self._tell, self._told, self.position = tell, 0, 0

    def __enter__(self) -> "PlainFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, byte_count: int) -> bytes:
        """The next bytes. EOFError where the file ends before."""
        content = self._file.read(byte_count)
        self._hash.update(content)
        self.position += len(content)
        if self.position - self._told >= PIECE_BYTES:
            self._tell(self.position - self._told)
            self._told = self.position
        if len(content) < byte_count:
            raise EOFError
        return content

    def skip_to(self, position: int) -> None:
        """Leave out what cannot be read, with which the checksum is lost."""
        self._file.seek(position)
        self.position = position

    def checksum(self) -> str:
        """XXH3-128 of the whole file, of which the rest is read for it."""
        with contextlib.suppress(EOFError):
            while True:
                self.read(PIECE_BYTES)
        self._tell(self.position - self._told)
        return self._hash.hexdigest()


class PlainRecords:
    """The records of the index, some at a time; none where its header cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path, self._start, self._count = path, 0, 0
        with contextlib.suppress(Exception), open_plainly(path) as file:  # NumPy has several for damage
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
            if dtype == RECORD_DTYPE:
                self._count = min(shape[0], (os.fstat(file.fileno()).st_size - self._start) // RECORD_DTYPE.itemsize)

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, stop: int) -> NDArray[np.void]:
        wanted = (stop - first) * RECORD_DTYPE.itemsize
        content = read_at(self._path, self._start + first * RECORD_DTYPE.itemsize, wanted) if wanted else b""
        if len(content) < wanted:
            raise OSError(None, f"{self._path} was cut short meanwhile")
        return np.frombuffer(content, RECORD_DTYPE)

    def slices(self, first: int, stop: int) -> Iterator[tuple[int, NDArray[np.void]]]:
        """(id of the first, records) of samples `first` to `stop` - 1."""
        for start in range(first, stop, RECORDS_AT_A_TIME):
            yield start, self.read(start, min(start + RECORDS_AT_A_TIME, stop))


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder of a packed set, given as itself or by the beton in it."""
    folder = Path(path)
    return folder_of_beton(folder) if folder.suffix == ".beton" and not folder.is_dir() else folder


def read_at(path: Path, position: int, length: int) -> bytes:
    """As many of these bytes as there are."""
    with open_plainly(path) as file:
        file.seek(position)
        return file.read(length)


def open_plainly(path: Path, buffering: int = -1) -> BinaryIO:
    """Open for reading; without waiting where it is a pipe, which nobody may ever write to."""
    return open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


class PlainSet:
    """A packed set whose files may be anything; its manifest can be read."""

    def __init__(self, folder: Path, tell: Callable[..., None] = lambda *_: None) -> None:
        """`tell` is called with each number of bytes read, and with the number of pictures decoded."""
        self.folder, self.tell = folder, tell
        self.manifest = Manifest.read(folder)
        self._check_manifest()
        self.records = PlainRecords(folder / self.manifest.index.name)
        self.firsts = np.cumsum([0, *(shard.sample_count for shard in self.manifest.shards)])
        """Sample id of each shard's first sample; and the number of all."""

    @property
    def files(self) -> list[StoredFile]:
        manifest = self.manifest
        lists = [manifest.index, manifest.names, manifest.rejected_list, manifest.changed_list]
        return [*lists, *manifest.shards, *manifest.dali_indices]

    @property
    def is_indexed(self) -> bool:
        """Whether there is a record of every sample; where not, checksums of whole files have to do."""
        return len(self.records) == self.manifest.num_samples == self.firsts[-1] > 0

    def open(self, stored: StoredFile) -> PlainFile:
        return PlainFile(self.folder / stored.name, self.tell)

    def named(self, sample_id: int) -> str:
        """For messages: "sample 17 (n01440764/x.JPEG)", with as much as can be read."""
        with contextlib.suppress(OSError, OverflowError):
            offset = int(self.records.read(sample_id, sample_id + 1)["name_offset"][0])
            name = read_at(self.folder / self.manifest.names.name, offset, _MAX_NAME_BYTES).partition(b"\n")[0]
            return f"sample {sample_id} ({name.decode('utf-8', 'surrogateescape')})"
        return f"sample {sample_id}"

    def _check_manifest(self) -> None:
        """ShardError where no check could work with what it says."""
        path, container = self.folder / MANIFEST_NAME, self.manifest.container
        for stored, field in itertools.product(self.files, fields(StoredFile)):
            value = getattr(stored, field.name)
            if type(value) is not field.type or (field.type is int and value < 0):
                raise ShardError(f"{path} says {field.name} {value!r} of a file: {REPAIR}.")
        pattern = {"tar": r"shard-\d{6,}\.tar", "beton": re.escape(BETON_NAME)}.get(container)
        for shard in self.manifest.shards:
            if pattern is None or not re.fullmatch(pattern, shard.name):
                raise ShardError(f"{path} says container {container!r} of {shard.name}: {REPAIR}.")

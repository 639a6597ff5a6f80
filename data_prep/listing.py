"""The list of a data set's pictures, on disk: which there are, in which order, and where each one lies.

    records        one fixed-size record per picture
    names          the pictures' names, one after the other without anything between, for a name may hold line breaks
    listing.json   what holds for all of them; written last, so a listing that has one is complete

A record takes 46 bytes and its name as many as it has: about 1e8 bytes for ImageNet, 25 GB for 300 million pictures.
Neither writing nor reading one takes memory that grows with their number: records are read one by one, not mapped, and
sorted by runs that lie on disk. What is kept in memory are the names of the classes and of the tars.

To read one:    listing = Listing.open(folder); listing.entry(17)
To write one:   `ListingWriter`, which is what data_prep/sources.py does.
"""

import heapq
import json
import os
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.index import BEGIN_ANEW, NO_LABEL
from data_prep.new_file import NewFile

NOT_IN_A_TAR = 2**32 - 1
"""The container of a picture that is a file of its own."""
LINE_BREAK = "line break in the name"
MAX_PICTURE_BYTES = 2**30
"""A picture is in memory whole. The largest one that Pillow consents to decode is as long as this when uncompressed."""

_VERSION = 2
_RECORDS_NAME, _NAMES_NAME, _JSON_NAME = "records", "names", "listing.json"
# Big-endian, so that equal names are sorted by their place in the tars: bytes then compare as the numbers do.
_PICTURE = struct.Struct(">IQQQiH")  # container, offset, byte_count, checksum, class number, fault number
_RECORD = struct.Struct(">QIIQQQiH")  # position and length of the name, and a _PICTURE
_KEY_LENGTH = struct.Struct(">I")
_RUN_LENGTH = 20_000  # about 6 MB
_MAX_RUNS = 64  # 64 * 64 * 20,000 pictures are merged in two steps; each run is an open file
_SPILL_BUFFER = 1 << 14
_PROGRESS_EVERY = 1000
_EXTENSION = re.compile(rb"\.[a-z][a-z0-9_~-]{0,9}")
_MAX_KINDS, _SHOWN_KINDS = 1000, 8


class Entry(NamedTuple):
    """One picture of a source."""

    name: str
    """Path relative to the source's root, with forward slashes; UTF-8, undecodable bytes kept by surrogateescape."""
    label: int
    """Position in the listing's class names, or NO_LABEL."""
    container: int
    """Position in the listing's containers of the tar that holds it, or NOT_IN_A_TAR."""
    offset: int
    """Of its first byte in the container; 0 for a file."""
    byte_count: int
    """When it was listed; 0 where that could not be found out."""
    checksum: int
    """XXH3-64 of its bytes where the source knows it, else 0."""
    fault: str
    """Why it cannot be read, where that was seen when it was listed; else empty."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Listing:
    """The pictures of a source. Make one with `Listing.open`; it may be pickled and used by several threads."""

    folder: Path
    """Where the listing lies."""
    kind: str
    """What the source is: "folder", "list", "tar" or "packed"."""
    root: Path
    """What names and containers are relative to; absolute."""
    class_names: tuple[str, ...]
    """In label order; empty where the pictures have no labels."""
    containers: tuple[str, ...]
    """The tars, or shards, that hold the pictures."""
    container_bytes: tuple[int, ...]
    """How long each of them was when it was listed."""
    total_bytes: int
    """Of all pictures."""
    ignored: Mapping[str, int]
    """How many files were passed over as no pictures, by kind, such as ".txt"."""
    keep_order: bool
    """True for a packed set: it is shuffled already."""
    source_seed: int | None
    """What a packed set was shuffled with."""
    _count: int
    _labels: tuple[int, ...]  # by class number: classes are numbered as they are met, labels are known at the end
    _faults: tuple[str, ...]
    _records: BinaryIO
    _names: BinaryIO

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Listing":
        """ValueError, with the remedy, for a listing that is not whole or of another version."""
        folder = Path(folder).absolute()
        path, remedy = folder / _JSON_NAME, f"{BEGIN_ANEW} to list the pictures anew."
        try:
            facts = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); the listing is not whole: {remedy}") from None
        if facts.get("version") != _VERSION:
            raise ValueError(f"{path} was written by another version of this program: {remedy}")
        for name, byte_count in {
            _RECORDS_NAME: facts["count"] * _RECORD.size,
            _NAMES_NAME: facts["name_bytes"],
        }.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found != byte_count:
                raise ValueError(f"{folder / name} is {found} bytes long where it should be {byte_count}: {remedy}")
        return cls(
            folder=folder,
            kind=facts["kind"],
            root=Path(os.fsdecode(as_bytes(facts["root"]))),
            class_names=tuple(facts["class_names"]),
            containers=tuple(facts["containers"]),
            container_bytes=tuple(facts["container_bytes"]),
            total_bytes=facts["total_bytes"],
            ignored=facts["ignored"],
            keep_order=facts["keep_order"],
            source_seed=facts["source_seed"],
            _count=facts["count"],
            _labels=tuple(facts["labels"]),
            _faults=tuple(facts["faults"]),
            _records=(folder / _RECORDS_NAME).open("rb", buffering=0),
            _names=(folder / _NAMES_NAME).open("rb", buffering=0),
        )

    def __reduce__(self):
        return Listing.open, (self.folder,)

    def __len__(self) -> int:
        return self._count

    def entry(self, position: int) -> Entry:
        """The picture at `position`, from 0. ValueError out of range."""
        if not 0 <= position < self._count:
            raise ValueError(f"Positions must be from 0 to {self._count - 1}. Found: {position}.")
        record = os.pread(self._records.fileno(), _RECORD.size, position * _RECORD.size)
        start, length, container, offset, byte_count, checksum, number, fault = _RECORD.unpack(record)
        name = as_text(os.pread(self._names.fileno(), length, start))
        label = NO_LABEL if number == NO_LABEL else self._labels[number]
        return Entry(name, label, container, offset, byte_count, checksum, self._faults[fault])

    def close(self) -> None:
        self._records.close()
        self._names.close()


class ListingWriter:
    """Writes a listing, one picture after the other.

        with ListingWriter(folder, on_progress) as writer:
            writer.add(b"n01440764/x.JPEG", sort_under=b"n01440764", class_number=0, byte_count=110_000)
            listing = writer.finish(kind="folder", root=root, class_names=["n01440764"], labels=[0])

    Left without `finish`, it takes away what it wrote.
    """

    def __init__(self, folder: str | os.PathLike[str], on_progress: Callable[[int], None]) -> None:
        """`folder` is made if need be; a listing in it is replaced. `on_progress` is told how many pictures there are."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _JSON_NAME).unlink(missing_ok=True)
        self._count = self._total_bytes = 0
        self._on_progress = on_progress
        self._faults = {"": 0}
        self._ignored = Counter()
        self._records = NewFile(self.folder / _RECORDS_NAME)
        self._names = NewFile(self.folder / _NAMES_NAME)
        self._sorter = _Sorter(self.folder)

    def __enter__(self) -> "ListingWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._records.discard()
        self._names.discard()
        self._sorter.close()

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        name: bytes,
        *,
        sort_under: bytes | None = None,
        class_number: int = NO_LABEL,
        container: int = NOT_IN_A_TAR,
        offset: int = 0,
        byte_count: int,
        checksum: int = 0,
        fault: str = "",
    ) -> None:
        """Add a picture. Without `sort_under` it follows the one before; with it, pictures end up in the order of
        (sort_under, name, place in the tars), compared as bytes."""
        if b"\n" in name:
            fault = LINE_BREAK
        elif byte_count > MAX_PICTURE_BYTES:
            fault = f"too large: more than {MAX_PICTURE_BYTES} bytes"
        fault_number = self._faults.setdefault(fault, len(self._faults))
        picture = _PICTURE.pack(container, offset, byte_count, checksum, class_number, fault_number)
        if sort_under is None:
            self._append(name, picture)
        else:
            self._sorter.add(sort_under + b"\0" + name, picture)
        self._count += 1
        self._total_bytes += byte_count
        if self._count % _PROGRESS_EVERY == 0:
            self._on_progress(self._count)

    def ignore(self, name: bytes, kind: str = "") -> None:
        """Count a file that is no picture, as `kind` or by its extension."""
        extension = os.path.splitext(name)[1].lower()
        kind = kind or (as_text(extension) if _EXTENSION.fullmatch(extension) else "without extension")
        self._ignored[kind if kind in self._ignored or len(self._ignored) < _MAX_KINDS else "of other kinds"] += 1

    @property
    def ignored(self) -> dict[str, int]:
        """By kind, the most frequent first."""
        return dict(sorted(self._ignored.items(), key=lambda item: (-item[1], item[0])))

    def finish(
        self,
        *,
        kind: str,
        root: bytes,
        class_names: Sequence[str] = (),
        labels: Sequence[int] = (),
        containers: Sequence[bytes] = (),
        container_bytes: Sequence[int] = (),
        keep_order: bool = False,
        source_seed: int | None = None,
    ) -> Listing:
        """Write what is left, listing.json last, and open it. `labels` has the label of each class number."""
        for key, picture in self._sorter:
            self._append(key.partition(b"\0")[2], picture)
        facts = {
            "version": _VERSION,
            "kind": kind,
            "root": as_text(root),
            "count": self._count,
            "total_bytes": self._total_bytes,
            "ignored": self.ignored,
            "name_bytes": self._names.byte_count,
            "keep_order": keep_order,
            "source_seed": source_seed,
            "class_names": list(class_names),
            "labels": list(labels),
            "faults": list(self._faults),
            "containers": [as_text(name) for name in containers],
            "container_bytes": list(container_bytes),
        }
        self._records.commit(self._count)
        self._names.commit(self._count)
        with NewFile(self.folder / _JSON_NAME) as file:
            file.write(json.dumps(facts, indent=1).encode() + b"\n")
            file.commit(self._count)
        self._on_progress(self._count)
        return Listing.open(self.folder)

    def _append(self, name: bytes, picture: bytes) -> None:
        start = self._names.byte_count
        self._names.write(name)
        self._records.write(_RECORD.pack(start, len(name), *_PICTURE.unpack(picture)))


def kinds_in_words(ignored: Mapping[str, int]) -> str:
    """ "12 .txt, 3 hidden", the most frequent kinds."""
    shown = [f"{count} {kind}" for kind, count in list(ignored.items())[:_SHOWN_KINDS]]
    rest = sum(ignored.values()) - sum(list(ignored.values())[:_SHOWN_KINDS])
    return ", ".join(shown) + (f" and {rest} others" if rest else "")


class _Sorter:
    """Sorts more pictures than memory should hold: runs of them go to files, and many runs are merged into one.

    The files have no names, so that a process that is killed leaves none behind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run: list[tuple[bytes, bytes]] = []
        self._spilled: list[list[BinaryIO]] = []
        """Sorted runs; those at position n are merged out of _MAX_RUNS at position n - 1."""

    def add(self, key: bytes, picture: bytes) -> None:
        self._run.append((key, picture))
        if len(self._run) == _RUN_LENGTH:
            self._run.sort()
            self._spill(self._run, 0)
            self._run = []

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        self._run.sort()
        return heapq.merge(self._run, *(_read_run(file) for level in self._spilled for file in level))

    def _spill(self, run: Iterable[tuple[bytes, bytes]], level: int) -> None:
        file = tempfile.TemporaryFile(dir=self._folder, buffering=_SPILL_BUFFER)  # noqa: SIM115
        if level == len(self._spilled):
            self._spilled.append([])
        self._spilled[level].append(file)
        for key, picture in run:
            file.write(_KEY_LENGTH.pack(len(key)) + picture + key)
        if len(self._spilled[level]) == _MAX_RUNS:
            self._spill(heapq.merge(*map(_read_run, self._spilled[level])), level + 1)
            self._close(self._spilled[level])

    def _close(self, files: list[BinaryIO]) -> None:
        while files:
            files.pop().close()

    def close(self) -> None:
        for files in self._spilled:
            self._close(files)


def _read_run(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    file.seek(0)
    while head := file.read(_KEY_LENGTH.size + _PICTURE.size):
        (key_length,) = _KEY_LENGTH.unpack_from(head)
        yield file.read(key_length), head[_KEY_LENGTH.size :]


def as_text(name: bytes) -> str:
    """A name as this program shows and stores it, the same under every locale (os.fsdecode's depends on it)."""
    return name.decode("utf-8", "surrogateescape")


def as_bytes(name: str) -> bytes:
    """A name as the file system has it."""
    return name.encode("utf-8", "surrogateescape")

"""A packed data set: what lies in its folder and how it is opened. Nothing else knows the format.

    shard-000000.tar ...  samples and their labels: members 000000_000017.jpg and 000000_000017.cls for the eighteenth
                          sample of shard 0; any WebDataset tool reads them
    samples.beton         in place of the shards, where data_prep/make_ffcv.py packed: FFCV's format
    index.npy             one RECORD_DTYPE record per sample, in the order of sample ids; mapped, never read whole
    names.txt             one original relative path per sample; UTF-8, undecodable bytes kept by surrogateescape
    rejected.jsonl        one {"name", "kind", "reason"} per picture that was left out
    changed.jsonl         one {"name", "changes"} per picture that is not as it came
    manifest.json         a `Manifest`; written last, so a folder that has one is complete
    packing/              state of a run that has not ended yet

To read one:    index = DatasetIndex.open("SHARDS"); index.read(17)
To write one:   data_prep/make_dali.py, data_prep/make_ffcv.py
To check one:   data_prep/verify.py
"""

import contextlib
import functools
import io
import json
import operator
import os
import re
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.lib.recfunctions import repack_fields
from numpy.typing import ArrayLike, NDArray

FORMAT = "inscon-shards"
VERSION = 2
NO_LABEL = -(2**31)
"""The label of a sample without one. Used as an index by mistake it fails, where -1 would read the last class."""

JPEG, RAW = 0, 1  # how a sample is stored: as a JPEG file, or as uint8 RGB pixels [height width 3]

RECORD_DTYPE = np.dtype([
    ("offset", "<u8"),  # of the sample's first byte inside its shard
    ("name_offset", "<u8"),  # of the name's first byte in names.txt
    ("checksum", "<u8"),  # XXH3-64 of the sample's bytes
    ("byte_count", "<u4"),
    ("shard", "<u4"),  # position in the manifest's list of shards
    ("height", "<u4"),  # px as stored
    ("width", "<u4"),
    ("label", "<i4"),  # position in the manifest's class names, or NO_LABEL
    ("encoding", "<u4"),  # JPEG or RAW
])  # fmt: skip

MANIFEST_NAME, BETON_NAME = "manifest.json", "samples.beton"
LISTS = {
    "index": "index.npy", "names": "names.txt", "rejected_list": "rejected.jsonl", "changed_list": "changed.jsonl",
}  # fmt: skip
"""What a manifest calls these four files."""
STATE_NAME = "packing"
BEGIN_ANEW = f"remove the folder {STATE_NAME} in --out and pass --overwrite"
"""--overwrite alone goes on with an unfinished packing of the same settings."""

_PIECE_BYTES = 1 << 22
_MAX_OPEN_FILES = 1 << 16
_SINGLE_FILES = "|".join(map(re.escape, (MANIFEST_NAME, BETON_NAME, *LISTS.values())))
_FORMAT_FILE = re.compile(rf"(shard-\d{{6,}}\.tar|{_SINGLE_FILES})(\..*unfinished)?")  # until it is whole


class ShardError(ValueError):
    """A shard folder that cannot be used: one sentence with what was found and what to do."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a shard folder, as the manifest records it."""

    name: str
    byte_count: int
    sample_count: int
    checksum: str  # XXH3-128, hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What manifest.json says about the folder, by the pictures and the settings alone: no dates, no paths, no machine."""

    format: str = FORMAT
    version: int = VERSION
    container: str  # what the samples lie in: "tar" or "beton"
    num_samples: int
    class_names: tuple[str, ...]  # in label order; empty where the pictures have no labels
    shuffle_seed: int
    settings: Mapping[str, int | float | str | bool | None]  # the writer's, that decide the bytes
    rejected: Mapping[str, int]  # how many pictures were left out, by kind of fault
    changed: Mapping[str, int]  # how many are not as they came, by kind of change; to be stored as pixels is none
    ignored: Mapping[str, int] = field(default_factory=dict)  # how many files were no pictures, by kind, such as ".txt"
    content: str  # XXH3-128 over every sample's size, label, encoding, checksum: equal wherever the same samples lie
    index: StoredFile
    names: StoredFile
    rejected_list: StoredFile
    changed_list: StoredFile
    shards: tuple[StoredFile, ...]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a shard folder. ShardError where there is none, or none that this program reads."""
        path = folder / MANIFEST_NAME
        if path.is_file():
            return cls.parse(path.read_bytes(), str(path))
        if (folder / STATE_NAME).is_dir():
            raise ShardError(f"{folder} is a set whose packing did not end: run the command that packs it once more.")
        kind = "ffcv" if folder.suffix == ".beton" else "dali"
        raise ShardError(
            f"{folder} is no packed set, it holds no {MANIFEST_NAME}: run python data_prep/make_{kind}.py --data DIR --out SHARDS."
        )

    @classmethod
    def parse(cls, content: bytes, name: str) -> "Manifest":
        """The same of a manifest's bytes; `name` is for the message."""
        try:
            entries = json.loads(content)
            found = entries["format"], entries["version"]
            if found != (FORMAT, VERSION):
                raise ValueError("it is in {} {}, not in {} {}".format(*found, FORMAT, VERSION))
            known = {name: entries[name] for name in cls.__slots__ if name in entries}  # older sets have more
            lists = {name: StoredFile(**entries[name]) for name in LISTS}
            shards = tuple(StoredFile(**file) for file in entries["shards"])
            return cls(**known | lists | {"class_names": tuple(entries["class_names"]), "shards": shards})
        except (ValueError, LookupError, TypeError) as error:
            raise ShardError(
                f"{name} is no manifest that this program reads ({error}): copy it again, pack the pictures again, or "
                "install the version of inscon that wrote it."
            ) from None

    @property
    def files(self) -> list[StoredFile]:
        """All of the set but the manifest."""
        return [self.index, self.names, self.rejected_list, self.changed_list, *self.shards]

    @property
    def packer(self) -> str:
        """The command that packs such a set, "data_prep/make_dali.py" or "data_prep/make_ffcv.py"."""
        return f"data_prep/make_{'ffcv' if self.container == 'beton' else 'dali'}.py"

    @property
    def repair(self) -> str:
        return f"copy it again or rerun {self.packer}"


@dataclass(frozen=True, slots=True, eq=False)
class DatasetIndex:
    """Where every sample of a shard folder lies, and its size and label. Make one with `DatasetIndex.open`. Sample ids run from 0
    to len(index) - 1. Files are opened when first needed, so an index costs little to pickle and is safe in forked and spawned
    workers and in threads."""

    path: Path  # absolute, so that a later change of directory does no harm
    manifest: Manifest
    _records: np.ndarray = field(repr=False)
    _file: Callable[[str], io.FileIO] = field(repr=False)  # one of the set's files, by name; those used last stay open

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "DatasetIndex":
        """Open a packed folder, or the beton in one, after cheap checks: versions, counts and byte counts, no contents. Raises
        ShardError, with the remedy, for anything missing, cut short or of another version."""
        folder = Path(path)
        if folder.name == BETON_NAME and (folder.parent / MANIFEST_NAME).is_file():
            folder = folder.parent
        manifest = Manifest.read(folder)
        for stored in (manifest.index, manifest.names, *manifest.shards):
            path = folder / stored.name
            if not path.exists():
                raise ShardError(f"{path} is missing: {manifest.repair}.")
            found = path.stat().st_size
            if found != stored.byte_count:
                fault = "was cut short" if found < stored.byte_count else "was changed after it was packed"
                said = f"is {found} bytes long where the manifest says {stored.byte_count}; it {fault}"
                raise ShardError(f"{path} {said}: {manifest.repair}.")
        folder = folder.absolute()
        file = functools.lru_cache(_max_open_files())(functools.partial(_open_file, folder))
        return cls(folder, manifest, _open_records(folder, manifest), file)

    def __reduce__(self):
        return DatasetIndex.open, (self.path,)  # open files do not travel; the other process opens its own

    def __len__(self) -> int:
        return len(self._records)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In label order."""
        return self.manifest.class_names

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any sample, label or order, but not with what the samples lie in."""
        return self.manifest.content[:16]

    def records(self, sample_ids: ArrayLike) -> NDArray[np.void]:
        """RECORD_DTYPE records, [n], of n sample ids. ValueError for an id out of range."""
        return self._records[self._checked(sample_ids)]

    def sizes(self, sample_ids: ArrayLike) -> NDArray[np.int64]:
        """(height, width) as decoded, px, [n 2], of n sample ids. ValueError for an id out of range."""
        ids = self._checked(sample_ids)
        return np.stack([self._records["height"][ids], self._records["width"][ids]], axis=-1).astype(np.int64)

    def labels(self, sample_ids: ArrayLike) -> NDArray[np.int64]:
        """Positions in `class_names`, or NO_LABEL, [n], of n sample ids. ValueError for an id out of range."""
        return self._records["label"][self._checked(sample_ids)].astype(np.int64)

    def name(self, sample_id: int) -> str:
        """The path of the picture it was packed from, relative to the packed folder, with forward slashes."""
        file, length = self._file(self.manifest.names.name), 256
        start = int(self._records["name_offset"][self._checked_one(sample_id)])
        while b"\n" not in (line := os.pread(file.fileno(), length, start)):
            if len(line) < length:
                raise ShardError(f"{self.path / self.manifest.names.name} ends within a name: {self.manifest.repair}.")
            length *= 4
        return line.partition(b"\n")[0].decode("utf-8", "surrogateescape")

    def read(self, sample_id: int, memory: NDArray[np.uint8] | None = None, pixels: bool = False) -> NDArray[np.uint8]:
        """The JPEG file of one sample as it was packed: a copy, compared with its checksum, [byte_count]. For several threads. It
        lies at the start of `memory`, if given: fresh memory costs five times what reading costs, for the system clears it. With
        `pixels`, a sample that is stored as raw pixels will do too: height * width * 3 bytes. ValueError for an id out of range
        and for too little memory; ShardError, naming sample and shard, for what cannot be read, has changed or is pixels."""
        record = self._records[self._checked_one(sample_id)]
        size, height, width = (int(record[name]) for name in ("byte_count", "height", "width"))
        raw = record["encoding"] == RAW
        if raw and not pixels:
            raise ShardError(
                f"{self.describe(sample_id)} is stored as raw pixels: read this set with --pipeline ffcv, or pack it with "
                "--write-mode jpg."
            )
        if raw and size != 3 * height * width:
            raise self._fault(sample_id, f"is no picture ({size} bytes are not {height}x{width} px of 3 bytes)")
        if memory is not None and len(memory) < size:
            raise ValueError(f"memory must hold the {size} bytes of sample {sample_id}. Found: {len(memory)}.")
        try:
            file = self._file(self.manifest.shards[record["shard"]].name)  # held, lest another thread close it
            found = np.empty(size, np.uint8) if memory is None else memory[:size]
            # Not mapped: a shard cut short under a running program is an error and not the end of the process.
            count = os.preadv(file.fileno(), [found], int(record["offset"]))
        except (ShardError, OSError) as error:
            raise self._fault(sample_id, f"cannot be read ({getattr(error, 'strerror', error)})") from None
        if count < size:
            raise self._fault(sample_id, "is not whole, the shard was cut short after it was packed")
        if xxhash.xxh3_64_intdigest(found) != record["checksum"]:
            raise self._fault(sample_id, "is not as it was packed, its bytes have changed")
        return found

    def _fault(self, sample_id: int, fault: str) -> ShardError:
        return ShardError(f"{self.describe(sample_id)} {fault}: {self.manifest.repair}.")

    def expect(self, sample_ids: ArrayLike) -> None:
        """Tell the system which samples will be read soon, so that a disk can fetch them side by side; Linux listens."""
        columns = ["shard", "offset", "byte_count"]
        for shard, offset, byte_count in self._records[columns][self._checked(sample_ids)].tolist():
            with contextlib.suppress(OSError, ShardError):  # whose turn comes when the sample is read
                file = self._file(self.manifest.shards[shard].name)
                os.posix_fadvise(file.fileno(), offset, byte_count, os.POSIX_FADV_WILLNEED)

    def describe(self, sample_id: int) -> str:
        """For messages: "sample 17 (n01440764/x.JPEG) in shard-000003.tar"."""
        shard = self.manifest.shards[self._records["shard"][self._checked_one(sample_id)]]
        return f"sample {sample_id} ({self.name(sample_id)}) in {shard.name}"

    def _checked(self, sample_ids: ArrayLike) -> np.ndarray:
        """Sample ids as integers in range; without this, NumPy would take negative ones from the end."""
        ids = np.asarray(sample_ids)
        if ids.size == 0:
            return ids.astype(np.int64)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"Sample ids must be integers. Found: {ids.dtype}.")
        self._checked_one(ids.min())
        self._checked_one(ids.max())
        return ids

    def _checked_one(self, sample_id: int) -> int:
        number = operator.index(sample_id)
        if not 0 <= number < len(self._records):
            raise ValueError(f"Sample ids of {self.path} must be from 0 to {len(self) - 1}. Found: {number}.")
        return number


def _open_file(folder: Path, name: str) -> io.FileIO:
    try:
        return io.FileIO(folder / name)
    except FileNotFoundError:
        raise ShardError(f"{name} is missing") from None


@functools.cache
def _max_open_files() -> int:
    """The limit is often 1,024, to be raised by whoever needs more. ImageNet has 550 shards; to open one anew takes long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * _MAX_OPEN_FILES)), hard))
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, _MAX_OPEN_FILES)


def _open_records(folder: Path, manifest: Manifest) -> np.ndarray:
    path = folder / manifest.index.name
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        last, size = records[-1], len(records)  # of a file that was mixed up, `last` is hardly ever right by chance
        if records.dtype != RECORD_DTYPE or size != manifest.num_samples:
            raise ValueError(f"it holds {size} records of {records.dtype}")
        if last["shard"] >= len(manifest.shards) or last["name_offset"] >= manifest.names.byte_count:
            raise ValueError("it points outside the shards or the names")
    except Exception as error:  # NumPy reads the header as Python, which brings out SyntaxError, TokenError and more
        raise ShardError(f"{path} is not the index of this set ({error}): {manifest.repair}.") from None
    return records


def stored_file(path: Path, sample_count: int, tell: Callable[[int], None] = lambda byte_count: None) -> StoredFile:
    """What the manifest says of a file, read for its checksum. `tell` is told of every piece."""
    checksum, byte_count = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            checksum.update(piece)
            byte_count += len(piece)
            tell(len(piece))
    return StoredFile(path.name, byte_count, sample_count, checksum.hexdigest())


def format_files(folder: Path) -> list[Path]:
    """The files in `folder` that are called as this format calls them, whole or not; sorted."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _FORMAT_FILE.fullmatch(path.name))


def content_of(records: NDArray[np.void]) -> bytes:
    """The bytes that `Manifest.content` is the checksum of."""
    return repack_fields(records[["checksum", "byte_count", "height", "width", "label", "encoding"]]).tobytes()

"""The shard folder: what lies in it, how it is opened, how it is written. Nothing else knows the format.

    shard-000000.tar ...  JPEGs as they came, and labels: members 000000017.jpg and 000000017.cls, where 17 is the
                          sample id; any WebDataset tool reads them
    index.npy             one RECORD_DTYPE record per sample, in the order of sample ids; mapped, never read whole
    names.txt             one original relative path per sample; UTF-8, undecodable bytes kept by surrogateescape
    rejected.jsonl        one {"name", "reason"} per picture that was left out
    manifest.json         a `Manifest`; written last, so a folder that has one is complete

To read one:   index = DatasetIndex.open("SHARDS"); index.jpeg_bytes(17)
To write one:  `ShardWriter`, which is what data_prep/make_dali.py does.
"""

import contextlib
import hashlib
import io
import json
import mmap
import operator
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORMAT = "inscon-shards"
VERSION = 1
NO_LABEL = -(2**31)
"""The label of a sample without one. Far from every index on purpose: used as an index by mistake it fails, where -1
would read the last class."""

RECORD_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in the manifest's list of shards
        ("offset", "<u8"),  # of the JPEG's first byte inside the tar file
        ("byte_count", "<u4"),  # of the JPEG
        ("height", "<u4"),  # px as decoded; EXIF orientation is not applied
        ("width", "<u4"),
        ("label", "<i4"),  # position in the manifest's class names, or NO_LABEL
    ]
)

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
NAMES_NAME = "names.txt"
REJECTED_NAME = "rejected.jsonl"
PARTIAL_SUFFIX = ".partial"
"""What a file is called until it is whole."""

_FORMAT_FILE = re.compile(r"(shard-\d{6,}\.tar|index\.npy|names\.txt|rejected\.jsonl|manifest\.json)")
_PACK = "python data_prep/make_dali.py --data DIR --out"
_REPAIR = "copy it again or rerun data_prep/make_dali.py"
_MAX_OPEN_SHARDS = 512  # each map holds a file descriptor, of which a process often has 1024


class ShardError(ValueError):
    """A shard folder that cannot be used: one sentence with what was found and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file of a shard folder, as the manifest records it."""

    name: str
    byte_count: int
    sample_count: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What manifest.json says about the folder. It depends on the pictures and the settings alone: no dates, no
    paths, no machine."""

    format: str
    version: int
    num_samples: int
    class_names: tuple[str, ...]
    """In label order; empty where the pictures have no labels."""
    shuffle_seed: int
    settings: Mapping[str, int | float | str | bool | None]
    """The writer's settings that decide the bytes."""
    rejected: Mapping[str, int]
    """How many pictures were left out, by kind of fault."""
    index: StoredFile
    names: StoredFile
    shards: tuple[StoredFile, ...]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a shard folder. ShardError where there is none, or none that this program reads."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ShardError(_why_no_manifest(folder))
        try:
            entries = json.loads(path.read_bytes())
        except ValueError as error:
            raise ShardError(f"{path} is not readable as JSON ({error}): {_REPAIR}.") from None
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise ShardError(f'{path} does not say "format": "{FORMAT}"; pack a folder with {_PACK} {folder}.')
        if entries.get("version") != VERSION:
            raise ShardError(
                f"{folder} was written in format version {entries.get('version')}, this program reads {VERSION}: "
                "rerun data_prep/make_dali.py, or install the version of inscon that wrote it."
            )
        try:
            return cls._from_json(entries)
        except (KeyError, TypeError) as error:
            raise ShardError(f"{path} lacks a field or has one too many ({error}): {_REPAIR}.") from None

    @classmethod
    def _from_json(cls, entries: dict) -> "Manifest":
        typed = {
            "class_names": tuple(entries["class_names"]),
            "index": StoredFile(**entries["index"]),
            "names": StoredFile(**entries["names"]),
            "shards": tuple(StoredFile(**shard) for shard in entries["shards"]),
        }
        return cls(**(entries | typed))


@dataclass(frozen=True, slots=True, eq=False)
class DatasetIndex:
    """Where every sample of a shard folder lies, and its size and label. Make one with `DatasetIndex.open`.

    Sample ids run from 0 to len(index) - 1. Files are mapped when first needed, so an index costs little to pickle
    and is safe in forked and spawned workers and in threads.
    """

    path: Path
    """Absolute, so that a later change of directory does no harm."""
    manifest: Manifest
    _records: np.ndarray
    _shard_bytes: dict[int, NDArray[np.uint8]]
    _name_lines: "_Lines"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "DatasetIndex":
        """Open a shard folder after cheap checks: versions, counts and byte counts, no contents.

        Raises ShardError, with the remedy, for anything missing, cut short or of another version.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        records = _open_records(folder, manifest)
        for stored in (manifest.names, *manifest.shards):
            _check_byte_count(folder, stored)
        absolute = folder.absolute()
        return cls(absolute, manifest, records, {}, _Lines(absolute / manifest.names.name))

    def __reduce__(self):
        return DatasetIndex.open, (self.path,)  # maps do not travel; the other process makes its own

    def __len__(self) -> int:
        return len(self._records)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In label order; empty where the samples have no labels."""
        return self.manifest.class_names

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any sample, label or order; the checksums of index and shards as written."""
        sums = [self.manifest.index.sha256, *(shard.sha256 for shard in self.manifest.shards)]
        return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]

    def sizes(self, sample_ids: ArrayLike) -> NDArray[np.int64]:
        """(height, width) as decoded, px, [n 2], of n sample ids. ValueError for an id out of range."""
        ids = self._checked(sample_ids)
        return np.stack([self._records["height"][ids], self._records["width"][ids]], axis=-1).astype(np.int64)

    def labels(self, sample_ids: ArrayLike) -> NDArray[np.int64]:
        """Positions in `class_names`, or NO_LABEL, [n], of n sample ids. ValueError for an id out of range."""
        return self._records["label"][self._checked(sample_ids)].astype(np.int64)

    def name(self, sample_id: int) -> str:
        """The path of the picture it was packed from, relative to the packed folder, with forward slashes."""
        return self._name_lines[self._checked_one(sample_id)]

    def jpeg_bytes(self, sample_id: int) -> NDArray[np.uint8]:
        """The JPEG file of one sample, [byte_count], a read-only view into the mapped shard: nothing is copied.

        ValueError for an id out of range; ShardError where the shard changed or vanished after `open`.
        """
        shard, offset, byte_count, *_ = self._records[self._checked_one(sample_id)].item()
        whole = self._shard_bytes.get(shard)
        if whole is None:
            whole = self._map_shard(shard)
        return whole[offset : offset + byte_count]

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
        if ids.min() < 0 or ids.max() >= len(self):
            self._checked_one(ids.min() if ids.min() < 0 else ids.max())
        return ids

    def _checked_one(self, sample_id: int) -> int:
        number = operator.index(sample_id)
        if not 0 <= number < len(self._records):
            raise ValueError(f"Sample ids of {self.path} must be from 0 to {len(self) - 1}. Found: {number}.")
        return number

    def _map_shard(self, shard: int) -> NDArray[np.uint8]:
        stored = self.manifest.shards[shard]
        _check_byte_count(self.path, stored)
        while len(self._shard_bytes) >= _MAX_OPEN_SHARDS:
            # The oldest goes. Views of it that are still in use keep its map alive.
            self._shard_bytes.pop(next(iter(self._shard_bytes)), None)
        return self._shard_bytes.setdefault(shard, _map_file(self.path / stored.name))


class _Lines:
    """The lines of a text file by number; mapped, and cut into lines, when the first one is asked for."""

    __slots__ = ("_mapped", "_path")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mapped: tuple[np.ndarray, np.ndarray] | None = None

    def __getitem__(self, number: int) -> str:
        if self._mapped is None:
            text = _map_file(self._path)
            self._mapped = text, np.flatnonzero(text == ord("\n"))
        text, ends = self._mapped
        start = ends[number - 1] + 1 if number else 0
        return text[start : ends[number]].tobytes().decode("utf-8", "surrogateescape")


def _map_file(path: Path) -> NDArray[np.uint8]:
    """A file that is not empty as read-only bytes, mapped. A plain array: slicing np.memmap is ten times slower."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def _open_records(folder: Path, manifest: Manifest) -> np.ndarray:
    path = folder / manifest.index.name
    if not path.is_file():
        raise ShardError(f"{path} is missing: {_REPAIR}.")
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except (ValueError, EOFError) as error:
        _check_byte_count(folder, manifest.index)  # says so where the file was cut short
        raise ShardError(f"{path} is not readable as a NumPy array ({error}): {_REPAIR}.") from None
    if records.dtype != RECORD_DTYPE:
        raise ShardError(f"{path} holds records of {records.dtype}, not of {RECORD_DTYPE}: {_REPAIR}.")
    if len(records) != manifest.num_samples:
        raise ShardError(
            f"{path} holds {len(records)} samples where the manifest says {manifest.num_samples}; "
            f"the two are not of one run: {_REPAIR}."
        )
    return records


def _check_byte_count(folder: Path, stored: StoredFile) -> None:
    path = folder / stored.name
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: {_REPAIR}.") from None
    if found != stored.byte_count:
        fault = "was cut short" if found < stored.byte_count else "was changed after it was packed"
        raise ShardError(
            f"{path} is {found} bytes long where the manifest says {stored.byte_count}; it {fault}: {_REPAIR}."
        )


def _why_no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist; pack a data set into it with {_PACK} {folder}."
    if not folder.is_dir():
        return f"{folder} is a file, not a shard folder; give the folder that holds {MANIFEST_NAME}."
    names = os.listdir(folder)
    if not names:
        return f"{folder} is empty; pack a data set into it with {_PACK} {folder}."
    if any(_FORMAT_FILE.fullmatch(name.removesuffix(PARTIAL_SUFFIX)) for name in names):
        return f"{folder} holds shards but no {MANIFEST_NAME}; packing did not end: run {_PACK} {folder} --overwrite."
    return f"{folder} is not a shard folder, it holds no {MANIFEST_NAME}; pack one with {_PACK} SHARDS."


# ---------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes a shard folder, one sample after the other; the order of `add` decides the sample ids.

        with ShardWriter("SHARDS", max_shard_bytes=256_000_000) as writer:
            writer.add(jpeg, height=375, width=500, label=0, name="n01440764/x.JPEG")
            index = writer.finish(class_names=["n01440764"], shuffle_seed=0, settings={})

    A file gets its final name when it is whole. Left without `finish`, the writer takes away what it wrote. The same
    samples in the same order give the same bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_shard_bytes: int, overwrite: bool = False) -> None:
        """No shard is longer than `max_shard_bytes`, unless one picture alone is.

        A folder with shards is refused (ShardError); `overwrite` replaces them as soon as the first sample is added.
        """
        self.folder = Path(folder)
        if not overwrite:
            refuse_shards(self.folder)
        self.num_samples = 0
        self._max_shard_bytes = max_shard_bytes
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in _shard_files(self.folder, PARTIAL_SUFFIX):  # of a run that was killed
            leftover.unlink()
        self._files: list[_NewFile] = []
        self._names = self._create(NAMES_NAME)
        self._rejected = self._create(REJECTED_NAME)
        self._rejected_counts: dict[str, int] = {}
        self._tar_file: _NewFile | None = None
        self._tar: tarfile.TarFile | None = None
        self._rows: list[tuple[int, ...]] = []  # of the shard being written
        self._records: list[np.ndarray] = []  # of the shards before it
        self._shards: list[StoredFile] = []
        self._finished = False

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        if self._finished:
            return
        for file in self._files:
            file.discard()
        if self._made_folder:
            with contextlib.suppress(OSError):  # somebody else's file lies in it by now
                self.folder.rmdir()

    def add(self, jpeg: bytes, *, height: int, width: int, label: int, name: str) -> int:
        """Append one sample and return its id. `height` and `width` as decoded, px; `label` may be NO_LABEL.

        `name` is the picture's original path; a line break in it is a ValueError, for names.txt has one per line.
        """
        if "\n" in name:
            raise ValueError(f"A picture's name must not hold a line break. Found: {name!r}.")
        if self.num_samples == 0:
            _remove_shards(self.folder)
        members = {"jpg": jpeg} if label == NO_LABEL else {"jpg": jpeg, "cls": str(label).encode()}
        self._make_room(sum(tarfile.BLOCKSIZE + _padded(len(content)) for content in members.values()))
        # In USTAR with short names every header is one block, so the JPEG begins one block after the end so far.
        offset = self._tar.offset + tarfile.BLOCKSIZE
        for extension, content in members.items():
            member = tarfile.TarInfo(f"{self.num_samples:09d}.{extension}")  # owner and time stay 0: same bytes always
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._rows.append((len(self._shards), offset, len(jpeg), height, width, label))
        self._names.write(name.encode("utf-8", "surrogateescape") + b"\n")
        self.num_samples += 1
        return self.num_samples - 1

    def reject(self, *, name: str, kind: str, reason: str) -> None:
        """Note a picture that is left out: name and reason in rejected.jsonl, one more of its kind in the manifest."""
        self._rejected.write(json.dumps({"name": name, "reason": reason}).encode() + b"\n")
        self._rejected_counts[kind] = self._rejected_counts.get(kind, 0) + 1

    def finish(self, *, class_names: Sequence[str], shuffle_seed: int, settings: Mapping) -> DatasetIndex:
        """Write what is left, the manifest last, and open the folder. `settings`: JSON values, see `Manifest`."""
        assert self.num_samples > 0, "an empty shard folder is the caller's to refuse"
        self._close_shard()
        index_file = self._create(INDEX_NAME)
        np.save(index_file, np.concatenate(self._records))
        self._rejected.commit(sum(self._rejected_counts.values()))
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            num_samples=self.num_samples,
            class_names=tuple(class_names),
            shuffle_seed=shuffle_seed,
            settings=dict(settings),
            rejected=dict(sorted(self._rejected_counts.items())),
            index=index_file.commit(self.num_samples),
            names=self._names.commit(self.num_samples),
            shards=tuple(self._shards),
        )
        manifest_file = self._create(MANIFEST_NAME)
        manifest_file.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")
        manifest_file.commit(self.num_samples)
        self._finished = True
        return DatasetIndex.open(self.folder)

    def _create(self, name: str) -> "_NewFile":
        self._files.append(_NewFile(self.folder / name))
        return self._files[-1]

    def _make_room(self, byte_count: int) -> None:
        """Have a shard open that can take this many bytes more."""
        if self._tar is not None:
            end = self._tar.offset + byte_count + 2 * tarfile.BLOCKSIZE  # two empty blocks mark a tar's end
            if _padded(end, tarfile.RECORDSIZE) > self._max_shard_bytes:
                self._close_shard()
        if self._tar is None:
            self._tar_file = self._create(f"shard-{len(self._shards):06d}.tar")
            # Open across many calls of `add`; `_close_shard` closes it.
            self._tar = tarfile.open(fileobj=self._tar_file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _close_shard(self) -> None:
        self._tar.close()
        self._shards.append(self._tar_file.commit(len(self._rows)))
        self._records.append(np.array(self._rows, dtype=RECORD_DTYPE))
        self._tar = self._tar_file = None
        self._rows = []


def refuse_shards(folder: Path) -> None:
    """ShardError where files of a shard folder lie in `folder` already."""
    found = _shard_files(folder)
    if found:
        raise ShardError(
            f"{folder} already holds a packed data set ({found[0].name}): pass --overwrite to replace it, "
            "or give another --out."
        )


def _remove_shards(folder: Path) -> None:
    # The manifest first: a folder with a manifest is complete, at every moment.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for path in _shard_files(folder):
        path.unlink()


def _shard_files(folder: Path, suffix: str = "") -> list[Path]:
    """The files in `folder` that are called as this format calls them, with `suffix` added."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix) and _FORMAT_FILE.fullmatch(path.name.removesuffix(suffix))
    )


def _padded(byte_count: int, block: int = tarfile.BLOCKSIZE) -> int:
    return -(-byte_count // block) * block


class _NewFile:
    """A file being written under a temporary name, hashed on the way. What `tarfile` and `np.save` need, no more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._file = self._partial.open("wb")
        self._sha256 = hashlib.sha256()
        self._byte_count = 0
        self._committed = False

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self._byte_count += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._byte_count

    def commit(self, sample_count: int) -> StoredFile:
        """Close it and give it its final name."""
        self._file.close()
        os.replace(self._partial, self._path)
        self._committed = True
        return StoredFile(
            name=self._path.name,
            byte_count=self._byte_count,
            sample_count=sample_count,
            sha256=self._sha256.hexdigest(),
        )

    def discard(self) -> None:
        """Take it away, whole or not."""
        with contextlib.suppress(OSError):  # on a full disk, closing fails again at what is still buffered
            self._file.close()
        (self._path if self._committed else self._partial).unlink(missing_ok=True)

"""Read a packed set back, tar shards or a beton, and say exactly what differs, whichever byte it is.

    python data_prep/verify.py ~/shards/train
    python data_prep/verify.py ~/beton/train --against ~/shards/train
    python data_prep/verify.py ~/shards/train --all-pixels

Every file is compared with its checksum in the manifest, every sample with its checksum in the index. All else in a
shard (headers, labels, padding, tables, the end) follows from the index: it is built anew and compared byte for byte,
and so are DALI's index files. Some samples are decoded and their sizes compared with the index.
manifest.json has no checksum: what it says of class names, seed and settings is believed.

Exit code 0: nothing differs. 1: something does, one line each. 2: there is no packed set that can be opened.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
import tyro
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep import beton
from data_prep.index import (
    BETON_NAME,
    INDEX_NAME,
    JPEG,
    MANIFEST_NAME,
    MAX_NAMES_IN_MANIFEST,
    NO_LABEL,
    RAW,
    RECORD_DTYPE,
    DatasetIndex,
    Manifest,
    ShardError,
    StoredFile,
    _folder_of_beton,
    check_byte_count,
    format_files,
)
from data_prep.joining import _content_of
from data_prep.shards import _DALI_INDEX_VERSION, sample_members, tar_end, tar_header

_PIECE_BYTES = 1 << 22
_RECORDS_AT_A_TIME = 1 << 16
_LISTED_PER_FILE = 20
_DECODED_PER_JOB = 64
_MAX_NAME_BYTES = 1 << 13
_REPAIR = "copy it again or rerun data_prep/make_dali.py"


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read a packed set back and say exactly what differs."""

    path: tyro.conf.Positional[Path]
    """Folder of a packed set, or the .beton in one."""
    pixels: int = 1000
    """How many samples to decode, spread evenly over the set."""
    all_pixels: bool = False
    """Decode every sample."""
    against: Path | None = None
    """Another packed set to compare with, sample by sample; only its manifest, index and names are read."""
    workers: int | None = None
    """Processes that read and decode; None: as many as there are CPU cores for this process."""


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


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What came out; as text, the closing line."""

    path: Path
    manifest: Manifest
    findings: tuple[Finding, ...]
    """At most 20 of a file, and one that stands for its others."""
    num_decoded: int

    def __str__(self) -> str:
        if self.findings:
            places = sum(finding.places for finding in self.findings)
            return f"{self.path} differs in {places:,} place{'s' * (places != 1)}."
        shards, count = self.manifest.shards, self.manifest.num_samples
        where = f"{len(shards):,} shard{'s' * (len(shards) != 1)}"
        megabytes = sum(shard.byte_count for shard in shards) / 1_000_000
        return (
            f"{self.path} is sound: {count:,} sample{'s' * (count != 1)} in "
            f"{where if self.manifest.container == 'tar' else shards[0].name}, {megabytes:,.1f} MB, "
            f"{self.num_decoded:,} decoded."
        )


def verify(
    path: str | os.PathLike[str],
    *,
    pixels: int = 1000,
    all_pixels: bool = False,
    against: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    show_progress: bool = False,
) -> Verification:
    """Read a packed set back; see `VerifyConfig` for the arguments. Memory does not grow with the set.

    Raises ShardError where `path` or `against` is no packed set that can be opened; ValueError for settings out of range.
    """
    if pixels < 0:
        raise ValueError(f"--pixels must not be negative. Found: {pixels}.")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1. Found: {workers}.")
    here = _Set(_folder(path))
    if against is not None:
        DatasetIndex.open(against)  # raises
    jobs = _jobs(here, pixels, all_pixels, against)
    results, num_decoded = _work(here, jobs, workers or len(os.sched_getaffinity(0)), show_progress)
    findings = _capped(itertools.chain.from_iterable(results))
    if not findings:
        try:
            DatasetIndex.open(path)  # nothing is sound that the readers refuse
        except ShardError as error:
            findings = [Finding(INDEX_NAME, f"cannot be opened ({error})")]
    return Verification(path=Path(path), manifest=here.manifest, findings=tuple(findings), num_decoded=num_decoded)


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    return _folder_of_beton(folder) if folder.suffix == ".beton" and not folder.is_dir() else folder


def _capped(findings: Iterable[Finding]) -> list[Finding]:
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


# ------------------------------------------------------------------------------------------- files, read plainly


class _File:
    """A file read from its beginning to its end, and hashed on the way.

    Not mapped: a process dies where a file that it mapped is cut short.
    """

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        self._file, self._hash = _opened(path, _PIECE_BYTES), xxhash.xxh3_128()
        self._tell, self._told, self.position = tell, 0, 0

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, byte_count: int) -> bytes:
        """The next bytes. EOFError where the file ends before."""
        content = self._file.read(byte_count)
        self._hash.update(content)
        self.position += len(content)
        if self.position - self._told >= _PIECE_BYTES:
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
                self.read(_PIECE_BYTES)
        self._tell(self.position - self._told)
        return self._hash.hexdigest()


class _Records:
    """The records of the index, some at a time; none where its header cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path, self._start, self._count = path, 0, 0
        with contextlib.suppress(Exception), _opened(path) as file:  # NumPy has several for damage
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
            if dtype == RECORD_DTYPE:
                self._count = min(shape[0], (os.fstat(file.fileno()).st_size - self._start) // RECORD_DTYPE.itemsize)

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, stop: int) -> NDArray[np.void]:
        wanted = (stop - first) * RECORD_DTYPE.itemsize
        content = _read_at(self._path, self._start + first * RECORD_DTYPE.itemsize, wanted) if wanted else b""
        if len(content) < wanted:
            raise OSError(None, f"{self._path} was cut short meanwhile")
        return np.frombuffer(content, RECORD_DTYPE)

    def slices(self, first: int, stop: int) -> Iterator[tuple[int, NDArray[np.void]]]:
        """(id of the first, records) of samples `first` to `stop` - 1."""
        for start in range(first, stop, _RECORDS_AT_A_TIME):
            yield start, self.read(start, min(start + _RECORDS_AT_A_TIME, stop))


def _read_at(path: Path, position: int, length: int) -> bytes:
    """As many of these bytes as there are."""
    with _opened(path) as file:
        file.seek(position)
        return file.read(length)


def _opened(path: Path, buffering: int = -1) -> BinaryIO:
    """Open for reading; without waiting where it is a pipe, which nobody may ever write to."""
    return open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


class _Set:
    """A packed set whose files may be anything; its manifest can be read."""

    def __init__(self, folder: Path, tell: Callable[..., None] = lambda *_: None) -> None:
        """`tell` is called with each number of bytes read, and with the number of pictures decoded."""
        self.folder, self.tell = folder, tell
        self.manifest = Manifest.read(folder)
        self._check_manifest()
        self.records = _Records(folder / self.manifest.index.name)
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

    def open(self, stored: StoredFile) -> _File:
        return _File(self.folder / stored.name, self.tell)

    def named(self, sample_id: int) -> str:
        """For messages: "sample 17 (n01440764/x.JPEG)", with as much as can be read."""
        with contextlib.suppress(OSError, OverflowError):
            offset = int(self.records.read(sample_id, sample_id + 1)["name_offset"][0])
            name = _read_at(self.folder / self.manifest.names.name, offset, _MAX_NAME_BYTES).partition(b"\n")[0]
            return f"sample {sample_id} ({name.decode('utf-8', 'surrogateescape')})"
        return f"sample {sample_id}"

    def _check_manifest(self) -> None:
        """ShardError where no check could work with what it says."""
        path, container = self.folder / MANIFEST_NAME, self.manifest.container
        for stored, field in itertools.product(self.files, fields(StoredFile)):
            value = getattr(stored, field.name)
            if type(value) is not field.type or (field.type is int and value < 0):
                raise ShardError(f"{path} says {field.name} {value!r} of a file: {_REPAIR}.")
        pattern = {"tar": r"shard-\d{6,}\.tar", "beton": re.escape(BETON_NAME)}.get(container)
        for shard in self.manifest.shards:
            if pattern is None or not re.fullmatch(pattern, shard.name):
                raise ShardError(f"{path} says container {container!r} of {shard.name}: {_REPAIR}.")


# ------------------------------------------------------------------------------ shards, built anew from the index


class _Part(NamedTuple):
    """What a stretch of a file has to be, up to a piece long."""

    what: str
    expected: bytes
    sample_id: int | None = None
    row_length: int | None = None
    """Of the rows of several samples, from `sample_id` on."""

    @property
    def length(self) -> int:
        return len(self.expected)


class _Content(NamedTuple):
    """The stretch that holds a sample, of any length."""

    checksum: int
    length: int
    indexed: int
    """Where the index says that it is."""
    sample_id: int
    what: str = "the content of"
    row_length: int | None = None


def _contents(rows: NDArray[np.void], first: int) -> Iterator[_Content]:
    columns = (rows[name].tolist() for name in ("checksum", "byte_count", "offset"))
    return (_Content(*row, sample_id) for sample_id, row in enumerate(zip(*columns), first))


def _zeros(what: str, length: int, sample_id: int | None = None) -> Iterator[_Part]:
    for start in range(0, length, _PIECE_BYTES):
        yield _Part(what, bytes(min(_PIECE_BYTES, length - start)), sample_id)


def _tar_parts(here: _Set, number: int) -> Iterator[_Part | _Content]:
    shard_number = _shard_number(here.manifest.shards[number])
    first, stop = here.firsts[number : number + 2].tolist()
    position = 0
    for start, rows in here.records.slices(first, stop):
        for content, label in zip(_contents(rows, start), rows["label"].tolist()):
            for part in _tar_sample(shard_number, content.sample_id - first, content, label):
                position += part.length
                yield part
    yield _Part("the end of the archive", tar_end(position))


def _tar_sample(shard_number: int, place: int, content: _Content, label: int) -> Iterator[_Part | _Content]:
    sample_id = content.sample_id
    (name, _), *label_member = sample_members(shard_number, place, b"", label)
    yield _Part("the tar header of", tar_header(name, content.length), sample_id)
    yield content
    yield from _zeros("the padding after", -content.length % BLOCKSIZE, sample_id)
    for name, text in label_member:
        yield _Part("the tar header of the label of", tar_header(name, len(text)), sample_id)
        yield _Part("the label of", text, sample_id)
        yield from _zeros("the padding after the label of", -len(text) % BLOCKSIZE, sample_id)


def _dali_parts(here: _Set, number: int) -> Iterator[_Part]:
    """The lines of a shard's index for DALI: of each member its extension, position, byte count and name."""
    shard_number = _shard_number(here.manifest.shards[number])
    first, stop = here.firsts[number : number + 2].tolist()
    yield _Part("its first line", f"{_DALI_INDEX_VERSION} {stop - first}\n".encode())
    position = 0
    for start, rows in here.records.slices(first, stop):
        for sample_id, (byte_count, label) in enumerate(
            zip(rows["byte_count"].tolist(), rows["label"].tolist()), start
        ):
            members = []
            for name, text in sample_members(shard_number, sample_id - first, b"", label):
                length = len(text) or byte_count
                members.append(f"{name.partition('.')[2]} {position + BLOCKSIZE} {length} {name}")
                position += BLOCKSIZE + length + -length % BLOCKSIZE
            yield _Part("the line of", " ".join(members).encode() + b"\n", sample_id)


def _shard_number(shard: StoredFile) -> int:
    return int(shard.name.removeprefix("shard-").removesuffix(".tar"))


def _beton_parts(here: _Set, _: int) -> Iterator[_Part | _Content]:
    count = int(here.firsts[-1])
    largest = max(int(rows["byte_count"].max()) for _, rows in here.records.slices(0, count))
    try:
        layout = beton.Layout(count, largest)
    except ValueError as error:
        raise ShardError(f"says what cannot be ({error})") from None

    def placed() -> Iterator[tuple[int, NDArray[np.void]]]:
        layout = beton.Layout(count, largest)
        for first, rows in here.records.slices(0, count):
            rows = np.array(rows)
            rows["offset"] = layout.place(rows["byte_count"])
            yield first, rows

    for _, rows in here.records.slices(0, count):
        layout.place(rows["byte_count"])
    head = layout.head(layout.end)
    yield _Part("the header", head[: beton.HEADER_DTYPE.itemsize])
    yield _Part("the description of the fields", head[beton.HEADER_DTYPE.itemsize :])
    for first, rows in placed():
        table = beton.metadata_of(rows)
        yield _Part("the metadata of", table.tobytes(), first, table.itemsize)
    position = len(head) + count * beton.METADATA_DTYPE.itemsize
    yield from _zeros("the padding before the first page", layout.data_start - position)
    position = layout.data_start
    for first, rows in placed():
        indexed = here.records.read(first, first + len(rows))
        for content, start in zip(_contents(indexed, first), rows["offset"].tolist()):
            yield from _zeros("the padding of the page after", start - position, content.sample_id - 1)
            yield content
            position = start + content.length
    for first, rows in placed():
        table = beton.allocations_of(first, rows)
        yield _Part("the allocation of", table.tobytes(), first, table.itemsize)


def _walk(here: _Set, stored: StoredFile, file: _File, parts: Iterator[_Part | _Content]) -> Iterator[Finding]:
    """Compare a file with its parts, until the one or the other ends."""
    for part in parts:
        start = file.position
        if isinstance(part, _Content) and part.indexed != start:
            place = f"at byte {part.indexed} of {stored.name}, not {start}"
            yield Finding(INDEX_NAME, f"says that {here.named(part.sample_id)} is {place}.", part.sample_id)
        try:
            for offset, how in _differences(file, part):
                yield _finding(here, stored, part, start, offset, "differs in", how)
        except EOFError:
            yield _finding(here, stored, part, start, file.position, "ends in", f"at byte {file.position}")
            return
        except OSError as error:
            how = f"from byte {file.position} on ({error.strerror})"
            yield _finding(here, stored, part, start, file.position, "cannot be read in", how)
            file.skip_to(start + part.length)
    if file.position != stored.byte_count:
        sizes = f"is {stored.byte_count} bytes long, where its samples in {INDEX_NAME} make {file.position}"
        yield Finding(MANIFEST_NAME, f"says that {stored.name} {sizes}.")


def _differences(file: _File, part: _Part | _Content) -> Iterator[tuple[int, str]]:
    """(position of the first byte that differs, where that is) of a part, or of each of its rows, that differs."""
    start = file.position
    if isinstance(part, _Content):
        checksum = xxhash.xxh3_64()
        for done in range(0, part.length, _PIECE_BYTES):
            checksum.update(file.read(min(_PIECE_BYTES, part.length - done)))
        if checksum.intdigest() != part.checksum:
            yield start, f"within bytes {start} to {start + part.length - 1}"
        return
    found = file.read(part.length)
    if found == part.expected:
        return
    differing = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(part.expected, np.uint8))
    _, first_of_row = np.unique(differing // (part.row_length or part.length), return_index=True)
    for at in differing[first_of_row].tolist():
        yield start + at, f"at byte {start + at} (found 0x{found[at]:02x}, expected 0x{part.expected[at]:02x})"


def _finding(
    here: _Set, stored: StoredFile, part: _Part | _Content, start: int, offset: int, verb: str, how: str
) -> Finding:
    """What is wrong at `offset`, in a part that begins at `start`."""
    what, sample_id = part.what, part.sample_id
    if sample_id is not None:
        sample_id += (offset - start) // part.row_length if part.row_length else 0
        what = f"{what} {here.named(sample_id)}"
    return Finding(stored.name, f"{verb} {what}, {how}.", sample_id, offset)


# ----------------------------------------------------------------------------------------------------- the checks


def _check_file(here: _Set, stored: StoredFile, parts: Iterator[_Part | _Content] | None = None) -> Iterator[Finding]:
    """A file's length and checksum and, where they are given, its parts."""
    path = here.folder / stored.name
    if path.exists() and not path.is_file():
        yield Finding(stored.name, f"is no regular file: {_REPAIR}.")
        return
    wrong_length = False
    try:
        check_byte_count(here.folder, stored)
    except ShardError as error:
        wrong_length = True
        yield Finding(stored.name, str(error).removeprefix(f"{path} "))
        if not path.exists():
            return
    with here.open(stored) as file:
        differences = _capped(_walk(here, stored, file, parts)) if parts else []
        checksum = None
        try:
            checksum = file.checksum()
        except OSError:
            if not differences:
                raise
    if checksum == stored.checksum:
        yield from (_blame_index(finding, stored) for finding in differences)
    elif differences or wrong_length:
        yield from differences
    else:
        yield Finding(
            stored.name, f"has the checksum {checksum} where {MANIFEST_NAME} says {stored.checksum}: {_REPAIR}."
        )


def _blame_index(finding: Finding, stored: StoredFile) -> Finding:
    """A file whose checksum is right is not the one that is wrong."""
    if finding.file != stored.name:
        return finding
    sentence = finding.sentence and f"contradicts {stored.name}, whose checksum is right but which {finding.sentence}"
    return replace(finding, file=INDEX_NAME, sentence=sentence)


def _check_manifest(here: _Set) -> Iterator[Finding]:
    """What it says twice, and that nothing else lies in the folder that readers would take for its files."""
    manifest = here.manifest
    counts = manifest.num_samples, manifest.index.sample_count, manifest.names.sample_count, int(here.firsts[-1])
    if len(set(counts)) > 1:
        said = "{} in all, {} of the index, {} of the names, {} of the shards".format(*counts)
        yield Finding(MANIFEST_NAME, f"contradicts itself in the number of samples ({said}): {_REPAIR}.")
    if not _has_dali_indices(manifest):
        yield Finding(MANIFEST_NAME, f"names other indices for DALI than its shards have: {_REPAIR}.")
    known = {MANIFEST_NAME, *(stored.name for stored in here.files)}
    for path in format_files(here.folder):
        if path.name not in known:
            yield Finding(path.name, f"is not of this set, by {MANIFEST_NAME}: remove it.")


def _has_dali_indices(manifest: Manifest) -> bool:
    shards = manifest.shards if manifest.container == "tar" else ()
    wanted = [(shard.name.removesuffix(".tar") + ".idx", shard.sample_count) for shard in shards]
    return [(index.name, index.sample_count) for index in manifest.dali_indices] == wanted


def _check_index(here: _Set) -> Iterator[Finding]:
    """index.npy, and that it says nothing that cannot be."""
    damage = list(_check_file(here, here.manifest.index))
    yield from damage
    if not here.is_indexed:
        return
    content = xxhash.xxh3_128()
    for first, rows in here.records.slices(0, len(here.records)):
        content.update(_content_of(rows))
        shards = np.searchsorted(here.firsts, np.arange(first, first + len(rows)), side="right") - 1
        raw, label = rows["encoding"] == RAW, rows["label"]
        pixel_bytes = 3 * rows["height"].astype(np.uint64) * rows["width"]
        faults = {
            "in which shard it lies": rows["shard"] != shards,
            "how it is encoded": ~raw & (rows["encoding"] != JPEG),
            "how many bytes its raw pixels have": raw & (rows["byte_count"] != pixel_bytes),
            "which class it is of": (label != NO_LABEL) & ((label < 0) | (label >= len(here.manifest.class_names))),
        }
        for fault, where in faults.items():
            for sample_id in (first + np.flatnonzero(where)).tolist():
                yield Finding(INDEX_NAME, f"is wrong about {here.named(sample_id)}: {fault}.", sample_id)
    found, said = content.hexdigest(), here.manifest.content
    if not damage and found != said:
        yield Finding(MANIFEST_NAME, f"says the content is {said} where {INDEX_NAME} makes {found}: {_REPAIR}.")


def _check_names(here: _Set) -> Iterator[Finding]:
    """names.txt, and that its lines begin where the index says."""
    stored, path = here.manifest.names, here.folder / here.manifest.names.name
    damage = list(_check_file(here, stored))
    yield from damage
    if not path.is_file():
        return
    count, position, known = 0, 0, len(here.records)
    moved = [(0, int(offset), 0) for offset in here.records.read(0, min(1, known))["name_offset"] if offset != 0]
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            starts = position + 1 + np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n"))
            position += len(piece)
            if not moved and count + 1 < known:
                said = here.records.read(count + 1, min(count + 1 + len(starts), known))["name_offset"]
                wrong = np.flatnonzero(said != starts[: len(said)])[:1].tolist()
                moved += [(count + 1 + i, int(said[i]), int(starts[i])) for i in wrong]
            count += len(starts)
    yield from _check_line_count(stored, count)
    for sample_id, said, found in moved:
        if damage:
            sentence = f"has the name of sample {sample_id} at byte {found}, not {said} as {INDEX_NAME} says."
            yield Finding(stored.name, sentence, sample_id, found)
        else:
            sentence = f"says that the name of sample {sample_id} is at byte {said} of {stored.name}, not {found}."
            yield Finding(INDEX_NAME, sentence, sample_id)


def _check_rejected(here: _Set) -> Iterator[Finding]:
    manifest, kinds = here.manifest, Counter()
    damage = yield from _check_list(here, manifest.rejected_list, lambda entry: kinds.update([entry["kind"]]))
    if not damage and kinds != manifest.rejected:
        yield Finding(MANIFEST_NAME, f"counts other pictures than {manifest.rejected_list.name} lists: {_REPAIR}.")


def _check_changed(here: _Set) -> Iterator[Finding]:
    manifest, kinds, names = here.manifest, Counter(), []

    def count(entry: dict) -> None:
        kinds.update(entry["changes"])
        names.extend([entry["name"]] * (len(names) < MAX_NAMES_IN_MANIFEST))

    damage = yield from _check_list(here, manifest.changed_list, count)
    if not damage and (kinds != manifest.changed or tuple(names) != manifest.changed_names):
        yield Finding(MANIFEST_NAME, f"counts or names other pictures than {manifest.changed_list.name}: {_REPAIR}.")


def _check_list(here: _Set, stored: StoredFile, count: Callable[[dict], None]) -> Iterator[Finding]:
    """A file of JSON lines; `count` is called with each entry of a sound one. Returns whether it is damaged."""
    damage = list(_check_file(here, stored))
    yield from damage
    path, lines = here.folder / stored.name, 0
    if not path.is_file():
        return True
    with path.open("rb") as file:
        for line in file:
            lines += 1
            if not damage:
                count(json.loads(line))
    yield from _check_line_count(stored, lines)
    return bool(damage)


def _check_line_count(stored: StoredFile, lines: int) -> Iterator[Finding]:
    if lines != stored.sample_count:
        yield Finding(stored.name, f"has {lines} lines where {MANIFEST_NAME} says {stored.sample_count}: {_REPAIR}.")


def _check_shard(here: _Set, number: int) -> Iterator[Finding]:
    parts = _tar_parts if here.manifest.container == "tar" else _beton_parts
    return _check_file(here, here.manifest.shards[number], parts(here, number) if here.is_indexed else None)


def _check_dali(here: _Set, number: int) -> Iterator[Finding]:
    usable = here.is_indexed and _has_dali_indices(here.manifest)
    return _check_file(here, here.manifest.dali_indices[number], _dali_parts(here, number) if usable else None)


def _check_pixels(here: _Set, sample_ids: NDArray[np.int64]) -> Iterator[Finding]:
    """Whether JPEGs decode, and to the size that the index says."""
    for sample_id in sample_ids.tolist():
        record = here.records.read(sample_id, sample_id + 1)[0]
        content = _content(here, record) if record["encoding"] == JPEG else None
        if content is not None:
            yield from _check_jpeg(here, sample_id, record, content)
        here.tell(_sample_bytes(here.manifest), content is not None)


def _check_jpeg(here: _Set, sample_id: int, record: np.void, content: bytes) -> Iterator[Finding]:
    try:
        # Grey is half the work: it takes every coefficient all the same, and there is where damage shows.
        height, width = simplejpeg.decode_jpeg(content, "GRAY", strict=True).shape[:2]
    except ValueError as error:
        shard = here.manifest.shards[record["shard"]].name
        yield Finding(shard, f"holds {here.named(sample_id)}, which cannot be decoded ({error}).", sample_id)
        return
    if (height, width) != (record["height"], record["width"]):
        sizes = f"{record['height']} x {record['width']} px, not {height} x {width}"
        yield Finding(INDEX_NAME, f"says that {here.named(sample_id)} is {sizes}.", sample_id)


def _sample_bytes(manifest: Manifest) -> int:
    """On average."""
    return sum(shard.byte_count for shard in manifest.shards) // max(1, manifest.num_samples)


def _content(here: _Set, record: np.void) -> bytes | None:
    """A sample's bytes; None where they are not what the index says, which `_check_shard` finds."""
    with contextlib.suppress(OSError, OverflowError, IndexError):
        stored = here.manifest.shards[record["shard"]]
        length = min(int(record["byte_count"]), stored.byte_count)
        content = _read_at(here.folder / stored.name, int(record["offset"]), length)
        return content if xxhash.xxh3_64_intdigest(content) == record["checksum"] else None
    return None


def _check_against(here: _Set, path: Path) -> Iterator[Finding]:
    """Sample by sample, by the indexes: that they tell the truth is for the others to check."""
    there = _Set(_folder(path))
    mine, others = here.manifest, there.manifest

    def differs(what: str, ours: object, theirs: object, sample_id: int | None = None) -> Finding:
        return Finding(str(path), f"has {what} {theirs} where {here.folder} has {ours}.", sample_id)

    if mine.num_samples != others.num_samples:
        yield differs("a number of samples of", mine.num_samples, others.num_samples)
    if mine.class_names != others.class_names:
        yield Finding(str(path), f"has other class names than {here.folder}.")
    count = min(len(here.records), len(there.records)) if mine.content != others.content else 0
    for first, rows in here.records.slices(0, count):
        other_rows = there.records.read(first, first + len(rows))
        for name in ("height", "width", "label", "encoding", "byte_count", "checksum"):
            for i in np.flatnonzero(rows[name] != other_rows[name]).tolist():
                yield differs(f"{here.named(first + i)} with {name}", rows[name][i], other_rows[name][i], first + i)
    if mine.names.checksum != others.names.checksum:
        paths = here.folder / mine.names.name, there.folder / others.names.name
        with paths[0].open("rb") as our_names, paths[1].open("rb") as their_names:
            for sample_id, (ours, theirs) in enumerate(zip(our_names, their_names)):
                if ours != theirs:
                    yield differs(f"sample {sample_id} with the name", _text(ours), _text(theirs), sample_id)


def _text(line: bytes) -> str:
    return line.rstrip(b"\n").decode("utf-8", "surrogateescape")


# --------------------------------------------------------------------------------------------- the work, shared out


class _Job(NamedTuple):
    check: Callable[..., Iterator[Finding]]
    arguments: tuple
    file: str
    """To blame where reading fails."""


def _jobs(here: _Set, pixels: int, all_pixels: bool, against: str | os.PathLike[str] | None) -> list[_Job]:
    manifest = here.manifest
    count = manifest.num_samples if all_pixels else min(pixels, manifest.num_samples)
    sample_ids = np.arange(count if here.is_indexed else 0) * (manifest.num_samples - 1) // max(1, count - 1)
    decoded = [sample_ids[start : start + _DECODED_PER_JOB] for start in range(0, len(sample_ids), _DECODED_PER_JOB)]
    return [
        _Job(_check_manifest, (), MANIFEST_NAME),
        _Job(_check_index, (), INDEX_NAME),
        _Job(_check_names, (), manifest.names.name),
        _Job(_check_rejected, (), manifest.rejected_list.name),
        _Job(_check_changed, (), manifest.changed_list.name),
        *(_Job(_check_shard, (number,), shard.name) for number, shard in enumerate(manifest.shards)),
        *(_Job(_check_dali, (number,), index.name) for number, index in enumerate(manifest.dali_indices)),
        *(_Job(_check_pixels, (some,), INDEX_NAME) for some in decoded),
        *([] if against is None else [_Job(_check_against, (Path(against),), str(against))]),
    ]


def _run(job: _Job) -> list[Finding]:
    def findings() -> Iterator[Finding]:
        try:
            yield from job.check(_worker.set, *job.arguments)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            yield Finding(job.file, f"cannot be read{where}: {error.strerror or error}.")
        except ShardError as error:
            yield Finding(INDEX_NAME, str(error))

    return _capped(findings())


_worker = threading.local()


class _Stopped(Exception):
    """The command was interrupted."""


def _begin(folder: Path, counts, stopped) -> None:
    """Make a thread or a process ready for `_run`; `counts` are bytes read and pictures decoded."""
    if threading.current_thread() is threading.main_thread():  # a process of its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
        threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(byte_count: int, decoded: int = 0) -> None:
        if stopped.is_set():
            raise _Stopped
        with counts.get_lock():
            counts[0] += byte_count
            counts[1] += decoded

    _worker.set = _Set(folder, tell)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(here: _Set, jobs: list[_Job], workers: int, show_progress: bool) -> tuple[list[list[Finding]], int]:
    """The jobs' findings, in their order, and how many pictures were decoded."""
    context = multiprocessing.get_context("spawn")  # forking beside threads (rich has one) may hang
    counts, stopped = context.Array("Q", 2), context.Event()
    begin = {"initializer": _begin, "initargs": (here.folder, counts, stopped)}
    # Processes, as simplejpeg holds the interpreter's lock while it decodes.
    pool = ThreadPoolExecutor(1, **begin) if workers == 1 else ProcessPoolExecutor(workers, context, **begin)
    decoded = sum(len(job.arguments[0]) for job in jobs if job.check is _check_pixels)
    total = sum(stored.byte_count for stored in here.files) + decoded * _sample_bytes(here.manifest)
    columns = TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = Console(stderr=True, quiet=not show_progress)
    with pool, Progress(*columns, console=console, disable=not show_progress) as progress:
        task = progress.add_task("", total=total)
        try:
            pending = results = [pool.submit(_run, job) for job in jobs]
            while pending:
                _, pending = wait(pending, timeout=0.1)
                progress.update(task, completed=counts[0])
            return [result.result() for result in results], counts[1]
        except BrokenExecutor:
            raise ShardError(f"A process died while it read {here.folder}: run again with fewer --workers.") from None
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    config = tyro.cli(VerifyConfig)
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    try:
        result = verify(**vars(config), show_progress=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    for finding in result.findings:
        print(finding)
    print(result)
    raise SystemExit(1 if result.findings else 0)


if __name__ == "__main__":
    main()

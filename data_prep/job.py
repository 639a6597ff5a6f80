"""The work of a packing run as OUT/packing says it, and one shard of it. Every process opens it there."""

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from data_prep.index import JPEG, STATE_NAME
from data_prep.listing import Entry, Listing
from data_prep.pictures import BadPicture, Prepared, Treatment, jpeg_size, prepare_picture
from data_prep.reading import Reader, Unreadable
from data_prep.shards import BetonPart, ReportBuilder, ShardReport, TarShard, report_path
from inscon.sampling import permute

JOB_NAME, LISTING_NAME = "job.json", "listing"
_PACKING_ORDER = 2**32 - 1  # an epoch number that no training reaches: packing shuffles unlike any epoch
_READ_AHEAD_BYTES, _READ_AHEAD_HANDFULS, _READ_THREADS = 16_000_000, 8, 4
_HANDFUL, _HANDFUL_BYTES = 8, 2_000_000
_TELL_EVERY_S = 0.1
_PARTS_OF_SMALL_BETON, _PICTURES_OF_SMALL_PART, _PICTURES_OF_LARGEST_PART = 64, 100, 1000


@dataclass(frozen=True, kw_only=True)
class Target:
    """What kind of set is written."""

    container: Literal["tar", "beton"]
    writer: str
    """The script, for the manifest."""
    treatment: Treatment
    shard_bytes: int
    """Of source pictures, per shard, on average."""


@dataclass(frozen=True)
class Job:
    """The work of a run, as OUT/packing says it; every process opens it there."""

    out: Path
    target: Target
    seed: int | None
    """None: the listing's order is kept."""
    listing: Listing

    @property
    def state(self) -> Path:
        return self.out / STATE_NAME

    @property
    def num_shards(self) -> int:
        """Or parts of a beton, of which even a small set has some for every worker; their number doesn't change a byte."""
        count = max(1, math.ceil(self.listing.total_bytes / self.target.shard_bytes))
        if self.target.container == "beton":
            small = min(_PARTS_OF_SMALL_BETON, len(self.listing) // _PICTURES_OF_SMALL_PART)
            count = max(count, small, len(self.listing) // _PICTURES_OF_LARGEST_PART)
        return min(count, len(self.listing))

    def entries(self, shard: int) -> Iterator[Entry]:
        """The pictures of one shard, in order."""
        count = len(self.listing)
        positions = np.arange(shard * count // self.num_shards, (shard + 1) * count // self.num_shards)
        if self.seed is not None:
            positions = permute(positions, count, self.seed, _PACKING_ORDER)
        return (self.listing.entry(int(position)) for position in positions)

    def is_done(self, shard: int) -> bool:
        """Whether it is reported and, unless the beton has it by now, still as long as reported."""
        if not report_path(self.state, shard).is_file():
            return False
        if self.target.container == "beton":
            return True  # the join looks after its parts
        files = ShardReport.load(self.state, shard).files
        return all(_size(self.out / file.name) == file.byte_count for file in files)

    @classmethod
    def open(cls, out: Path) -> "Job":
        entries = json.loads((out / STATE_NAME / JOB_NAME).read_text())
        target = entries["target"] | {"treatment": Treatment(**entries["target"]["treatment"])}
        return cls(out, Target(**target), entries["seed"], Listing.open(out / STATE_NAME / LISTING_NAME))


class PackingStopped(ValueError):
    """Packing ended early; what is finished stays, and the same command goes on."""


class Progressed(NamedTuple):
    """What happened in a shard since the last message."""

    pictures: int
    source_bytes: int
    left_out: tuple[tuple[str, str], ...]
    """Name and reason of each picture that was left out."""


class ShardPacker:
    """Writes one shard and its report: first all `steps`, then `finish`. Discarded, it leaves nothing."""

    def __init__(self, job: Job, reader: Reader, number: int) -> None:
        self._job, self._reader, self._number = job, reader, number
        self._builder = ReportBuilder(number)
        self._shard = (TarShard if job.target.container == "tar" else BetonPart)(job.out, number)

    def steps(self) -> Iterator[Progressed]:
        """Read, check and write its pictures, telling every moment how far it is."""
        pictures, source_bytes, left_out, told = 0, 0, [], time.monotonic()
        for entry, source in _read_ahead(self._reader, self._job.entries(self._number)):
            reason = _add(self._builder, self._shard, self._job, entry, source)
            pictures, source_bytes = pictures + 1, source_bytes + entry.byte_count
            left_out += [(entry.name, reason)] * (reason is not None)
            if left_out or time.monotonic() - told > _TELL_EVERY_S:
                yield Progressed(pictures, source_bytes, tuple(left_out))
                pictures, source_bytes, left_out, told = 0, 0, [], time.monotonic()
        yield Progressed(pictures, source_bytes, tuple(left_out))

    def finish(self) -> None:
        """Bring it to the disk and report it; another thread may do that while the next shard is begun."""
        try:
            files = self._shard.finish() if len(self._builder) else ()  # without sound pictures there is no file
            self._builder.report(files).save(self._job.state)
        finally:
            self.discard()

    def discard(self) -> None:
        self._shard.discard()


def _add(
    builder: ReportBuilder, shard: TarShard | BetonPart, job: Job, entry: Entry, source: bytes | Unreadable
) -> str | None:
    """Append one picture, or note why not and return the reason."""
    if isinstance(source, Unreadable):
        builder.reject(entry.name, source.kind, str(source))
        return str(source)
    try:
        prepared = _prepare(source, entry, job)
    except BadPicture as bad:
        builder.reject(entry.name, bad.kind, str(bad))
        return str(bad)
    offset = shard.add(prepared.content, entry.label)
    about = {"height": prepared.height, "width": prepared.width, "encoding": prepared.encoding}
    builder.add(prepared.content, offset=offset, label=entry.label, name=entry.name, **about)
    if prepared.changes:
        builder.change(entry.name, prepared.changes)
    return None


def _prepare(source: bytes, entry: Entry, job: Job) -> Prepared:
    if not entry.checksum:
        return prepare_picture(source, job.target.treatment)
    # Of a packed set: decoded when that was written, so its checksum tells whether it is still sound.
    if xxhash.xxh3_64_intdigest(source) != entry.checksum:
        raise PackingStopped(
            f"{job.listing.root} is damaged at {entry.name}, in {job.listing.containers[entry.container]}: see what "
            f"python data_prep/verify.py {job.listing.root} says."
        )
    treatment = job.target.treatment
    if treatment.write_mode == "jpg" and treatment.short_side is None and treatment.max_resolution is None:
        return Prepared(source, JPEG, *jpeg_size(source), ())
    return prepare_picture(source, treatment)


def _read_ahead(reader: Reader, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | Unreadable]]:
    """Entries with their bytes, in order; disks and networks like several requests at a time."""

    def read(handful: list[Entry]) -> list[tuple[Entry, bytes | Unreadable]]:
        sources = []
        for entry in handful:
            try:
                sources.append((entry, reader.read(entry)))
            except Unreadable as fault:
                sources.append((entry, fault))
        return sources

    ahead: deque = deque()
    ahead_bytes = 0
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for handful in _handfuls(entries):
            byte_count = sum(entry.byte_count for entry in handful)
            ahead.append((byte_count, pool.submit(read, handful)))
            ahead_bytes += byte_count
            while ahead_bytes > _READ_AHEAD_BYTES or len(ahead) > _READ_AHEAD_HANDFULS:
                byte_count, reading = ahead.popleft()
                ahead_bytes -= byte_count
                yield from reading.result()
        for _, reading in ahead:
            yield from reading.result()


def _handfuls(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """A few at a time: to hand over one costs as much as to read one."""
    handful, byte_count = [], 0
    for entry in entries:
        handful.append(entry)
        byte_count += entry.byte_count
        if len(handful) == _HANDFUL or byte_count > _HANDFUL_BYTES:
            yield handful
            handful, byte_count = [], 0
    if handful:
        yield handful


def _size(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None

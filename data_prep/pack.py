"""Both writers: from a source of pictures to a packed set, by several processes, on one or more machines.

    list      what pictures there are, once, on disk (data_prep/sources.py)
    shuffle   one permutation of all of them, evaluated where it is needed
    shards    cut at fixed places of that order; each is one process's work: read, check, write, report
    join      index, names, lists and manifest, by rank 0 when all shards are reported

A shard is done when its file and its report are there under their names. All that a run knows lies in OUT/packing: the job,
the listing, a report per shard. The same command after any stop reads it and goes on with the shards that are missing.
Nothing in a packed set depends on which process wrote what, so the number of workers and ranks doesn't change a byte.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import tyro
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.status import Status

from data_prep import index as packed
from data_prep.beton import BetonFile, num_laid, part_path
from data_prep.index import (
    BEGIN_ANEW,
    NO_LABEL,
    RECORD_DTYPE,
    STATE_NAME,
    DatasetIndex,
    Manifest,
    ShardError,
    StoredFile,
)
from data_prep.pictures import BadPicture, Prepared, Treatment, jpeg_size, prepare_picture
from data_prep.sources import UNREADABLE, Entry, Listing, Reader, Unreadable, as_bytes, kinds_in_words, list_source
from inscon.guard import end_with_parent, naming, only_process, remove_unfinished, run_script, sentence_of, whole_file
from inscon.sampling import permute

BYTES_PER_MB = 1_000_000
_JOB_NAME, _LISTING_NAME = "job.json", "listing.sqlite"
_PACKING_ORDER = 2**32 - 1  # an epoch number that no training reaches: packing shuffles unlike any epoch
_READ_AHEAD_BYTES, _READ_AHEAD, _READ_THREADS = 16_000_000, 64, 4
_PARTS_OF_SMALL_BETON, _PICTURES_OF_SMALL_PART, _PICTURES_OF_LARGEST_PART = 64, 100, 1000
_LEAST_LOOKED_AT = 1000  # pictures, before their share of bad ones stops a run
_TRIAL_PICTURES, _TRIAL_S = 500, 10.0
_PER_SAMPLE_BYTES = {"tar": 512 + 256 + 1024 + 48 + 40, "beton": 24 + 24 + 48 + 40}
"""Headers, padding, label, index, name; about."""
_SPAWN = get_context("spawn")  # forking beside threads (rich has one) may hang


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What both writers ask for."""

    data: Path
    """Where the pictures are: a folder of class folders, a flat folder, a list file (path, optional label), a tar of tars
    (ILSVRC2012_img_train.tar), a WebDataset tar or a folder of them, or a packed set."""
    out: Path  # Folder for the packed set; made if need be.
    seed: int | None = None  # Of the one shuffle of all pictures. None: 0, but a packed set keeps its order.
    short_side: int | None = None
    """Shrink pictures whose shorter side is longer than this, px. None: store them as they are."""
    max_resolution: int | None = None  # The same for the longer side.
    quality: int = 95
    """JPEG quality, 1 to 100, of what has to be encoded again; sound pictures that need no shrinking are not."""
    chroma: Literal["444", "420"] = "444"
    """Color resolution of the same: 420 halves it in either direction, which decodes faster and is less exact."""
    workers: int | None = None
    """Processes that read, check and write; None: as many as there are CPU cores for this process."""
    bad_limit: float = 0.001  # Share of the pictures that may be left out before the run stops; 0: at the first one.
    overwrite: bool = False  # Replace the packed set that lies in `out`, or an unfinished one of other settings.
    plan: bool = False  # Say what would be done, how long it would take and how much disk it needs; write nothing.

    def check(self) -> None:
        """ValueError for settings out of range, and for a source or a target that cannot be one."""
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed must be from 0 to 2**64-1. Found: {self.seed}.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1. Found: {self.workers}.")
        if not 0 <= self.bad_limit <= 1:
            raise ValueError(f"--bad-limit must be from 0 to 1. Found: {self.bad_limit}.")
        if not self.data.exists():
            raise ValueError(f"{self.data} does not exist; give a folder, a list file or a tar to --data.")
        if self.data.is_dir() and self.out.resolve().is_relative_to(self.data.resolve()):
            raise ValueError(
                f"The shards would lie among the pictures: --out {self.out} is inside --data {self.data}; move it out."
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(
                f"--out {self.out} is a file; give a folder, in which the packed set and its index are to lie."
            )

    @property
    def treatment(self) -> Treatment:
        """ValueError for settings out of range."""
        return Treatment(**{f.name: getattr(self, f.name) for f in fields(Treatment) if hasattr(self, f.name)})

    @property
    def num_workers(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Target:
    """What kind of set is written."""

    container: Literal["tar", "beton"]
    writer: str  # the script, for the manifest
    treatment: Treatment
    shard_bytes: int  # of source pictures, per shard, on average

    @property
    def settings(self) -> dict:
        """For the manifest."""
        return {"writer": self.writer, "shard_mb": self.shard_bytes / BYTES_PER_MB, **asdict(self.treatment)}


class Ranks(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class PackingStopped(ValueError):
    """Packing ended early; what is finished stays, and the same command goes on."""


def pack(
    config: PackConfig, target: Target, *, show_progress: bool = False, ranks: Ranks | None = None
) -> DatasetIndex | None:
    """Pack `config.data` into `config.out`; the packed set, opened, or None on ranks other than 0.

    Raises ValueError, one sentence with the remedy. A run that was stopped, by whatever, is continued.
    """
    config.check()
    ranks, console = ranks or Ranks.from_environment(), Console(stderr=True, quiet=not show_progress)
    if ranks.rank != 0:
        job = _job_of_rank_0(config, target, console)
        if job is not None:
            with only_process(job.state / f"rank-{ranks.rank}", "--out"):
                _write_shards(job, config, ranks, console)
        return None
    made_folder, state = not config.out.exists(), config.out / STATE_NAME
    try:
        with only_process(state / "rank-0", "--out"):
            try:
                job = _open_job(config, target, console)
                index = _write_set(job, config, ranks, console)
                (state / _JOB_NAME).unlink()  # first: without it there is nothing to go on with
                return index
            finally:
                if not (state / _JOB_NAME).exists():
                    shutil.rmtree(state, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # something lies in it
            made_folder and config.out.rmdir()


def _write_set(job: "Job", config: PackConfig, ranks: Ranks, console: Console) -> DatasetIndex:
    with contextlib.ExitStack() as stack:
        beton = None
        if job.target.container == "beton":
            parts = job.num_shards, len(job.listing), lambda shard: job.has_report(shard) and job.report(shard)
            beton = stack.enter_context(BetonFile(job.out, *parts))
        with beton.laid_meanwhile() if beton else contextlib.nullcontext():
            _write_shards(job, config, ranks, console)
            _wait_for_ranks(job, ranks, console)
        remove_unfinished(job.out)  # what killed processes left
        bad, example = 0, ""  # of all ranks together
        for report in map(job.report, range(job.num_shards)):
            bad += len(report.rejected)
            example = example or next((job.about(r["name"], r["reason"]) for r in report.rejected), "")
        if bad == len(job.listing) and config.bad_limit == 1:
            (job.state / _JOB_NAME).unlink()  # there is nothing to go on with
        _check_bad(config, bad, len(job.listing), len(job.listing), example)
        facts = {
            "container": job.target.container,
            "class_names": tuple(job.listing.facts.class_names),
            "shuffle_seed": (job.listing.facts.source_seed or 0) if job.seed is None else job.seed,
            "settings": job.target.settings,
            "ignored": job.listing.facts.ignored,
        }
        return join(job.out, job.num_shards, facts, beton)


# ---------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class Job:
    """The work of a run, as OUT/packing says it; every process opens it there."""

    out: Path
    target: Target
    seed: int | None  # None: the listing's order is kept
    listing: Listing

    @classmethod
    def open(cls, out: Path) -> "Job":
        entries = _read_job(out / STATE_NAME)
        target = entries["target"] | {"treatment": Treatment(**entries["target"]["treatment"])}
        return cls(out, Target(**target), entries["seed"], Listing(out / STATE_NAME / _LISTING_NAME))

    @property
    def state(self) -> Path:
        return self.out / STATE_NAME

    @property
    def num_shards(self) -> int:
        """Or parts of a beton, of which even a small set has some for every worker; their number doesn't change a byte."""
        facts = self.listing.facts
        count = max(1, math.ceil(facts.total_bytes / self.target.shard_bytes))
        if self.target.container == "beton":
            small = min(_PARTS_OF_SMALL_BETON, facts.count // _PICTURES_OF_SMALL_PART)
            count = max(count, small, facts.count // _PICTURES_OF_LARGEST_PART)
        return min(count, facts.count)

    def entries(self, shard: int) -> Iterator[Entry]:
        """The pictures of one shard, in order."""
        count = len(self.listing)
        positions = np.arange(shard * count // self.num_shards, (shard + 1) * count // self.num_shards)
        if self.seed is not None:
            positions = permute(positions, count, self.seed, _PACKING_ORDER)
        return (self.listing.entry(int(position)) for position in positions)

    def path(self, shard: int) -> Path:
        """Of the file with its samples."""
        is_tar = self.target.container == "tar"
        return self.out / f"shard-{shard:06d}.tar" if is_tar else part_path(self.out, shard)

    def has_report(self, shard: int) -> bool:
        return report_path(self.out, shard).is_file()

    def report(self, shard: int) -> "Report":
        return Report.load(report_path(self.out, shard))

    def is_done(self, shard: int) -> bool:
        """Whether its file and its report are there; of a beton's parts also where the beton has it by now."""
        if not self.has_report(shard) or (self.target.container == "beton" and shard < num_laid(self.out)):
            return self.has_report(shard)
        with contextlib.suppress(FileNotFoundError):
            return all(self.path(shard).stat().st_size == file.byte_count for file in self.report(shard).files)
        return False

    def about(self, name: str, reason: str) -> str:
        """A picture that is left out and why, for people; of a list also where it was looked for."""
        if self.listing.facts.kind != "list" or not reason.startswith(UNREADABLE):
            return f"{name}: {reason}"
        where = "" if os.path.isabs(name) else ", as a list's paths start at its folder"
        return f"{name}: {reason}; tried {os.path.join(self.listing.facts.root, name)}{where}"


def _wanted(config: PackConfig, target: Target) -> dict:
    """What decides a set's bytes: a run goes on only where this is the same."""
    return {"data": str(config.data.absolute()), "asked_seed": config.seed, "target": asdict(target)}


def _read_job(state: Path) -> dict | None:
    try:
        return json.loads((state / _JOB_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _open_job(config: PackConfig, target: Target, console: Console) -> Job:
    """The job in OUT/packing, as this command wants it; made where there is none."""
    state, wanted = config.out / STATE_NAME, _wanted(config, target)
    found = _read_job(state)
    if found is not None and found.items() >= wanted.items():
        job = Job.open(config.out)
        console.print(f"Going on with {config.out}: {len(job.listing)} pictures are listed.", highlight=False)
        return job
    if not config.overwrite:
        _refuse_other_work(config, found, wanted)
    (state / _JOB_NAME).unlink(missing_ok=True)
    for path in state.iterdir():
        if path.is_file():
            path.unlink()
    with console.status(f"Listing {config.data}") as status:
        listing = list_source(
            config.data,
            state / _LISTING_NAME,
            on_progress=lambda count: status.update(f"{count:,} pictures listed of {config.data}"),
        )
    seed = config.seed if listing.facts.kind == "packed" or config.seed is not None else 0
    (config.out / packed.MANIFEST_NAME).unlink(missing_ok=True)  # first: a folder with a manifest is complete, always
    for old in packed.format_files(config.out):
        old.unlink()
    with whole_file(state / _JOB_NAME) as file:
        file.write(json.dumps(wanted | {"seed": seed}, indent=1).encode())
    return Job.open(config.out)


def _refuse_other_work(config: PackConfig, found: dict | None, wanted: dict) -> None:
    if found is not None:
        before, now = ({**job["target"], **job["target"]["treatment"], **job} for job in (found, wanted))
        name = next(name for name in now if before.get(name) != now[name] and not isinstance(now[name], dict))
        raise ShardError(
            f"{config.out} holds an unfinished packing with other settings ({name} {before.get(name)}, now {now[name]}): run "
            "it as it was begun, pass --overwrite to begin anew, or give another --out."
        )
    files = packed.format_files(config.out)
    if files:
        raise ShardError(
            f"{config.out} already holds a packed data set ({files[0].name}): pass --overwrite to replace it, or give "
            "another --out."
        )


# ---------------------------------------------------------------------------------------------------- ranks


def _job_of_rank_0(config: PackConfig, target: Target, console: Console) -> Job | None:
    """Once rank 0 has made it; None where all is done already."""
    state, wanted, begun, waits = config.out / STATE_NAME, _wanted(config, target), time.time(), False
    while True:
        found = _read_job(state)
        if found is not None and found.items() >= wanted.items():
            return Job.open(config.out)
        if found is not None and not config.overwrite:
            _refuse_other_work(config, found, wanted)
        with contextlib.suppress(ShardError, FileNotFoundError):
            # With --overwrite an older set is the one that rank 0 is about to replace.
            is_new = not config.overwrite or (config.out / packed.MANIFEST_NAME).stat().st_mtime > begun
            if found is None and is_new and Manifest.read(config.out).settings == target.settings:
                return None
        if not waits:
            console.print("Waiting for rank 0, which lists the pictures; start it, if it is not running.")
        waits = True
        time.sleep(0.2)


def _wait_for_ranks(job: Job, ranks: Ranks, console: Console) -> None:
    """Until the other ranks have done all their shards."""
    for rank in range(1, ranks.world_size):
        missing = [shard for shard in range(rank, job.num_shards, ranks.world_size) if not job.is_done(shard)]
        if missing:
            console.print(f"Waiting for rank {rank}, to write {len(missing)} shards; start it, if it is not running.")
        while missing:
            time.sleep(0.2)
            missing = [shard for shard in missing if not job.is_done(shard)]


# ---------------------------------------------------------------------------------------------------- one shard

_RECORD = struct.Struct("<QQQIIIIiI")  # RECORD_DTYPE: 48 bytes, where a tuple of Python's numbers has ten times as many


@dataclass
class Report:
    """What one shard holds; written after its file."""

    files: list[StoredFile] = field(default_factory=list)  # of tar or part; none without sound pictures
    rejected: list[dict] = field(default_factory=list)
    changed: list[dict] = field(default_factory=list)
    rows: bytearray = field(default_factory=bytearray)  # RECORD_DTYPE, where names begin in `names`
    names: bytearray = field(default_factory=bytearray)  # one line each, as in names.txt

    def __len__(self) -> int:
        return len(self.rows) // RECORD_DTYPE.itemsize

    @property
    def records(self) -> NDArray[np.void]:
        return np.frombuffer(bytearray(self.rows), RECORD_DTYPE)

    def add(
        self, content: bytes, *, offset: int, height: int, width: int, label: int, encoding: int, name: str
    ) -> None:
        checksum = xxhash.xxh3_64_intdigest(content)
        self.rows += _RECORD.pack(offset, len(self.names), checksum, len(content), 0, height, width, label, encoding)
        self.names += as_bytes(name) + b"\n"

    def reject(self, name: str, kind: str, reason: str) -> None:
        self.rejected.append({"name": name, "kind": kind, "reason": reason})

    def save(self, path: Path) -> None:
        facts = {"files": [asdict(file) for file in self.files], "rejected": self.rejected, "changed": self.changed}
        with whole_file(path) as file:
            file.write(json.dumps(facts | {"rows": len(self.rows)}).encode() + b"\n" + self.rows + self.names)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """ShardError for a report that cannot be read."""
        head, _, content = path.read_bytes().partition(b"\n")
        try:
            facts = json.loads(head)
            files, stop = [StoredFile(**file) for file in facts["files"]], facts["rows"]
        except (ValueError, TypeError, KeyError) as error:
            raise ShardError(f"{path} cannot be read ({error}): remove it and run the same command again.") from None
        return cls(files, facts["rejected"], facts["changed"], bytearray(content[:stop]), bytearray(content[stop:]))


def report_path(out: Path, shard: int) -> Path:
    return out / STATE_NAME / f"shard-{shard:06d}.report"


class Samples:
    """Samples written one after the other, as a tar shard has them, or a part of a beton."""

    def __init__(self, file: BinaryIO, shard: int | None) -> None:
        """`shard`: the number of the tar shard; None for a part."""
        self._file, self._shard, self._hash, self._count, self._byte_count = file, shard, xxhash.xxh3_128(), 0, 0

    def add(self, content: bytes, label: int) -> int:
        """Append a sample; the position of its first byte in the file. A beton has the labels in tables."""
        start = self._byte_count
        if self._shard is None:
            self._write(content)
        else:
            start += tarfile.BLOCKSIZE
            key = f"{self._shard:06d}_{self._count:06d}"  # shards don't depend on each other
            cls = b"" if label == NO_LABEL else _tar_member(f"{key}.cls", b"%d" % label)
            self._write(_tar_member(f"{key}.jpg", content) + cls)
        self._count += 1
        return start

    def finish(self, name: str) -> StoredFile:
        if self._shard is not None:  # two empty blocks end a tar, filled up to a whole record
            end = self._byte_count + 2 * tarfile.BLOCKSIZE
            self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        checksum = self._hash.hexdigest()
        return StoredFile(name=name, byte_count=self._byte_count, sample_count=self._count, checksum=checksum)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._byte_count += len(data)


_TAR_HEADER = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
_TAR_HEADER[148:156] = b"      \0 "  # the checksum, over a field of blanks; written in six digits


def tar_header(name: str, byte_count: int) -> bytes:
    """One block. Owner, time and mode stay at their defaults: the same bytes always."""
    header = bytearray(_TAR_HEADER)  # tarfile takes 45 us for one
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % byte_count
    header[148:154] = b"%06o" % (sum(header) + 32)  # the blank that is a zero byte by now
    return bytes(header)


def _tar_member(name: str, content: bytes) -> bytes:
    return b"".join((tar_header(name, len(content)), content, bytes(-len(content) % tarfile.BLOCKSIZE)))


def _write_shard(job: Job, shard: int, tally: "Tally") -> tuple[Report, Path]:
    """Read, check and write the pictures of one shard; its report, and the unfinished file that `_commit` gives its name."""
    report, path, is_tar = Report(), job.path(shard), job.target.container == "tar"
    unfinished = path.with_name(f"{path.name}.rank-{tally.rank}-{os.getpid()}.unfinished")
    try:
        with naming(path), unfinished.open("wb") as file:
            samples = Samples(file, shard if is_tar else None)
            for entry, source in _read_ahead(Reader(job.listing.facts), job.entries(shard)):
                tally(entry, _add(job, report, samples, entry, source))
            if len(report):  # without sound pictures there is no file
                report.files.append(samples.finish(path.name))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return report, unfinished


def _commit(job: Job, shard: int, report: Report, unfinished: Path) -> None:
    """Give a shard its name, once it is on the disk, and report it."""
    with naming(job.path(shard)):
        if job.target.container == "tar":  # a part of a beton is compared with its checksum when it is laid into it
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, job.path(shard)) if report.files else unfinished.unlink()
    report.save(report_path(job.out, shard))


def _add(job: Job, report: Report, samples: Samples, entry: Entry, source: bytes | Unreadable) -> str:
    """Append one picture, or note why not and return the reason."""
    try:
        if isinstance(source, Unreadable):
            raise source
        prepared = _prepare(source, entry, job)
    except (BadPicture, Unreadable) as bad:
        report.reject(entry.name, bad.kind, str(bad))
        return job.about(entry.name, str(bad))
    offset = samples.add(prepared.content, entry.label)
    about = {"height": prepared.height, "width": prepared.width, "encoding": prepared.encoding}
    report.add(prepared.content, offset=offset, label=entry.label, name=entry.name, **about)
    if prepared.changes:
        report.changed.append({"name": entry.name, "changes": list(prepared.changes)})
    return ""


def _prepare(source: bytes, entry: Entry, job: Job) -> Prepared:
    treatment = job.target.treatment
    if not entry.checksum:
        return prepare_picture(source, treatment)
    # Of a packed set: decoded when that was written, so its checksum tells whether it is still sound.
    if xxhash.xxh3_64_intdigest(source) != entry.checksum:
        root = job.listing.facts.root
        raise PackingStopped(
            f"{root} is damaged at {entry.name}, in {job.listing.facts.containers[entry.container]}: see what "
            f"python data_prep/verify.py {root} says."
        )
    if treatment.write_mode == "jpg" and treatment.short_side is None and treatment.max_resolution is None:
        return Prepared(source, packed.JPEG, *jpeg_size(source), ())
    return prepare_picture(source, treatment)


def _read_ahead(reader: Reader, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | Unreadable]]:
    """Entries with their bytes, in order; disks and networks like several requests at a time."""

    def read(entry: Entry) -> bytes | Unreadable:
        try:
            return reader.read(entry)
        except Unreadable as fault:
            return fault

    ahead, ahead_bytes = deque(), 0
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for entry in itertools.chain(entries, [None]):
            if entry is not None:
                ahead.append((entry, pool.submit(read, entry)))
                ahead_bytes += entry.byte_count
            while ahead and (entry is None or ahead_bytes > _READ_AHEAD_BYTES or len(ahead) > _READ_AHEAD):
                first, reading = ahead.popleft()
                ahead_bytes -= first.byte_count
                yield first, reading.result()


# ---------------------------------------------------------------------------------------------------- all shards


class Tally:
    """What this rank has looked at: pictures, their bytes, and how many were left out. Shared by its processes."""

    def __init__(self, config: PackConfig, total: int, rank: int) -> None:
        self._config, self._total, self.rank = config, total, rank
        self._numbers, self.stopped = _SPAWN.Array("q", 3), _SPAWN.Event()

    def add(self, pictures: int = 0, byte_count: int = 0, bad: int = 0) -> tuple[int, int, int]:
        """What there are by now."""
        with self._numbers.get_lock():
            for place, more in enumerate((pictures, byte_count, bad)):
                self._numbers[place] += more
            return tuple(self._numbers)

    def __call__(self, entry: Entry, fault: str) -> None:
        """Count a picture, which is left out where there is a `fault`. PackingStopped where that is too much."""
        looked_at, _, bad = self.add(1, entry.byte_count, bool(fault))
        if self.stopped.is_set():
            raise PackingStopped("another process has stopped")
        if fault and (looked_at >= _LEAST_LOOKED_AT or not self._config.bad_limit):
            _check_bad(self._config, bad, looked_at, self._total, fault)


def _check_bad(config: PackConfig, bad: int, looked_at: int, total: int, example: str) -> None:
    """PackingStopped where more is left out than the limit allows; ValueError where nothing is left."""
    if bad > config.bad_limit * total:
        share = f"{bad / looked_at:.2%}"
        so_far = f"the {looked_at} pictures looked at so far ({share}; there are {total})"
        raise PackingStopped(
            f"{bad} of {f'{total} pictures ({share})' if looked_at == total else so_far} cannot be packed, such as {example}; "
            f"that is more than --bad-limit {config.bad_limit} of all: raise the limit, and the same command goes on, or mend "
            f"the source and, to begin anew, {BEGIN_ANEW}."
        )
    if bad == total:
        raise ValueError(f"{config.data} holds no picture that can be packed ({example}); give another --data.")


def _write_shards(job: Job, config: PackConfig, ranks: Ranks, console: Console) -> None:
    """All shards of this rank that are not done yet. While one is brought to the disk, the next is begun."""
    mine = range(ranks.rank, job.num_shards, ranks.world_size)
    tally = Tally(config, len(job.listing), ranks.rank)
    todo = [shard for shard in mine if not job.is_done(shard)]
    for report in map(job.report, set(mine).difference(todo)):
        tally.add(len(report) + len(report.rejected), 0, len(report.rejected))
    workers, commits = min(config.num_workers, len(todo)), deque()
    written = _written_here(job, todo, tally) if workers < 2 else _written_by_processes(job, todo, workers, tally)
    try:
        _remove_unfinished(job, ranks)
        with _progress(ranks, len(job.listing) * len(mine) // job.num_shards, tally, console):
            with ThreadPoolExecutor(1) as disk, contextlib.closing(written):
                for shard, report, unfinished in written:
                    commits.append(disk.submit(_commit, job, shard, report, unfinished))
                    if len(commits) > workers:
                        commits.popleft().result()
            for commit in commits:
                commit.result()
    except BaseException:
        _remove_unfinished(job, ranks)
        raise


def _remove_unfinished(job: Job, ranks: Ranks) -> None:
    """What stopped processes of this rank left."""
    for folder in (job.out, job.state):
        remove_unfinished(folder, f"*.rank-{ranks.rank}-*")


def _written_here(job: Job, todo: list[int], tally: Tally) -> Iterator[tuple[int, Report, Path]]:
    for shard in todo:
        yield shard, *_write_shard(job, shard, tally)


def _written_by_processes(job: Job, todo: list[int], workers: int, tally: Tally) -> Iterator[tuple[int, Report, Path]]:
    """Each process takes the next shard when it has done one. One that dies ends the run in one sentence."""
    pool = ProcessPoolExecutor(workers, _SPAWN, _begin_worker, (job.out, tally))
    try:
        for written in as_completed([pool.submit(_write_in_worker, shard) for shard in todo]):
            yield written.result()
    except BrokenExecutor:
        raise PackingStopped(
            "A worker process died while it was packing: run the same command again, it goes on with the shards that are "
            "missing (with fewer --workers, if memory ran out)."
        ) from None
    finally:
        tally.stopped.set()  # a worker sees it within a picture, and leaves nothing
        pool.shutdown(cancel_futures=True)


def _begin_worker(out: Path, tally: Tally) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
    end_with_parent()
    _worker = Job.open(out), tally


def _write_in_worker(shard: int) -> tuple[int, Report, Path]:
    job, tally = _worker
    return shard, *_write_shard(job, shard, tally)


@contextlib.contextmanager
def _progress(ranks: Ranks, total: int, tally: Tally, console: Console) -> Iterator[None]:
    """One line that is renewed, of at most 80 columns."""
    start, (before, *_), ended = time.perf_counter(), tally.add(), threading.Event()
    title = f"rank {ranks.rank}" if ranks.world_size > 1 else "packing"

    def follow(status: Status) -> None:
        while not ended.wait(0.1):
            pictures, byte_count, bad = tally.add()
            rate = (pictures - before) / (time.perf_counter() - start)
            left = datetime.timedelta(seconds=round((total - pictures) / rate)) if rate else "-:--:--"
            megabytes = byte_count / BYTES_PER_MB / (time.perf_counter() - start)
            bads = f" {bad} bad" if bad else ""
            status.update(f"{title} {pictures}/{total} {rate:.0f}/s {megabytes:.0f} MB/s{bads} left {left}")

    with console.status(title) as status, ThreadPoolExecutor(1) as thread:
        thread.submit(follow, status)
        try:
            yield
        finally:
            ended.set()


# ---------------------------------------------------------------------------------------------------- joining


def join(out: Path, num_shards: int, facts: dict, beton: BetonFile | None) -> DatasetIndex:
    """Write index, names, lists and manifest of the `num_shards` reported shards of `out`, and open the set.

    `facts`: what the manifest says and no report knows. Of a beton, `beton` has all parts by now. May be stopped at any moment
    and called again. One report is in memory at a time.
    """

    def reports() -> Iterator[Report]:
        return (Report.load(report_path(out, shard)) for shard in range(num_shards))

    num_samples, shards, dali_indices, content = sum(map(len, reports())), [], [], xxhash.xxh3_128()
    kinds, changes, changed_names, num_changed, names_end = Counter(), Counter(), [], 0, 0
    listed = [out / name for name in (packed.INDEX_NAME, packed.NAMES_NAME, packed.REJECTED_NAME, packed.CHANGED_NAME)]
    with contextlib.ExitStack() as stack:
        index, names, rejected, changed = (stack.enter_context(whole_file(path)) for path in listed)
        header = {"descr": np.lib.format.dtype_to_descr(RECORD_DTYPE), "fortran_order": False, "shape": (num_samples,)}
        np.lib.format.write_array_header_1_0(index, header)
        for number, report in enumerate(reports()):
            records = report.records
            if beton is not None:
                beton.write_tables(records)
            elif report.files:
                records["shard"] = len(shards)
                dali_indices.append(_write_dali_index(out, number, records))
                shards += report.files
            records["name_offset"] += np.uint64(names_end)
            names_end += len(report.names)
            index.write(records.tobytes())
            names.write(report.names)
            content.update(packed.content_of(records))
            kinds.update(entry["kind"] for entry in report.rejected)
            changes.update(change for entry in report.changed for change in entry["changes"])
            changed_names += [entry["name"] for entry in report.changed]
            del changed_names[packed.MAX_NAMES_IN_MANIFEST :]
            num_changed += len(report.changed)
            rejected.write(_json_lines(report.rejected))
            changed.write(_json_lines(report.changed))
    counts = num_samples, num_samples, kinds.total(), num_changed
    stored = [packed.stored_file(path, count) for path, count in zip(listed, counts, strict=True)]
    manifest = Manifest(
        format=packed.FORMAT,
        version=packed.VERSION,
        num_samples=num_samples,
        rejected=dict(sorted(kinds.items())),
        changed=dict(sorted(changes.items())),
        changed_names=tuple(changed_names),
        content=content.hexdigest(),
        **dict(zip(("index", "names", "rejected_list", "changed_list"), stored, strict=True)),
        shards=tuple(shards) if beton is None else (beton.commit(),),
        dali_indices=tuple(dali_indices),
        **facts,
    )
    with whole_file(out / packed.MANIFEST_NAME) as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")
    return DatasetIndex.open(out)


def _json_lines(entries: Iterable[dict]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def _write_dali_index(out: Path, shard: int, records: NDArray[np.void]) -> StoredFile:
    """With which DALI's own WebDataset reader reads a tar shard: of each member its extension, position, byte count and name."""
    lines, path = [f"v1.2 {len(records)}\n"], out / f"shard-{shard:06d}.idx"
    for place, (offset, byte_count, label) in enumerate(records[["offset", "byte_count", "label"]].tolist()):
        key = f"{shard:06d}_{place:06d}"
        line, end = f"jpg {offset} {byte_count} {key}.jpg", offset + byte_count + -byte_count % tarfile.BLOCKSIZE
        has_label = label != NO_LABEL
        lines.append(line + (f" cls {end + tarfile.BLOCKSIZE} {len(str(label))} {key}.cls" if has_label else "") + "\n")
    with whole_file(path) as file:
        file.write("".join(lines).encode())
    return packed.stored_file(path, len(records))


# ---------------------------------------------------------------------------------------------------- the commands


def run(script: str, config_type: type[PackConfig]) -> None:
    """A writer's command: pack and sum up, or say what packing would be (--plan)."""
    run_script(script, lambda: _command(tyro.cli(config_type)))


def _command(config: PackConfig) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are closed and taken away
    target, ranks = config.target(), Ranks.from_environment()
    try:
        if config.plan:
            for name, value in forecast(config, target).items():
                print(f"{name:16} {value}")
            return
        index = pack(config, target, show_progress=True)
    except OSError as error:
        raise PackingStopped(
            f"Packing {config.data} into {config.out} stopped ({sentence_of(error)}): see to that and run the same command "
            "again, it goes on where it stopped."
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what is finished lies in {config.out}, the same command goes on") from None
    idle = f"Rank {ranks.rank} of {ranks.world_size} has nothing left to write; rank 0 joins."
    print(_summary(index) if index else idle)


def _summary(index: DatasetIndex) -> str:
    manifest, count = index.manifest, len(index.manifest.shards)
    megabytes = sum(shard.byte_count for shard in manifest.shards) / BYTES_PER_MB
    classes = f" of {len(index.class_names)} classes" if index.class_names else ""
    what = manifest.shards[0].name if manifest.container == "beton" else f"{count} shard{'s' * (count != 1)}"
    rejected, changed = kinds_in_words(manifest.rejected), kinds_in_words(manifest.changed)
    return (
        f"Packed {len(index)} pictures{classes} into {what}, {megabytes:.1f} MB.\n"
        f"Left out: {f'{rejected} (see {packed.REJECTED_NAME})' if rejected else 'none'}.\n"
        f"Changed: {f'{changed} (see {packed.CHANGED_NAME})' if changed else 'none'}.\n"
        f"Ignored, as no pictures: {kinds_in_words(manifest.ignored) or 'none'}."
    )


def forecast(config: PackConfig, target: Target) -> dict[str, str]:
    """What a packing would be, by name, for people: the source is listed and some hundred pictures are tried.

    Writes nothing that stays. Raises ValueError as packing would.
    """
    config.check()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config.out, target, 0, list_source(config.data, Path(folder) / _LISTING_NAME))
        sizes, bad, seconds = _try_some(job)
    facts, tried, gigabytes = job.listing.facts, len(sizes) + len(bad), 1000 * BYTES_PER_MB
    expected = facts.count * (sum(sizes) / max(1, len(sizes)) + _PER_SAMPLE_BYTES[target.container])
    free = shutil.disk_usage(next(path for path in (config.out, *config.out.absolute().parents) if path.is_dir())).free
    classes = f"in {len(facts.class_names):,} classes" if facts.class_names else "no labels"
    hours = facts.count * seconds / tried / config.num_workers / 3600
    return {
        "source": facts.kind,
        "pictures": f"{facts.count:,} {classes}, {facts.total_bytes / gigabytes:.3f} GB",
        "files of samples": f"{job.num_shards if target.container == 'tar' else 1:,}",
        "expected size": f"{expected / gigabytes:.3f} GB, from {tried} pictures",
        "free disk": f"{free / gigabytes:.1f} GB"
        + ("" if free > expected else " - NOT ENOUGH: make room, or give another --out"),
        "rate": f"{tried / seconds:.0f} pictures/s per process, tried without writing",
        "time": f"{hours:.2f} hours with {config.num_workers} processes, if the disks keep up",
        "cannot be packed": f"{len(bad)} of the {tried} that were tried" + (f", such as {bad[0]}" if bad else ""),
        "ignored": kinds_in_words(facts.ignored) or "none",
    }


def _try_some(job: Job) -> tuple[list[int], list[str], float]:
    """Bytes of what would be stored, what would be left out, and seconds, of pictures drawn from the whole source."""
    order = permute(np.arange(min(_TRIAL_PICTURES, len(job.listing))), len(job.listing), 0, 0)
    sizes, bad, reader, start = [], [], Reader(job.listing.facts), time.perf_counter()
    for position in order.tolist():
        entry = job.listing.entry(position)
        try:
            sizes.append(len(prepare_picture(reader.read(entry), job.target.treatment).content))
        except (BadPicture, Unreadable) as fault:
            bad.append(job.about(entry.name, str(fault)))
        if time.perf_counter() - start > _TRIAL_S:
            break
    return sizes, bad, time.perf_counter() - start

"""Both writers: from a source of pictures to a packed set, by several processes, on one or more machines.

    list      what pictures there are, once, on disk (data_prep/sources.py)
    shuffle   one permutation of all of them, evaluated where it is needed
    shards    cut at fixed places of that order; each is one process's work: read, check, write, report
    join      index, names, lists and manifest, by rank 0 when all shards are reported

A shard is done when its report is there, and its file as long as that says. All that a run knows lies in OUT/packing: the
job, the listing, a report per shard. Nothing in a packed set depends on which process wrote what.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

import numpy as np
import tyro
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from data_prep import index as packed
from data_prep.beton import BetonFile, report_path, shard_path
from data_prep.index import BEGIN_ANEW, NO_LABEL, RECORD_DTYPE, STATE_NAME, DatasetIndex, Manifest, StoredFile
from data_prep.pictures import BadPicture, Prepared, Treatment, prepare_picture
from data_prep.sources import Entry, Source, as_bytes, is_packed, kinds_in_words, list_source, open_listing
from data_prep.store import CACHE_GB, address_of, local_copy
from inscon import guard
from inscon.sampling import permute

BYTES_PER_MB = 1_000_000
_JOB_NAME, _LISTING_NAME = "job.json", "listing.sqlite"
_PACKING_ORDER = 2**32 - 1  # an epoch number that no training reaches: packing shuffles unlike any epoch
_READ_AHEAD_BYTES, _READ_AHEAD, _HANDFUL, _READ_THREADS = 16_000_000, 8, 8, 4
_LEAST_LOOKED_AT = 1000  # pictures, before bad ones among them stop a run
_SPAWN = get_context("spawn")  # forking beside threads (rich has one) may hang


@dataclass(frozen=True, kw_only=True)
class PackConfig(Treatment):
    """What both writers ask for."""

    container: ClassVar[Literal["tar", "beton"]]
    writer: ClassVar[str]  # the script, for the manifest
    shard_mb: ClassVar[int]

    data: Path
    """Where the pictures are: a folder of class folders, a flat folder, a list file (path, optional label), a tar of tars
    (ILSVRC2012_img_train.tar), a WebDataset tar or a folder of them, or a packed set. An address (s3://, https://, ...) of any of
    these but a list is fetched first."""
    out: Path  # Folder for the packed set; made if need be.
    seed: int | None = None  # Of the one shuffle of all pictures. None: 0, but a packed set keeps its order.
    write_mode: tyro.conf.Suppress[Literal["jpg"]] = "jpg"
    workers: int | None = None  # Processes that read, check and write. None: one per CPU core of this process.
    bad_limit: float = 0.001  # Share of the pictures that may be left out before the run stops; 0: at the first one.
    cache_dir: Path | None = None  # Where what was fetched is kept. None: inscon-stores in ~/.cache.
    cache_gb: float = CACHE_GB  # GB (of 10^9 bytes) that may lie there; all of `data` must fit.
    overwrite: bool = False  # Replace the packed set that lies in `out`, or an unfinished one of other settings.

    def check(self) -> None:
        """ValueError for settings out of range, and for a source or a target that cannot be one."""
        guard.check_ranges(self, workers=1, shard_mb=1, short_side=1, max_resolution=1, cache_gb=0)
        guard.check_ranges(self, seed=(0, 2**64 - 1), bad_limit=(0, 1), quality=(1, 100))
        if address_of(self.data):
            return
        if not self.data.exists():
            raise ValueError(f"{self.data} does not exist; give a folder, a list file or a tar to --data.")
        source, out = self.data.resolve(), self.out.resolve()
        if source.is_dir() and out.is_relative_to(source):
            raise ValueError(f"--out {self.out} is inside --data {self.data}, among the pictures; move it out.")
        if source in packed.format_files(out):
            raise ValueError(f"--data {self.data} is part of --out {self.out}, to be replaced; give another --out.")

    @property
    def shard_bytes(self) -> int:
        return self.shard_mb * BYTES_PER_MB

    @property
    def settings(self) -> dict[str, Any]:  # for the manifest
        treatment = {setting.name: getattr(self, setting.name) for setting in fields(Treatment)}
        return {"writer": self.writer, "shard_mb": self.shard_bytes / BYTES_PER_MB, **treatment}


class Ranks(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    world_size: int


def pack(config: PackConfig, *, show_progress: bool = False, ranks: Ranks | None = None) -> DatasetIndex | None:
    """Pack `config.data` into `config.out`; the packed set, opened, or None on ranks other than 0. Raises ValueError, one
    sentence with the remedy. A run that was stopped, by whatever, is continued."""
    config.check()
    config = replace(config, data=local_copy(config.data, config.cache_dir, config.cache_gb, pictures=True))
    ranks = ranks or Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    console, state = Console(stderr=True, quiet=not show_progress), config.out / STATE_NAME
    if ranks.rank != 0:
        job = _job_of_rank_0(config, ranks, console)
        if job is not None:
            with guard.only_process(state / f"rank-{ranks.rank}", "--out"):
                _write_shards(job, console)
        return None
    made_folder = not config.out.exists()
    try:
        with guard.only_process(state / "rank-0", "--out"):
            try:
                index = _write_set(_open_job(config, ranks, console), console)
                (state / _JOB_NAME).unlink()  # first: without it there is nothing to go on with
                return index
            finally:
                if not (state / _JOB_NAME).exists():
                    shutil.rmtree(state, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # something lies in it
            made_folder and config.out.rmdir()


def _write_set(job: "Job", console: Console) -> DatasetIndex:
    is_tar = job.config.container == "tar"
    beton = None if is_tar else BetonFile(job.config.out, job.num_shards, len(job.listing), job.report)
    with contextlib.closing(beton) if beton else contextlib.nullcontext():
        _write_shards(job, console, beton)
        for rank in range(1, job.ranks.world_size):
            with guard.say_if_long(f"rank {rank}, to write its shards; start it, if it is not running"):
                for shard in job.shards_of(rank):
                    while not job.is_done(shard):
                        time.sleep(0.2)
        if beton:
            beton.lay()
        guard.remove_unfinished(job.config.out)  # what killed processes left
        bad, example = 0, None  # of all ranks together
        for report in map(job.report, range(job.num_shards)):
            bad, example = bad + len(report.rejected), report if report.rejected else example
        _check_bad(job, bad, len(job.listing), example)
        if bad == len(job.listing):
            (job.config.out / STATE_NAME / _JOB_NAME).unlink()  # there is nothing to go on with
            for empty in packed.format_files(job.config.out):
                empty.unlink()
            raise ValueError(f"{job.config.data} holds no picture that can be packed; give another --data.")
        seed = job.listing.index.manifest.shuffle_seed if job.seed is None else job.seed
        facts = {
            "container": job.config.container, "settings": job.config.settings, "shuffle_seed": seed,
            "class_names": tuple(job.listing.facts.class_names), "ignored": job.listing.facts.ignored,
        }  # fmt: skip
        return join(job.config.out, job.num_shards, facts, beton)


@dataclass(frozen=True)
class Job:
    """The work of a run; every process has the same."""

    config: PackConfig
    listing: Source
    ranks: Ranks

    @property
    def seed(self) -> int | None:
        """None: the listing's order is kept."""
        is_shuffled = self.listing.facts.kind == "packed"
        return self.config.seed if self.config.seed is not None or is_shuffled else 0

    @property
    def num_shards(self) -> int:
        """Of a beton, whose bytes don't depend on it, even a small set has some for every worker."""
        facts = self.listing.facts
        count = max(1, math.ceil(facts.total_bytes / self.config.shard_bytes))
        if self.config.container == "beton":
            count = max(count, min(64, facts.count // 100), facts.count // 1000)
        return min(count, facts.count)

    def shards_of(self, rank: int) -> range:
        return range(rank, self.num_shards, self.ranks.world_size)

    def entries(self, shard: int) -> Iterator[Entry]:
        """The pictures of one shard, in order."""
        count = len(self.listing)
        positions = np.arange(shard * count // self.num_shards, (shard + 1) * count // self.num_shards)
        if self.seed is not None:
            positions = permute(positions, count, self.seed, _PACKING_ORDER)
        return (self.listing.entry(int(position)) for position in positions)

    def report(self, shard: int) -> "Report | None":
        try:
            return Report.load(report_path(self.config.out, shard))
        except FileNotFoundError:
            return None

    def is_done(self, shard: int) -> bool:
        """Whether its file and its report are there, or the beton has it by now."""
        report, path = self.report(shard), shard_path(self.config.out, shard)
        if report is None or not path.exists():
            return report is not None and self.config.container == "beton"
        return path.stat().st_size == report.file.byte_count


def _wanted(config: PackConfig) -> dict:
    """What decides a set's bytes: a run goes on only where this is the same."""
    content = DatasetIndex.open(config.data).fingerprint if is_packed(config.data) else None
    return {"data": str(config.data.absolute()), "content": content, "seed": config.seed, **config.settings}


def _read_job(state: Path) -> dict | None:
    try:
        return json.loads((state / _JOB_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _open_job(config: PackConfig, ranks: Ranks, console: Console) -> Job:
    """The job in OUT/packing, as this command wants it; made where there is none."""
    state, wanted = config.out / STATE_NAME, _wanted(config)
    found, listing_path = _read_job(state), state / _LISTING_NAME
    if found == wanted:
        job = Job(config, open_listing(config.data, listing_path), ranks)
        console.print(f"Going on with {config.out}: {len(job.listing)} pictures are listed.", highlight=False)
        return job
    if not config.overwrite:
        _refuse_other_work(config, found, wanted)
    (state / _JOB_NAME).unlink(missing_ok=True)
    for path in state.iterdir():
        if path.is_file():
            path.unlink()
    with console.status(f"Listing {config.data}"):
        listing = list_source(config.data, listing_path)
    (config.out / packed.MANIFEST_NAME).unlink(missing_ok=True)  # first: a folder with a manifest is complete, always
    for old in packed.format_files(config.out):
        old.unlink()
    with guard.whole_file(state / _JOB_NAME) as file:
        file.write(json.dumps(wanted, indent=1).encode())
    return Job(config, listing, ranks)


def _refuse_other_work(config: PackConfig, found: dict | None, wanted: dict) -> None:
    if found is not None:
        name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise packed.ShardError(
            f"{config.out} holds an unfinished packing with other settings ({name} {found.get(name)}, now {wanted.get(name)}): run "
            "it as it was begun, pass --overwrite to begin anew, or give another --out."
        )
    if old := packed.format_files(config.out):
        raise packed.ShardError(
            f"{config.out} already holds a packed data set ({old[0].name}): pass --overwrite to replace it, or give another --out."
        )


def _job_of_rank_0(config: PackConfig, ranks: Ranks, console: Console) -> Job | None:
    """Once rank 0 has made it; None where all is done already."""
    state, wanted, begun = config.out / STATE_NAME, _wanted(config), time.time()
    console.print("Waiting for rank 0, which lists the pictures; start it, if it is not running.")
    while (found := _read_job(state)) != wanted:
        if found is not None and not config.overwrite:
            _refuse_other_work(config, found, wanted)
        with contextlib.suppress(packed.ShardError, FileNotFoundError):
            # With --overwrite an older set is the one that rank 0 is about to replace.
            is_new = not config.overwrite or (config.out / packed.MANIFEST_NAME).stat().st_mtime > begun
            if found is None and is_new and Manifest.read(config.out).settings == config.settings:
                return None
        time.sleep(0.2)
    return Job(config, open_listing(config.data, state / _LISTING_NAME), ranks)


@dataclass
class Report:
    """What one shard holds; written after its file."""

    file: StoredFile | None = None  # None until it is whole
    rejected: list[dict] = field(default_factory=list)
    changed: list[dict] = field(default_factory=list)
    rows: bytearray = field(default_factory=bytearray)  # RECORD_DTYPE, where names begin in `names`
    names: bytearray = field(default_factory=bytearray)  # one line each, as in names.txt

    def __len__(self) -> int:
        return len(self.rows) // RECORD_DTYPE.itemsize

    @property
    def records(self) -> NDArray[np.void]:
        return np.frombuffer(bytearray(self.rows), RECORD_DTYPE)

    def save(self, path: Path) -> None:
        facts = {"files": [asdict(self.file)], "rejected": self.rejected, "changed": self.changed}
        with guard.whole_file(path) as file:
            file.write(json.dumps(facts | {"rows": len(self.rows)}).encode() + b"\n" + self.rows + self.names)

    @classmethod
    def load(cls, path: Path) -> "Report":
        head, _, content = path.read_bytes().partition(b"\n")
        facts = json.loads(head)
        file, end = StoredFile(**facts.pop("files")[0]), facts.pop("rows")
        return cls(file, **facts, rows=bytearray(content[:end]), names=bytearray(content[end:]))


class Samples:
    """Samples written one after the other into tar shard number `shard`; reported as they are."""

    def __init__(self, file: BinaryIO, shard: int) -> None:
        self.report = Report()
        self._file, self._shard, self._hash = file, shard, xxhash.xxh3_128()

    def add(self, picture: Prepared, label: int, name: str) -> None:
        """Append a sample; one without a label has no .cls."""
        content, encoding, height, width, changes = picture
        report, checksum = self.report, xxhash.xxh3_64_intdigest(content)
        key, start = f"{self._shard:06d}_{len(report):06d}", self._file.tell() + tarfile.BLOCKSIZE
        cls = b"" if label == NO_LABEL else _tar_member(f"{key}.cls", b"%d" % label)
        self._write(_tar_member(f"{key}.jpg", content) + cls)
        row = start, len(report.names), checksum, len(content), 0, height, width, label, encoding
        report.rows += np.array(row, RECORD_DTYPE).tobytes()
        report.names += as_bytes(name) + b"\n"
        if changes:
            report.changed.append({"name": name, "changes": list(changes)})

    def finish(self, name: str) -> None:
        """The end of the file, which is called so: two empty blocks, filled up to a whole record."""
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self.report.file = StoredFile(name, self._file.tell(), len(self.report), self._hash.hexdigest())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)


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


_stopped = threading.Event()  # set where the workers are to end, which they do within a picture


def _write_shard(job: Job, shard: int) -> tuple[int, Report]:
    """Read, check and write the pictures of one shard: its number and what `_commit` reports."""
    path = shard_path(job.config.out, shard)
    try:
        path.unlink(missing_ok=True)  # a process that is just being killed may still write into it
        with guard.naming(path), path.open("wb") as file:
            samples = Samples(file, shard)
            for entry, source in _read_ahead(job, job.entries(shard)):
                _add(job, samples, entry, source)
                if _stopped.is_set():
                    raise ValueError("another process has stopped")
                bad = len(samples.report.rejected)
                _check_bad(job, bad, len(samples.report) + bad, samples.report)
            samples.finish(path.name)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return shard, samples.report


def _commit(job: Job, beton: BetonFile | None, shard: int, report: Report) -> None:
    """Report a shard, once it is on the disk: without a report its file counts for nothing."""
    if job.config.container == "tar":  # a beton's samples are compared with their checksums when they are laid into it
        path = shard_path(job.config.out, shard)
        with guard.naming(path), path.open("rb") as file:
            os.fsync(file.fileno())
    report.save(report_path(job.config.out, shard))
    if beton:
        beton.lay()


def _add(job: Job, samples: Samples, entry: Entry, source: bytes | BadPicture) -> None:
    try:
        if isinstance(source, BadPicture):
            raise source
        is_sound = job.listing.facts.kind == "packed"  # its samples were decoded when it was written
        samples.add(prepare_picture(source, job.config, is_sound), entry.label, entry.name)
    except BadPicture as bad:
        samples.report.rejected.append({"name": entry.name, "kind": bad.kind, "reason": str(bad)})


def _read_ahead(job: Job, entries: Iterator[Entry]) -> Iterator[tuple[Entry, bytes | BadPicture]]:
    """Entries with their bytes, in order; disks and networks like several requests at a time."""

    def read(entry: Entry) -> tuple[Entry, bytes | BadPicture]:
        try:
            return entry, job.listing.read(entry)
        except BadPicture as fault:
            return entry, fault

    ahead = deque()
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        while handful := list(itertools.islice(entries, _HANDFUL)):  # to hand over one costs as much as to read one
            ahead.append((sum(entry.byte_count for entry in handful), pool.submit(list, map(read, handful))))
            while sum(size for size, _ in ahead) > _READ_AHEAD_BYTES or len(ahead) > _READ_AHEAD:
                yield from ahead.popleft()[1].result()
        for _, handful in ahead:
            yield from handful.result()


def _check_bad(job: Job, bad: int, looked_at: int, report: Report) -> None:
    """ValueError where more pictures are left out than the limit allows, such as `report` has."""
    config, total = job.config, len(job.listing)
    enough = looked_at >= min(total, _LEAST_LOOKED_AT) or not config.bad_limit
    if enough and bad > config.bad_limit * total:
        example = "{name}: {reason}".format(**report.rejected[0])
        if job.listing.facts.kind == "list":
            example += f" (a list's paths start at {job.listing.facts.root})"
        so_far = "" if looked_at == total else f" looked at so far (there are {total})"
        raise ValueError(
            f"{bad} of {looked_at} pictures{so_far} cannot be packed, such as {example}; that is more than --bad-limit "
            f"{config.bad_limit} of all: raise the limit, and the same command goes on, or mend the source and, to begin anew, "
            f"{BEGIN_ANEW}."
        )


def _write_shards(job: Job, console: Console, beton: BetonFile | None = None) -> None:
    """All shards of this rank that are not done yet. While one is brought to the disk, the next is begun."""
    todo, looked_at, bad = [shard for shard in job.shards_of(job.ranks.rank) if not job.is_done(shard)], 0, 0
    workers, commits = min(job.config.workers or len(os.sched_getaffinity(0)), len(todo)), deque()
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    progress = Progress(*columns, console=console, transient=True, speed_estimate_period=600)
    title = f"rank {job.ranks.rank}" if job.ranks.world_size > 1 else "packing"
    task = progress.add_task(title, total=len(job.listing) * len(todo) // job.num_shards)
    for shard in todo:
        report_path(job.config.out, shard).unlink(missing_ok=True)
    with progress, ThreadPoolExecutor(1) as disk, contextlib.closing(_written(job, todo, workers)) as written:
        for shard, report in written:
            commits.append(disk.submit(_commit, job, beton, shard, report))
            if len(commits) > workers:
                commits.popleft().result()
            bad += len(report.rejected)
            looked_at += len(report) + len(report.rejected)
            progress.update(task, completed=looked_at)
            if report.rejected:  # which has an example
                _check_bad(job, bad, looked_at, report)
    for commit in commits:
        commit.result()


def _written(job: Job, todo: list[int], workers: int) -> Iterator[tuple[int, Report]]:
    """Each process takes the next shard when it has done one. One that dies ends the run in one sentence."""
    if workers < 2:
        yield from (_write_shard(job, shard) for shard in todo)
        return
    stopped = _SPAWN.Event()
    pool = ProcessPoolExecutor(workers, _SPAWN, _begin_worker, (job, stopped))
    try:
        for written in as_completed([pool.submit(_write_in_worker, shard) for shard in todo]):
            yield written.result()
    except BrokenExecutor:
        raise ValueError(
            "A worker process died while it was packing: run the same command again (with fewer --workers, if memory ran out)."
        ) from None
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _begin_worker(job: Job, stopped: Any) -> None:
    global _job, _stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
    guard.end_with_parent()
    _job, _stopped = job, stopped  # once: to open a packed source anew looks at all of its files


def _write_in_worker(shard: int) -> tuple[int, Report]:
    return _write_shard(_job, shard)


def join(out: Path, num_shards: int, facts: dict, beton: BetonFile | None) -> DatasetIndex:
    """Write index, names, lists and manifest of the `num_shards` reported shards of `out`, and open the set. `facts`: what the
    manifest says and no report knows. `beton`, if any, has all of them by now. May be stopped at any moment and called again. One
    report is in memory at a time."""

    def reports() -> Iterator[Report]:
        return (Report.load(report_path(out, shard)) for shard in range(num_shards))

    num_samples, shards, content = sum(map(len, reports())), [], xxhash.xxh3_128()
    kinds, changes, num_changed = Counter(), Counter(), 0
    with contextlib.ExitStack() as stack:
        files = (stack.enter_context(guard.whole_file(out / name)) for name in packed.LISTS.values())
        index, names, rejected, changed = files
        header = {"descr": np.lib.format.dtype_to_descr(RECORD_DTYPE), "fortran_order": False, "shape": (num_samples,)}
        np.lib.format.write_array_header_1_0(index, header)
        for report in reports():
            records = report.records
            if beton is None:
                records["shard"] = len(shards)
                shards.append(report.file)
            else:
                beton.write_tables(records)
            records["name_offset"] += np.uint64(names.tell())
            index.write(records.tobytes())
            names.write(report.names)
            content.update(packed.content_of(records))
            kinds.update(entry["kind"] for entry in report.rejected)
            changes.update(change for entry in report.changed for change in entry["changes"])
            num_changed += len(report.changed)
            for file, entries in ((rejected, report.rejected), (changed, report.changed)):
                file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
    counts = zip(packed.LISTS.items(), (num_samples, num_samples, kinds.total(), num_changed), strict=True)
    manifest = Manifest(
        num_samples=num_samples,
        rejected=dict(sorted(kinds.items())),
        changed=dict(sorted(changes.items())),
        content=content.hexdigest(),
        **{role: packed.stored_file(out / name, count) for (role, name), count in counts},
        shards=tuple(shards) if beton is None else (beton.commit(),),
        **facts,
    )
    with guard.whole_file(out / packed.MANIFEST_NAME) as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")
    return DatasetIndex.open(out)


def run(script: str, config_type: type[PackConfig]) -> None:
    """A writer's command: pack and sum up."""
    guard.run_script(script, lambda: _command(tyro.cli(config_type)))


def _command(config: PackConfig) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are closed and taken away
    try:
        index = pack(config, show_progress=True)
    except OSError as error:
        raise ValueError(
            f"stopped ({guard.sentence_of(error)}): see to that and run the same command again, it goes on where it stopped."
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what is finished lies in {config.out}, the same command goes on") from None
    print(_summary(index) if index else "This rank has nothing left to write; rank 0 joins.")


def _summary(index: DatasetIndex) -> str:
    manifest, container = index.manifest, index.manifest.container
    megabytes = sum(shard.byte_count for shard in manifest.shards) / BYTES_PER_MB
    what = f"{len(manifest.shards)} {container}{'s' * (len(manifest.shards) > 1)}, {megabytes:.1f} MB"
    rejected, changed = kinds_in_words(manifest.rejected), kinds_in_words(manifest.changed)
    return (
        f"Packed {len(index)} pictures of {len(index.class_names)} classes into {what}.\n"
        f"Left out: {f'{rejected} (see {manifest.rejected_list.name})' if rejected else 'none'}.\n"
        f"Changed: {f'{changed} (see {manifest.changed_list.name})' if changed else 'none'}.\n"
        f"Ignored, as no pictures: {kinds_in_words(manifest.ignored) or 'none'}."
    )

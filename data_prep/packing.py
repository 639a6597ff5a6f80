"""The engine of both writers: from a source of pictures to a packed set, by several processes, on one or more machines.

    list      what pictures there are, once, on disk (data_prep/sources.py)
    shuffle   one permutation of all of them, evaluated where it is needed
    shards    cut at fixed places of that order; each is one process's work: read, check, write, report
    join      index, names, lists and manifest, by rank 0 when all shards are reported

Everything that a run knows lies in OUT/packing: the job, the listing, a report per finished shard. The same command
after any stop reads it and goes on with the shards that have no report. Nothing in a packed set depends on which
process wrote what, so the number of workers and ranks doesn't change a byte.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from data_prep.index import BEGIN_ANEW, MANIFEST_NAME, STATE_NAME, DatasetIndex, Manifest, ShardError, format_files
from data_prep.job import JOB_NAME, LISTING_NAME, Job, PackingStopped, Progressed, Target
from data_prep.joining import BetonJoin, SetFacts, join
from data_prep.listing import Listing
from data_prep.locks import is_held, only_writer
from data_prep.new_file import NewFile
from data_prep.reading import UNREADABLE
from data_prep.shards import ShardReport
from data_prep.sources import list_source
from data_prep.workers import work_here, work_in_processes

BYTES_PER_MB = 1_000_000
_LEAST_LOOKED_AT = 1000
"""Pictures, before their share of bad ones stops a run."""
_RANK_WAIT_S = 120.0
"""How long a rank that isn't running is waited for."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What both writers ask for."""

    data: Path
    """Where the pictures are: a folder of class folders, a flat folder, a list file (path, optional label), a tar of tars
    (ILSVRC2012_img_train.tar), a WebDataset tar or a folder of them, or a packed set."""
    out: Path
    """Folder for the packed set; made if need be."""
    seed: int | None = None
    """Of the one shuffle of all pictures. None: 0, but a packed set keeps its order."""
    short_side: int | None = None
    """Shrink pictures whose shorter side is longer than this, px. None: store them as they are."""
    max_resolution: int | None = None
    """Shrink pictures whose longer side is longer than this, px. None: store them as they are."""
    quality: int = 95
    """JPEG quality, 1 to 100, of what has to be encoded again; sound pictures that need no shrinking are not."""
    chroma: Literal["444", "420"] = "444"
    """Color resolution of the same: 420 halves it in either direction, which decodes faster and is less exact."""
    workers: int | None = None
    """Processes that read, check and write; None: as many as there are CPU cores for this process."""
    on_bad: Literal["skip", "fail"] = "skip"
    """Whether a picture that cannot be packed is left out, or ends the run."""
    bad_limit: float = 0.001
    """Share of the pictures that may be left out before the run stops."""
    overwrite: bool = False
    """Replace the packed set that lies in `out`, or an unfinished one of other settings."""
    plan: bool = False
    """Say what would be done, how long it would take and how much disk it needs; write nothing."""

    def check(self) -> None:
        """ValueError for settings out of range."""
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed must be from 0 to 2**64-1. Found: {self.seed}.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1. Found: {self.workers}.")
        if self.on_bad not in ("skip", "fail"):
            raise ValueError(f"--on-bad must be skip or fail. Found: {self.on_bad}.")
        if not 0 <= self.bad_limit <= 1:
            raise ValueError(f"--bad-limit must be from 0 to 1. Found: {self.bad_limit}.")


class Ranks(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def pack(
    config: PackConfig, target: Target, *, show_progress: bool = False, ranks: Ranks | None = None
) -> DatasetIndex | None:
    """Pack `config.data` into `config.out`; the packed set, opened, or None on ranks other than 0.

    Raises ValueError, one sentence with the remedy. A run that was stopped, by whatever, is continued.
    """
    config.check()
    ranks = ranks or Ranks.from_environment()
    console = Console(stderr=True, quiet=not show_progress)
    check_places(config)
    made_folder = not config.out.exists()
    state = config.out / STATE_NAME
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{state} cannot be made ({error.strerror}): give another --out.") from None
    with only_writer(state, *ranks):
        try:
            job = _open_job(config, target, ranks, console)
            if job is None:
                return None
            if ranks.rank != 0:
                _write_shards(job, config, ranks, console)
                return None
            with _beton_joined_meanwhile(job) as joined:
                _write_shards(job, config, ranks, console)
                _wait_for_ranks(job, ranks, console)
                index = _join(job, config, joined)
            (state / JOB_NAME).unlink()  # first: without it there is nothing to go on with
            shutil.rmtree(state)
            return index
        finally:
            rank_0_is_away = ranks.rank == 0 or not is_held(state / "rank-0.lock")
            if rank_0_is_away and not (state / JOB_NAME).exists():
                _remove_state(state, made_folder)


# ---------------------------------------------------------------------------------------------------- the job


def _wanted(config: PackConfig, target: Target) -> dict:
    """What decides a set's bytes: a run goes on only where this is the same."""
    return {"data": str(config.data.absolute()), "asked_seed": config.seed, "target": asdict(target)}


def _open_job(config: PackConfig, target: Target, ranks: Ranks, console: Console) -> Job | None:
    """The job in OUT/packing, as this command wants it; rank 0 makes it, the others wait for it.

    None where another rank finds that all is done already.
    """
    path, wanted = config.out / STATE_NAME / JOB_NAME, _wanted(config, target)
    if ranks.rank != 0:
        return Job.open(config.out) if _wait_for_job(path, wanted, config, target) else None
    found = _read_job(path)
    if found is not None and all(found.get(name) == value for name, value in wanted.items()):
        job = Job.open(config.out)
        console.print(f"Going on with {config.out}: {len(job.listing)} pictures are listed.", highlight=False)
        return job
    if not config.overwrite:
        _refuse_other_work(config, found, wanted)
    if found is not None:
        path.unlink()
    _remove_all_but(path.parent, keep=".lock")
    with console.status(f"Listing {config.data}") as status:
        (path.parent / LISTING_NAME).mkdir()
        listing = list_source(
            config.data,
            path.parent / LISTING_NAME,
            on_progress=lambda count: status.update(f"{count:,} pictures listed of {config.data}"),
        )
    seed = config.seed if listing.keep_order or config.seed is not None else 0
    (config.out / MANIFEST_NAME).unlink(missing_ok=True)  # first: a folder with a manifest is complete, at every moment
    for old in format_files(config.out):
        old.unlink()
    with NewFile(path) as file:
        file.write(json.dumps(wanted | {"seed": seed}, indent=1).encode())
        file.commit(len(listing))
    return Job.open(config.out)


def _read_job(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _refuse_other_work(config: PackConfig, found: dict | None, wanted: dict) -> None:
    if found is not None:
        raise ShardError(
            f"{config.out} holds an unfinished packing with {_difference(found, wanted)}: run it as it was begun, pass "
            "--overwrite to begin anew, or give another --out."
        )
    files = format_files(config.out)
    if files:
        raise ShardError(
            f"{config.out} already holds a packed data set ({files[0].name}): pass --overwrite to replace it, or give "
            "another --out."
        )


def _difference(found: dict, wanted: dict) -> str:
    """The first setting that differs, for people."""

    def flat(entries: dict) -> Iterator[tuple[str, object]]:
        for name, value in entries.items():
            yield from flat(value) if isinstance(value, dict) else [(name, value)]

    before = dict(flat(found))
    name, now = next((name, now) for name, now in flat(wanted) if before.get(name) != now)
    return f"other settings ({name} {before.get(name)}, now {now})"


def _wait_for_job(path: Path, wanted: dict, config: PackConfig, target: Target) -> bool:
    """Until rank 0 has made the job; False where the set is finished, and there is none any more."""
    deadline = time.monotonic() + _RANK_WAIT_S
    while True:
        found = _read_job(path)
        if found is not None and all(found.get(name) == value for name, value in wanted.items()):
            return True
        if found is not None and not config.overwrite:
            _refuse_other_work(config, found, wanted)
        late = time.monotonic() > deadline
        # With --overwrite a finished set may be the old one, which rank 0 is about to replace.
        if found is None and (late or not config.overwrite) and _is_finished(config, target):
            return False
        if is_held(path.parent / "rank-0.lock"):
            deadline = time.monotonic() + _RANK_WAIT_S
        elif late:
            raise PackingStopped(
                f"Rank 0 has not listed the pictures, and is not running: start it with the same command and --out {config.out}."
            )
        time.sleep(0.2)


def _is_finished(config: PackConfig, target: Target) -> bool:
    with contextlib.suppress(ShardError):
        return Manifest.read(config.out).settings == _settings(target)
    return False


def _settings(target: Target) -> dict:
    """For the manifest."""
    return {"writer": target.writer, "shard_mb": target.shard_bytes / BYTES_PER_MB, **asdict(target.treatment)}


# ---------------------------------------------------------------------------------------------------- the shards


def _write_shards(job: Job, config: PackConfig, ranks: Ranks, console: Console) -> None:
    """All shards of this rank that are not done yet."""
    mine = range(ranks.rank, job.num_shards, ranks.world_size)
    todo = [shard for shard in mine if not job.is_done(shard)]
    done = set(mine).difference(todo)
    watch = _Watch(job, config, (ShardReport.load(job.state, shard) for shard in sorted(done)))
    if not todo:
        watch.check()
        return
    share = sum(_pictures_in(job, shard) for shard in todo)
    with _progress_bar(
        f"rank {ranks.rank}" if ranks.world_size > 1 else "packing", share, watch.left_out, console
    ) as advance:

        def tell(progressed: Progressed) -> None:
            advance(progressed)
            watch(progressed)

        workers = min(config.workers or default_workers(), len(todo))
        if workers == 1:
            work_here(job, todo, tell)
        else:
            work_in_processes(job, todo, workers, tell)


class _Watch:
    """Counts what is left out, and stops the run when it is too much: beyond the limit, and no chance among the first few."""

    def __init__(self, job: Job, config: PackConfig, reports: Iterable[ShardReport]) -> None:
        """`reports`: of what was packed before."""
        self._config, self._listing = config, job.listing
        self._looked_at, self.left_out, self._example = 0, 0, ""
        for report in reports:
            self._count(len(report.records) + len(report.rejected), [(r["name"], r["reason"]) for r in report.rejected])

    def __call__(self, progressed: Progressed) -> None:
        self._count(progressed.pictures, progressed.left_out)
        if progressed.left_out and self._config.on_bad == "fail":
            raise PackingStopped(
                f"{self._config.data} holds a picture that cannot be packed ({self._example}): pass --on-bad skip, "
                f"and the same command goes on, or repair or remove it and, to begin anew, {BEGIN_ANEW}."
            )
        self.check()

    def _count(self, looked_at: int, left_out: Sequence[tuple[str, str]]) -> None:
        self._looked_at += looked_at
        self.left_out += len(left_out)
        if left_out and not self._example:
            self._example = about(self._listing, *left_out[0])

    def check(self) -> None:
        total = len(self._listing)
        if self.left_out <= self._config.bad_limit * total or self._looked_at < min(total, _LEAST_LOOKED_AT):
            return
        share = f"{self.left_out / self._looked_at:.2%}"
        of = (
            f"{total} pictures ({share})"
            if self._looked_at == total
            else f"the {self._looked_at} pictures looked at so far ({share}; there are {total})"
        )
        raise PackingStopped(
            f"{self.left_out} of {of} cannot be packed, the first one {self._example}; that is more than --bad-limit "
            f"{self._config.bad_limit} of all: raise the limit, and the same command goes on, or mend the source and, to begin "
            f"anew, {BEGIN_ANEW}."
        )


def about(listing: Listing, name: str, reason: str) -> str:
    """A picture that is left out and why, for people; of a list also where it was looked for."""
    if listing.kind != "list" or not reason.startswith(UNREADABLE):
        return f"{name}: {reason}"
    where = "" if os.path.isabs(name) else ", as a list's paths start at its folder"
    return f"{name}: {reason}; tried {listing.root / name}{where}"


# ---------------------------------------------------------------------------------------------------- joining


def _wait_for_ranks(job: Job, ranks: Ranks, console: Console) -> None:
    """Until the other ranks have reported all their shards. Names the one that is missing, if it isn't running."""
    deadline = time.monotonic() + _RANK_WAIT_S
    missing = list(range(job.num_shards))
    while missing := [shard for shard in missing if not job.is_done(shard)]:
        late = sorted({shard % ranks.world_size for shard in missing})
        if any(is_held(job.state / f"rank-{rank}.lock") for rank in late):
            deadline = time.monotonic() + _RANK_WAIT_S
        elif time.monotonic() > deadline:
            raise PackingStopped(
                f"{len(missing)} shards are missing and rank {late[0]}, which is to write them, is not running: start it again "
                "with the same command, then rank 0."
            )
        console.print(f"Waiting for rank {', '.join(map(str, late))}: {len(missing)} shards.", highlight=False)
        time.sleep(min(5.0, _RANK_WAIT_S / 10))


@contextlib.contextmanager
def _beton_joined_meanwhile(job: Job) -> Iterator[Callable[[], BetonJoin | None]]:
    """While shards are written, a thread lays the parts of a beton into it. Yields a function that waits for its end."""
    if job.target.container != "beton":
        yield lambda: None
        return
    stopped = threading.Event()
    with BetonJoin(job.out, job.num_shards, len(job.listing)) as beton_join, ThreadPoolExecutor(1) as thread:
        ending = thread.submit(beton_join.append_reported, stopped)

        def joined() -> BetonJoin:
            ending.result()
            return beton_join

        try:
            yield joined
        finally:
            stopped.set()


def _join(job: Job, config: PackConfig, joined: Callable[[], BetonJoin | None]) -> DatasetIndex:
    _Watch(job, config, _reports(job)).check()  # of all ranks together
    if not any(len(report.records) for report in _reports(job)):
        first = next(report.rejected[0] for report in _reports(job) if report.rejected)
        (job.state / JOB_NAME).unlink()  # there is nothing to go on with
        raise ValueError(
            f"{config.data} holds no picture that can be packed ({about(job.listing, first['name'], first['reason'])}); give "
            "another --data."
        )
    facts = SetFacts(
        container=job.target.container,
        class_names=job.listing.class_names,
        shuffle_seed=(job.listing.source_seed or 0) if job.seed is None else job.seed,
        settings=_settings(job.target),
        ignored=job.listing.ignored,
    )
    return join(job.out, job.num_shards, facts, joined())


def _reports(job: Job) -> Iterator[ShardReport]:
    return (ShardReport.load(job.state, shard) for shard in range(job.num_shards))


def check_places(config: PackConfig) -> None:
    """ValueError for a source or a target that cannot be one."""
    if not config.data.exists():
        raise ValueError(f"{config.data} does not exist; give a folder, a list file or a tar to --data.")
    if config.data.is_dir() and config.out.resolve().is_relative_to(config.data.resolve()):
        raise ValueError(
            f"The shards would lie among the pictures: --out {config.out} is inside --data {config.data}; move it out."
        )
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(
            f"--out {config.out} is a file; give a folder, in which the packed set and its index are to lie."
        )


def _remove_all_but(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        if path.suffix != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_state(state: Path, made_folder: bool) -> None:
    """Leave nothing behind where no job came of it."""
    shutil.rmtree(state, ignore_errors=True)
    if made_folder:
        with contextlib.suppress(OSError):  # something lies in it by now
            state.parent.rmdir()


def _pictures_in(job: Job, shard: int) -> int:
    count = len(job.listing)
    return (shard + 1) * count // job.num_shards - shard * count // job.num_shards


def default_workers() -> int:
    """As many processes as there are cores for this one."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _progress_bar(title: str, total: int, left_out: int, console: Console) -> Iterator[Callable[[Progressed], None]]:
    """Yields advance(progressed)."""
    columns = (
        TextColumn(title),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave of the line
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    start, pictures, byte_count = time.perf_counter(), 0, 0
    with Progress(*columns, console=console, disable=console.quiet, expand=True) as progress:
        task = progress.add_task(title, total=total, rates="")

        def advance(more: Progressed) -> None:
            nonlocal pictures, byte_count, left_out
            pictures, byte_count = pictures + more.pictures, byte_count + more.source_bytes
            left_out += len(more.left_out)
            wall_s = time.perf_counter() - start
            rates = f"{pictures / wall_s:.0f}/s {byte_count / BYTES_PER_MB / wall_s:.0f} MB/s"
            rates += f" {left_out} bad" if left_out else ""
            progress.update(task, advance=more.pictures, rates=rates)

        yield advance

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

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.checks import (
    check_against,
    check_changed,
    check_dali,
    check_index,
    check_manifest,
    check_names,
    check_pixels,
    check_rejected,
    check_shard,
    sample_bytes,
)
from data_prep.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    DatasetIndex,
    Manifest,
    ShardError,
)
from data_prep.plain_reading import Finding, PlainSet, capped, folder_of
from inscon.guard import end_with_parent

_DECODED_PER_JOB = 64


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
    here = PlainSet(folder_of(path))
    if against is not None:
        DatasetIndex.open(against)  # raises
    jobs = _jobs(here, pixels, all_pixels, against)
    results, num_decoded = _work(here, jobs, workers or len(os.sched_getaffinity(0)), show_progress)
    findings = capped(itertools.chain.from_iterable(results))
    if not findings:
        try:
            DatasetIndex.open(path)  # nothing is sound that the readers refuse
        except ShardError as error:
            findings = [Finding(INDEX_NAME, f"cannot be opened ({error})")]
    return Verification(path=Path(path), manifest=here.manifest, findings=tuple(findings), num_decoded=num_decoded)


class _Job(NamedTuple):
    check: Callable[..., Iterator[Finding]]
    arguments: tuple
    file: str
    """To blame where reading fails."""


def _jobs(here: PlainSet, pixels: int, all_pixels: bool, against: str | os.PathLike[str] | None) -> list[_Job]:
    manifest = here.manifest
    count = manifest.num_samples if all_pixels else min(pixels, manifest.num_samples)
    sample_ids = np.arange(count if here.is_indexed else 0) * (manifest.num_samples - 1) // max(1, count - 1)
    decoded = [sample_ids[start : start + _DECODED_PER_JOB] for start in range(0, len(sample_ids), _DECODED_PER_JOB)]
    return [
        _Job(check_manifest, (), MANIFEST_NAME),
        _Job(check_index, (), INDEX_NAME),
        _Job(check_names, (), manifest.names.name),
        _Job(check_rejected, (), manifest.rejected_list.name),
        _Job(check_changed, (), manifest.changed_list.name),
        *(_Job(check_shard, (number,), shard.name) for number, shard in enumerate(manifest.shards)),
        *(_Job(check_dali, (number,), index.name) for number, index in enumerate(manifest.dali_indices)),
        *(_Job(check_pixels, (some,), INDEX_NAME) for some in decoded),
        *([] if against is None else [_Job(check_against, (Path(against),), str(against))]),
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

    return capped(findings())


_worker = threading.local()


class _Stopped(Exception):
    """The command was interrupted."""


def _begin(folder: Path, counts, stopped) -> None:
    """Make a thread or a process ready for `_run`; `counts` are bytes read and pictures decoded."""
    if threading.current_thread() is threading.main_thread():  # a process of its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
        end_with_parent()

    def tell(byte_count: int, decoded: int = 0) -> None:
        if stopped.is_set():
            raise _Stopped
        with counts.get_lock():
            counts[0] += byte_count
            counts[1] += decoded

    _worker.set = PlainSet(folder, tell)


def _work(here: PlainSet, jobs: list[_Job], workers: int, show_progress: bool) -> tuple[list[list[Finding]], int]:
    """The jobs' findings, in their order, and how many pictures were decoded."""
    context = multiprocessing.get_context("spawn")  # forking beside threads (rich has one) may hang
    counts, stopped = context.Array("Q", 2), context.Event()
    begin = {"initializer": _begin, "initargs": (here.folder, counts, stopped)}
    # Processes, as simplejpeg holds the interpreter's lock while it decodes.
    pool = ThreadPoolExecutor(1, **begin) if workers == 1 else ProcessPoolExecutor(workers, context, **begin)
    decoded = sum(len(job.arguments[0]) for job in jobs if job.check is check_pixels)
    total = sum(stored.byte_count for stored in here.files) + decoded * sample_bytes(here.manifest)
    columns = (
        TextColumn("verifying"),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave of the line
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=not show_progress)
    with pool, Progress(*columns, console=console, disable=not show_progress, expand=True) as progress:
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

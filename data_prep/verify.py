"""Read a packed set back, tar shards or a beton, and say which file and which sample is not as it was packed.

    python data_prep/verify.py ~/shards/train
    python data_prep/verify.py ~/beton/train --against ~/shards/train
    python data_prep/verify.py ~/shards/train --all-pixels

Every file is compared with its checksum in the manifest, so any byte that changed is found. Of a file with another checksum
every sample is compared with its own, in the index. Some samples are decoded, and their sizes compared with the index.
manifest.json has no checksum: what it says of class names, seed and settings is believed.

Exit status 0: nothing differs. 1: something does, one line each; or there is no packed set that can be opened.
"""

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import simplejpeg
import tyro
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep import index as packed
from data_prep.index import INDEX_NAME, MANIFEST_NAME, DatasetIndex, ShardError, StoredFile
from inscon.guard import end_with_parent, run_script

_LISTED_PER_FILE = 20
_AT_A_TIME, _DECODED_AT_A_TIME = 1 << 16, 64


def verify(
    path: tyro.conf.Positional[Path],
    *,
    pixels: int = 1000,
    all_pixels: bool = False,
    against: Path | None = None,
    workers: int | None = None,
    show_progress: tyro.conf.Suppress[bool] = False,
) -> list[str]:
    """Read a packed set back and say what differs, a sentence each. Memory does not grow with the set.

    Args:
        path: Folder of a packed set, or the .beton in one.
        pixels: How many samples to decode, spread evenly over the set.
        all_pixels: Decode every sample.
        against: Another packed set to compare with, sample by sample; only its manifest, index and names are read.
        workers: Processes that decode; None: as many as there are CPU cores for this process.

    Raises ShardError where `path` or `against` cannot be opened; ValueError for settings out of range.
    """
    if pixels < 0:
        raise ValueError(f"--pixels must not be negative. Found: {pixels}.")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1. Found: {workers}.")
    index, workers = DatasetIndex.open(path), workers or len(os.sched_getaffinity(0))
    other = None if against is None else DatasetIndex.open(against)
    found = [*_check_manifest(index), *_capped(_check_records(index), INDEX_NAME)]
    is_usable = not found  # where the index is wrong, its samples cannot be told
    found += _check_files(index, is_usable, show_progress)
    if is_usable:
        found += _check_pixels(index, len(index) if all_pixels else min(pixels, len(index)), workers)
        found += _capped(_compare(index, other), str(other.path)) if other else []
    return found


def _capped(found: Iterator[str], where: str) -> list[str]:
    """The first 20, and one that counts the others."""
    listed = list(itertools.islice(found, _LISTED_PER_FILE))
    rest = sum(1 for _ in found)
    return listed + ([f"... and {rest:,} more in {where}"] if rest else [])


def _check_manifest(index: DatasetIndex) -> Iterator[str]:
    manifest, files = index.manifest, _files(index)
    counts = manifest.num_samples, sum(shard.sample_count for shard in manifest.shards), manifest.names.sample_count
    if len(set(counts)) > 1:
        said = "{} in all, {} in the shards, {} names".format(*counts)
        yield f"{MANIFEST_NAME} contradicts itself in the number of samples ({said})."
    known = {MANIFEST_NAME, *(stored.name for stored in files)}
    for path in packed.format_files(index.path):
        if path.name not in known:
            yield f"{path.name} is not of this set, by {MANIFEST_NAME}: remove it."


def _files(index: DatasetIndex) -> list[StoredFile]:
    manifest = index.manifest
    lists = [manifest.index, manifest.names, manifest.rejected_list, manifest.changed_list]
    return [*lists, *manifest.shards, *manifest.dali_indices]


def _check_files(index: DatasetIndex, is_usable: bool, show_progress: bool) -> Iterator[str]:
    """Each file's checksum; of a shard with another one also its samples, if the index `is_usable`."""
    files = _files(index)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        task = progress.add_task("", total=sum(stored.byte_count for stored in files))
        for stored in files:
            fault = _fault_of(index, stored, lambda byte_count: progress.advance(task, byte_count))
            samples = []
            if fault and is_usable and stored in index.manifest.shards:
                samples = _capped(_damaged_samples(index, stored), stored.name)
                fault += "" if samples else ", but its samples are whole"
            yield from [f"{stored.name} {fault}: copy it again or rerun {index.packer}.", *samples] if fault else []


def _fault_of(index: DatasetIndex, stored: StoredFile, tell: Callable[[int], None]) -> str:
    path = index.path / stored.name
    if not path.is_file():  # a pipe would be waited for
        return "is missing, or no file"
    try:
        checksum = packed.stored_file(path, 0, tell).checksum
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    said = f"has the checksum {checksum} where {MANIFEST_NAME} says {stored.checksum}"
    return "" if checksum == stored.checksum else said


def _damaged_samples(index: DatasetIndex, shard: StoredFile) -> Iterator[str]:
    shards = index.manifest.shards
    first = sum(before.sample_count for before in shards[: shards.index(shard)])
    for sample_id in range(first, min(first + shard.sample_count, len(index))):
        try:
            index.read(sample_id, pixels=True)
        except ShardError as error:
            yield str(error)


def _check_records(index: DatasetIndex) -> Iterator[str]:
    """That the index says nothing that cannot be, and is the manifest's."""
    content = xxhash.xxh3_128()
    for first in range(0, len(index), _AT_A_TIME):
        records = index.records(np.arange(first, min(first + _AT_A_TIME, len(index))))
        content.update(packed.content_of(records))
        for sample_id in (first + np.flatnonzero(records["shard"] >= len(index.manifest.shards))).tolist():
            yield f"{INDEX_NAME} says what cannot be of sample {sample_id}: copy it again or rerun {index.packer}."
    if content.hexdigest() != index.manifest.content:
        yield f"{INDEX_NAME} is not the one that {MANIFEST_NAME} is of: copy both again or rerun {index.packer}."


def _check_pixels(index: DatasetIndex, count: int, workers: int) -> list[str]:
    """Whether JPEGs decode, and to the size that the index says."""
    sample_ids = np.arange(count) * (len(index) - 1) // max(1, count - 1)
    parts = [sample_ids[start : start + _DECODED_AT_A_TIME] for start in range(0, count, _DECODED_AT_A_TIME)]
    if workers == 1 or len(parts) < 2:
        results = [_decode(index, part) for part in parts]
    else:
        # Processes, as simplejpeg holds the interpreter's lock while it decodes.
        with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker) as pool:
            try:
                results = list(pool.map(_decode, [index] * len(parts), parts))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return _capped(itertools.chain.from_iterable(results), "the pixels")


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    end_with_parent()


def _decode(index: DatasetIndex, sample_ids: NDArray[np.int64]) -> list[str]:
    found = []
    for sample_id, record in zip(sample_ids.tolist(), index.records(sample_ids), strict=True):
        try:
            content = index.read(sample_id, pixels=True)
            # Gray is half the work: it takes every coefficient all the same, and there is where damage shows.
            pixels = simplejpeg.decode_jpeg(content, "GRAY", strict=True) if record["encoding"] == packed.JPEG else None
        except ShardError as error:
            found.append(str(error))
        except ValueError as error:
            found.append(f"{index.describe(sample_id)} cannot be decoded ({error}).")
        else:
            if pixels is not None and pixels.shape[:2] != (record["height"], record["width"]):
                said = f"{record['height']} x {record['width']} px, not {pixels.shape[0]} x {pixels.shape[1]}"
                found.append(f"{INDEX_NAME} says that {index.describe(sample_id)} is {said}.")
    return found


def _compare(index: DatasetIndex, other: DatasetIndex) -> Iterator[str]:
    """Sample by sample, by the indexes: that they tell the truth is for the others to check."""
    if len(index) != len(other):
        yield f"{other.path} has {len(other)} samples where {index.path} has {len(index)}."
    if index.class_names != other.class_names:
        yield f"{other.path} has other class names than {index.path}."
    same = index.manifest.content == other.manifest.content
    same &= index.manifest.names.checksum == other.manifest.names.checksum
    for first in range(0, 0 if same else min(len(index), len(other)), _AT_A_TIME):
        ids = np.arange(first, min(first + _AT_A_TIME, len(index), len(other)))
        ours, theirs = index.records(ids), other.records(ids)
        fields = ("height", "width", "label", "encoding", "byte_count", "checksum")
        differ = {name: ours[name] != theirs[name] for name in fields}
        differ["name"] = np.array([index.name(i) != other.name(i) for i in ids.tolist()])
        for i in np.flatnonzero(np.any(list(differ.values()), axis=0)).tolist():
            names = ", ".join(name for name, where in differ.items() if where[i])
            yield f"{other.path} has {other.describe(first + i)} with another {names} than {index.path}."


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    found = tyro.cli(functools.partial(verify, show_progress=True))
    for sentence in found:
        print(sentence)
    print(f"{len(found)} places differ." if found else "The set is sound.")
    return int(bool(found))


if __name__ == "__main__":
    run_script("verify.py", main)

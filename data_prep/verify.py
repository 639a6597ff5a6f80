"""Read a packed set back, tar shards or a beton, and say which file and which sample is not as it was packed.

    python data_prep/verify.py ~/shards/train

Every file is compared with its checksum in the manifest, so any byte that changed is found. Of a file with another checksum
every sample is compared with its own, in the index. manifest.json has no checksum: what it says of class names, seed and
settings is believed.

Exit status 0: nothing differs. 1: something does, one line each; or there is no packed set that can be opened.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep import index as packed
from data_prep.index import INDEX_NAME, MANIFEST_NAME, DatasetIndex, ShardError, StoredFile
from inscon.guard import run_script

_LISTED_PER_FILE = 20
_AT_A_TIME = 1 << 16


def verify(path: tyro.conf.Positional[Path], *, show_progress: tyro.conf.Suppress[bool] = False) -> list[str]:
    """Read a packed set back and say what differs, a sentence each. Memory does not grow with the set.

    Args:
        path: Folder of a packed set, or the .beton in one.

    Raises ShardError where it cannot be opened.
    """
    index = DatasetIndex.open(path)
    found = [*_check_manifest(index), *_capped(_check_records(index), INDEX_NAME)]
    # Where the index is wrong, its samples cannot be told.
    return [*found, *_check_files(index, not found, show_progress)]


def _capped(found: Iterator[str], where: str) -> list[str]:
    """The first 20, and one that counts the others."""
    listed = list(itertools.islice(found, _LISTED_PER_FILE))
    rest = sum(1 for _ in found)
    return listed + ([f"... and {rest:,} more in {where}"] if rest else [])


def _check_manifest(index: DatasetIndex) -> Iterator[str]:
    manifest = index.manifest
    counts = manifest.num_samples, sum(shard.sample_count for shard in manifest.shards), manifest.names.sample_count
    if len(set(counts)) > 1:
        said = "{} in all, {} in the shards, {} names".format(*counts)
        yield f"{MANIFEST_NAME} contradicts itself in the number of samples ({said})."
    known = {MANIFEST_NAME, *(stored.name for stored in manifest.files)}
    for path in packed.format_files(index.path):
        if path.name not in known:
            yield f"{path.name} is not of this set, by {MANIFEST_NAME}: remove it."


def _check_files(index: DatasetIndex, is_usable: bool, show_progress: bool) -> Iterator[str]:
    """Each file's checksum; of a shard with another one also its samples, if the index `is_usable`."""
    files = index.manifest.files
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


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    found = tyro.cli(functools.partial(verify, show_progress=True))
    for sentence in found:
        print(sentence)
    print(f"{len(found)} places differ." if found else "The set is sound.")
    return int(bool(found))


if __name__ == "__main__":
    run_script("verify.py", main)

"""Read a packed set back, tar shards or a beton, and say which file and which sample is not as it was packed.

    python data_prep/verify.py ~/shards/train

Every file is compared with its checksum in the manifest, so any byte that changed is found. Of a file with another checksum
every sample is compared with its own, in the index. manifest.json has no checksum: what it says is believed.

Exit status 0: nothing differs. 1: something does, one line each; or there is no packed set that can be opened.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import DownloadColumn, Progress

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import MANIFEST_NAME, DatasetIndex, ShardError, StoredFile, format_files, stored_file
from inscon.guard import run_script

_LISTED_PER_FILE = 20


def verify(path: tyro.conf.Positional[Path], *, show_progress: tyro.conf.Suppress[bool] = False) -> list[str]:
    """Read a packed set back and say what differs, a sentence each. Memory does not grow with the set.

    Args:
        path: Folder of a packed set, or the .beton in one.

    Raises ShardError where it cannot be opened.
    """
    index = DatasetIndex.open(path)
    files, faults = index.manifest.files, {}
    strange = {path.name for path in format_files(index.path)} - {MANIFEST_NAME, *(stored.name for stored in files)}
    found = [f"{name} is not of this set, by {MANIFEST_NAME}: remove it." for name in sorted(strange)]
    columns = *Progress.get_default_columns(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        task = progress.add_task("reading", total=sum(stored.byte_count for stored in files))
        for stored in files:
            faults[stored.name] = fault = _fault_of(index, stored, functools.partial(progress.advance, task))
            samples = []
            if fault and stored in index.manifest.shards and not faults[index.manifest.index.name]:  # which tells them
                samples = _damaged_samples(index, stored)
                fault += "" if samples else ", but its samples are whole"
            found += [f"{stored.name} {fault}: {index.manifest.repair}.", *samples] if fault else []
    return found


def _fault_of(index: DatasetIndex, stored: StoredFile, tell: Callable[[int], None]) -> str:
    path = index.path / stored.name
    if not path.is_file():  # a pipe would be waited for
        return "is missing, or no file"
    try:
        checksum = stored_file(path, 0, tell).checksum
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    said = f"has the checksum {checksum} where {MANIFEST_NAME} says {stored.checksum}"
    return "" if checksum == stored.checksum else said


def _damaged_samples(index: DatasetIndex, shard: StoredFile) -> list[str]:
    """The first 20 of a shard, and a sentence that counts the others."""
    shards, listed, rest = index.manifest.shards, [], 0
    first = sum(before.sample_count for before in shards[: shards.index(shard)])
    for sample_id in range(first, min(first + shard.sample_count, len(index))):
        try:
            index.read(sample_id, pixels=True)
        except ShardError as error:
            listed, rest = [*listed, str(error)][:_LISTED_PER_FILE], rest + (len(listed) == _LISTED_PER_FILE)
    return listed + [f"... and {rest:,} more in {shard.name}"] * (rest > 0)


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    found = tyro.cli(functools.partial(verify, show_progress=True))
    for sentence in found:
        print(sentence)
    print(f"{len(found)} places differ." if found else "The set is sound.")
    return int(bool(found))


if __name__ == "__main__":
    run_script("verify.py", main)

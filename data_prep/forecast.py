"""What a packing would be, said before any work: pictures, bytes, shards, hours, disk."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.job import Job, Target
from data_prep.listing import kinds_in_words
from data_prep.packing import BYTES_PER_MB, PackConfig, about, check_places, default_workers
from data_prep.pictures import BadPicture, prepare_picture
from data_prep.reading import Reader, Unreadable
from data_prep.sources import list_source
from inscon.sampling import permute

_TRIAL_PICTURES, _TRIAL_S = 500, 10.0
_PER_SAMPLE_BYTES = {"tar": 512 + 256 + 1024 + 48 + 40, "beton": 24 + 24 + 48 + 40}
"""Headers, padding, label, index, name; about."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Sizes in bytes; what is measured comes from a trial of pictures drawn from the whole source."""

    kind: str
    num_pictures: int
    num_classes: int
    source_bytes: int
    num_shards: int
    trial_pictures: int
    trial_left_out: int
    example_left_out: str
    """Name and reason of the first of these; empty where there is none."""
    ignored: Mapping[str, int]
    """How many files are passed over as no pictures, by kind."""
    pictures_per_s: float
    """Of one process: read, decode and, where needed, encode; without writing."""
    workers: int
    expected_bytes: int
    free_bytes: int

    @property
    def hours(self) -> float:
        return self.num_pictures / (self.pictures_per_s * self.workers) / 3600


def forecast(config: PackConfig, target: Target) -> Forecast:
    """List the source, try some hundred pictures, and extrapolate. Writes nothing that stays.

    Raises ValueError as packing would.
    """
    check_places(config)
    with tempfile.TemporaryDirectory() as folder:
        listing = list_source(config.data, Path(folder))
        job = Job(config.out, target, 0, listing)
        order = permute(np.arange(min(_TRIAL_PICTURES, len(listing))), len(listing), 0, 0)
        sizes, left_out, example, start = [], 0, "", time.perf_counter()
        with contextlib.closing(Reader(listing)) as reader:
            for position in order:
                entry = listing.entry(int(position))
                try:
                    sizes.append(len(prepare_picture(reader.read(entry), target.treatment).content))
                except (BadPicture, Unreadable) as bad:
                    left_out, example = left_out + 1, example or about(listing, entry.name, str(bad))
                if time.perf_counter() - start > _TRIAL_S:
                    break
        tried = len(sizes) + left_out
        per_picture = (np.mean(sizes) if sizes else 0) + _PER_SAMPLE_BYTES[target.container]
        return Forecast(
            kind=listing.kind,
            num_pictures=len(listing),
            num_classes=len(listing.class_names),
            source_bytes=listing.total_bytes,
            num_shards=job.num_shards if target.container == "tar" else 1,
            trial_pictures=tried,
            trial_left_out=left_out,
            example_left_out=example,
            ignored=listing.ignored,
            pictures_per_s=tried / (time.perf_counter() - start),
            workers=config.workers or default_workers(),
            expected_bytes=int(len(listing) * per_picture),
            free_bytes=shutil.disk_usage(_existing(config.out)).free,
        )


def show(what: Forecast) -> None:
    """Print it as a table."""
    table = Table(show_header=False, box=None)
    gigabytes = 1000 * BYTES_PER_MB
    rows = {
        "source": what.kind,
        "pictures": f"{what.num_pictures:,}"
        + (f" in {what.num_classes:,} classes" if what.num_classes else ", no labels"),
        "their bytes": f"{what.source_bytes / gigabytes:.3f} GB",
        "files of samples": f"{what.num_shards:,}",
        "expected size": f"{what.expected_bytes / gigabytes:.3f} GB, from {what.trial_pictures} pictures",
        "free disk": f"{what.free_bytes / gigabytes:.1f} GB"
        + ("" if what.free_bytes > what.expected_bytes else " - NOT ENOUGH: make room, or give another --out"),
        "rate": f"{what.pictures_per_s:.0f} pictures/s per process, tried without writing",
        "time": f"{what.hours:.2f} hours with {what.workers} processes, if the disks keep up",
        "cannot be packed": f"{what.trial_left_out} of the {what.trial_pictures} that were tried"
        + (f", the first one {what.example_left_out}" if what.example_left_out else ""),
        "ignored": kinds_in_words(what.ignored) or "none",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console(highlight=False).print(table)


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())

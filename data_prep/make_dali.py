"""Pack a folder of JPEGs into shards: tar files that any WebDataset tool reads, and an index.

    python data_prep/make_dali.py --data ~/imagenet/train --out ~/shards/train

DIR/class/picture.jpg gives labels, in the sorted order of the class folders; a flat DIR/picture.jpg gives none.
Sound pictures are stored byte for byte. Each is decoded once, so that no broken one meets the training; what is not
sound is left out, counted and listed in rejected.jsonl. The cost is one decode per picture, 3 to 4 ms of one core at
ImageNet's sizes (about 1.5 CPU hours for its 1.28 million, spread over the workers); the shards are as large as the
pictures.
"""

import io
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import NO_LABEL, REJECTED_NAME, DatasetIndex, ShardWriter, refuse_shards

BYTES_PER_MB = 1_000_000
PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Pack a folder of JPEGs into shards and an index."""

    data: Path
    """Folder of class folders, or flat folder, of JPEGs. Names that begin with a dot are passed over."""
    out: Path
    """Folder for the shards; made if need be."""
    shard_mb: int = 256
    """Largest size of a shard, in megabytes of 1,000,000 bytes."""
    seed: int = 0
    """Of the one shuffle of all pictures; the same pictures and seed give the same bytes."""
    workers: int | None = None
    """Threads that read and check; None: as many as there are CPU cores, at most 32."""
    on_bad: Literal["skip", "fail"] = "skip"
    """Whether a picture that is not a sound RGB or grey JPEG is left out, or ends the run."""
    overwrite: bool = False
    """Replace the shards that lie in `out`."""


class Source(NamedTuple):
    """A picture to pack."""

    name: str
    """Path relative to the packed folder, with forward slashes."""
    label: int
    """Position of its class folder in sorted order, or NO_LABEL."""


class SoundPicture(NamedTuple):
    """A picture that was decoded whole."""

    jpeg: bytes
    height: int
    """As decoded, px; EXIF orientation is not applied."""
    width: int


class BadPicture(ValueError):
    """A picture that is left out: `kind` is counted in the manifest, the message is for rejected.jsonl."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def pack_folder(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    shard_mb: int = 256,
    seed: int = 0,
    workers: int | None = None,
    on_bad: Literal["skip", "fail"] = "skip",
    overwrite: bool = False,
    show_progress: bool = False,
) -> DatasetIndex:
    """Pack the folder `data` into shards in `out` and open them; see `PackConfig` for the arguments.

    Raises ValueError, with the remedy, for settings out of range, a folder without sound pictures, or shards in `out`
    already; nothing is then left behind.
    """
    data, out = Path(data), Path(out)
    _check_settings(shard_mb=shard_mb, seed=seed, workers=workers, on_bad=on_bad)
    if out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"The shards would lie among the pictures: --out {out} is inside --data {data}; move it out.")
    if not overwrite:
        refuse_shards(out)  # before a long listing
    sources, class_names = list_pictures(data)
    order = shuffled(len(sources), seed)
    settings = {"writer": "data_prep/make_dali.py", "shard_mb": shard_mb, "on_bad": on_bad}
    with (
        ShardWriter(out, max_shard_bytes=shard_mb * BYTES_PER_MB, overwrite=overwrite) as writer,
        _progress_bar(len(sources), show_progress) as advance,
    ):
        checked = check_in_threads(data, (sources[i] for i in order), workers or _default_workers())
        _write_all(writer, data, checked, on_bad, advance)
        return writer.finish(class_names=class_names, shuffle_seed=seed, settings=settings)


def list_pictures(data: Path) -> tuple[list[Source], list[str]]:
    """Every picture below `data`, sorted by name, and the class names in label order (none for a flat folder).

    Each folder in `data` is a class, also one without pictures, so that two splits agree on the labels. Raises
    ValueError where there is nothing to pack, or where pictures lie both in `data` and in its folders.
    """
    if not data.is_dir():
        raise ValueError(f"{data} {'is not a folder' if data.exists() else 'does not exist'}; give a folder to --data.")
    class_names, loose = [], []
    with os.scandir(data) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                class_names.append(entry.name)
            elif _is_picture(entry.name):
                loose.append(entry.name)
    class_names.sort()
    sources = [Source(name, label) for label, top in enumerate(class_names) for name in _pictures_below(data, top)]
    if sources and loose:
        raise ValueError(
            f"{data} holds both class folders ({sources[0].name}) and loose pictures ({min(loose)}): "
            "move the loose ones into a class folder or away."
        )
    if sources:
        return sources, class_names
    if loose:
        return [Source(name, NO_LABEL) for name in sorted(loose)], []
    raise ValueError(
        f"{data} holds no picture named {', '.join('*' + extension for extension in PICTURE_EXTENSIONS)}, "
        "neither itself nor in class folders; give another --data, or convert the pictures to JPEG first."
    )


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of 0 ... count - 1, [count] int64. The same on every machine and NumPy version."""
    # A bit generator's raw stream is promised never to change; Generator.permutation's result is not.
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")


def check_in_threads(
    data: Path, sources: Iterable[Source], workers: int
) -> Iterator[tuple[Source, SoundPicture | BadPicture]]:
    """Read and check every picture; in the order of `sources`, with a bounded number of them in memory."""

    def check(source: Source) -> tuple[Source, SoundPicture | BadPicture]:
        try:
            return source, read_sound_jpeg(data, source.name)
        except BadPicture as bad:
            return source, bad

    ahead = deque()
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes without holding the interpreter's lock
        for source in sources:
            ahead.append(pool.submit(check, source))
            if len(ahead) > 8 * workers:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()


def read_sound_jpeg(data: Path, name: str) -> SoundPicture:
    """Read data/name and decode it once. Raises BadPicture for anything but a whole RGB or grey JPEG."""
    if "\n" in name:
        raise BadPicture("line break in the name")
    try:
        jpeg = (data / name).read_bytes()
    except OSError as error:
        raise BadPicture("unreadable", str(error.strerror)) from None
    if not jpeg:
        raise BadPicture("empty file")
    if not jpeg.startswith(b"\xff\xd8\xff"):
        raise BadPicture("not a JPEG", f"it begins with {jpeg[:8]!r}")
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture:
            if picture.mode not in ("RGB", "L"):
                raise BadPicture("neither RGB nor grey", f"its mode is {picture.mode}")
            picture.load()
            return SoundPicture(jpeg, picture.height, picture.width)
    except Image.UnidentifiedImageError:
        raise BadPicture("damaged", "its header cannot be read") from None
    except Image.DecompressionBombError as error:
        raise BadPicture("too large", str(error)) from None
    except (OSError, SyntaxError) as error:  # what Pillow raises for broken data
        raise BadPicture("damaged", str(error)) from None


def _write_all(
    writer: ShardWriter,
    data: Path,
    checked: Iterable[tuple[Source, SoundPicture | BadPicture]],
    on_bad: str,
    advance: Callable[[int], None],
) -> None:
    first_fault = None
    for source, picture in checked:
        if isinstance(picture, SoundPicture):
            writer.add(**picture._asdict(), label=source.label, name=source.name)
            advance(len(picture.jpeg))
            continue
        if on_bad == "fail":
            raise ValueError(
                f"{data / source.name} cannot be packed ({picture}): repair or remove it, or pass --on-bad skip."
            )
        writer.reject(name=source.name, kind=picture.kind, reason=str(picture))
        first_fault = first_fault or f"{source.name}: {picture}"
        advance(0)
    if writer.num_samples == 0:
        raise ValueError(
            f"{data} holds no sound RGB or grey JPEG ({first_fault}); give a folder of JPEGs to --data, or convert "
            "the pictures to JPEG first."
        )


def _is_picture(file_name: str) -> bool:
    return file_name.lower().endswith(PICTURE_EXTENSIONS) and not file_name.startswith(".")


def _pictures_below(data: Path, top: str) -> list[str]:
    """Paths, relative to `data`, of the pictures anywhere below data/top; sorted."""
    found = []
    for folder, inner, file_names in os.walk(data / top):
        inner[:] = [name for name in inner if not name.startswith(".")]
        relative = Path(folder).relative_to(data)
        found += [(relative / name).as_posix() for name in file_names if _is_picture(name)]
    return sorted(found)


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields advance(bytes packed), to be called once per picture."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn()
    start, pictures, byte_count = time.perf_counter(), 0, 0
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("packing", total=total, rates="")

        def advance(more_bytes: int) -> None:
            nonlocal pictures, byte_count
            pictures, byte_count = pictures + 1, byte_count + more_bytes
            wait_s = time.perf_counter() - start
            rates = f"{pictures / wait_s:.0f} pictures/s {byte_count / BYTES_PER_MB / wait_s:.1f} MB/s"
            progress.update(task, advance=1, rates=rates)

        yield advance


def _check_settings(*, shard_mb: int, seed: int, workers: int | None, on_bad: str) -> None:
    if shard_mb < 1:
        raise ValueError(f"--shard-mb must be at least 1. Found: {shard_mb}.")
    if seed < 0:
        raise ValueError(f"--seed must not be negative. Found: {seed}.")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1. Found: {workers}.")
    if on_bad not in ("skip", "fail"):
        raise ValueError(f"--on-bad must be skip or fail. Found: {on_bad}.")


def _default_workers() -> int:
    return min(32, os.cpu_count() or 1)


def _summary(index: DatasetIndex) -> str:
    manifest = index.manifest
    megabytes = sum(shard.byte_count for shard in manifest.shards) / BYTES_PER_MB
    classes = f" of {len(index.class_names)} classes" if index.class_names else ""
    faults = ", ".join(f"{count} {kind}" for kind, count in manifest.rejected.items())
    rejected = f"; left out: {faults} (see {REJECTED_NAME})" if faults else "; none left out"
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"
    return f"Packed {len(index)} pictures{classes} into {shards}, {megabytes:.1f} MB{rejected}."


def main() -> None:
    config = tyro.cli(PackConfig)
    try:
        index = pack_folder(**vars(config), show_progress=True)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(
            f"Packing {config.data} into {config.out} stopped ({error}): check free space and permissions."
        ) from None
    print(_summary(index))


if __name__ == "__main__":
    main()

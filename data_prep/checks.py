"""The checks that verify.py makes of a packed set: each yields what it finds wrong."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray

from data_prep.index import (
    INDEX_NAME,
    JPEG,
    MANIFEST_NAME,
    MAX_NAMES_IN_MANIFEST,
    NO_LABEL,
    RAW,
    REPAIR,
    Manifest,
    ShardError,
    StoredFile,
    check_byte_count,
    format_files,
)
from data_prep.joining import content_of
from data_prep.plain_reading import PIECE_BYTES, Finding, PlainSet, capped, folder_of, read_at
from data_prep.rebuilding import Content, Part, beton_parts, compare, dali_parts, tar_parts

_COMPARED = ("height", "width", "label", "encoding", "byte_count", "checksum")


def _check_file(here: PlainSet, stored: StoredFile, parts: Iterator[Part | Content] | None = None) -> Iterator[Finding]:
    """A file's length and checksum and, where they are given, its parts."""
    path = here.folder / stored.name
    if path.exists() and not path.is_file():
        yield Finding(stored.name, f"is no regular file: {REPAIR}.")
        return
    wrong_length = False
    try:
        check_byte_count(here.folder, stored)
    except ShardError as error:
        wrong_length = True
        yield Finding(stored.name, str(error).removeprefix(f"{path} "))
        if not path.exists():
            return
    with here.open(stored) as file:
        differences = capped(compare(here, stored, file, parts)) if parts else []
        checksum = None
        try:
            checksum = file.checksum()
        except OSError:
            if not differences:
                raise
    if checksum == stored.checksum:
        yield from (_blame_index(finding, stored) for finding in differences)
    elif differences or wrong_length:
        yield from differences
    else:
        yield Finding(
            stored.name, f"has the checksum {checksum} where {MANIFEST_NAME} says {stored.checksum}: {REPAIR}."
        )


def _blame_index(finding: Finding, stored: StoredFile) -> Finding:
    """A file whose checksum is right is not the one that is wrong."""
    if finding.file != stored.name:
        return finding
    sentence = finding.sentence and f"contradicts {stored.name}, whose checksum is right but which {finding.sentence}"
    return replace(finding, file=INDEX_NAME, sentence=sentence)


def check_manifest(here: PlainSet) -> Iterator[Finding]:
    """What it says twice, and that nothing else lies in the folder that readers would take for its files."""
    manifest = here.manifest
    counts = manifest.num_samples, manifest.index.sample_count, manifest.names.sample_count, int(here.firsts[-1])
    if len(set(counts)) > 1:
        said = "{} in all, {} of the index, {} of the names, {} of the shards".format(*counts)
        yield Finding(MANIFEST_NAME, f"contradicts itself in the number of samples ({said}): {REPAIR}.")
    if not _has_dali_indices(manifest):
        yield Finding(MANIFEST_NAME, f"names other indices for DALI than its shards have: {REPAIR}.")
    known = {MANIFEST_NAME, *(stored.name for stored in here.files)}
    for path in format_files(here.folder):
        if path.name not in known:
            yield Finding(path.name, f"is not of this set, by {MANIFEST_NAME}: remove it.")


def _has_dali_indices(manifest: Manifest) -> bool:
    shards = manifest.shards if manifest.container == "tar" else ()
    wanted = [(shard.name.removesuffix(".tar") + ".idx", shard.sample_count) for shard in shards]
    return [(index.name, index.sample_count) for index in manifest.dali_indices] == wanted


def check_index(here: PlainSet) -> Iterator[Finding]:
    """index.npy, and that it says nothing that cannot be."""
    damage = list(_check_file(here, here.manifest.index))
    yield from damage
    if not here.is_indexed:
        return
    content = xxhash.xxh3_128()
    for first, rows in here.records.slices(0, len(here.records)):
        content.update(content_of(rows))
        shards = np.searchsorted(here.firsts, np.arange(first, first + len(rows)), side="right") - 1
        raw, label = rows["encoding"] == RAW, rows["label"]
        pixel_bytes = 3 * rows["height"].astype(np.uint64) * rows["width"]
        faults = {
            "in which shard it lies": rows["shard"] != shards,
            "how it is encoded": ~raw & (rows["encoding"] != JPEG),
            "how many bytes its raw pixels have": raw & (rows["byte_count"] != pixel_bytes),
            "which class it is of": (label != NO_LABEL) & ((label < 0) | (label >= len(here.manifest.class_names))),
        }
        for fault, where in faults.items():
            for sample_id in (first + np.flatnonzero(where)).tolist():
                yield Finding(INDEX_NAME, f"is wrong about {here.named(sample_id)}: {fault}.", sample_id)
    found, said = content.hexdigest(), here.manifest.content
    if not damage and found != said:
        yield Finding(MANIFEST_NAME, f"says the content is {said} where {INDEX_NAME} makes {found}: {REPAIR}.")


def check_names(here: PlainSet) -> Iterator[Finding]:
    """names.txt, and that its lines begin where the index says."""
    stored, path = here.manifest.names, here.folder / here.manifest.names.name
    damage = list(_check_file(here, stored))
    yield from damage
    if not path.is_file():
        return
    count, position, known = 0, 0, len(here.records)
    moved = [(0, int(offset), 0) for offset in here.records.read(0, min(1, known))["name_offset"] if offset != 0]
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            starts = position + 1 + np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n"))
            position += len(piece)
            if not moved and count + 1 < known:
                said = here.records.read(count + 1, min(count + 1 + len(starts), known))["name_offset"]
                wrong = np.flatnonzero(said != starts[: len(said)])[:1].tolist()
                moved += [(count + 1 + i, int(said[i]), int(starts[i])) for i in wrong]
            count += len(starts)
    yield from _check_line_count(stored, count)
    for sample_id, said, found in moved:
        if damage:
            sentence = f"has the name of sample {sample_id} at byte {found}, not {said} as {INDEX_NAME} says."
            yield Finding(stored.name, sentence, sample_id, found)
        else:
            sentence = f"says that the name of sample {sample_id} is at byte {said} of {stored.name}, not {found}."
            yield Finding(INDEX_NAME, sentence, sample_id)


def check_rejected(here: PlainSet) -> Iterator[Finding]:
    manifest, kinds = here.manifest, Counter()
    damage = yield from _check_list(here, manifest.rejected_list, lambda entry: kinds.update([entry["kind"]]))
    if not damage and kinds != manifest.rejected:
        yield Finding(MANIFEST_NAME, f"counts other pictures than {manifest.rejected_list.name} lists: {REPAIR}.")


def check_changed(here: PlainSet) -> Iterator[Finding]:
    manifest, kinds, names = here.manifest, Counter(), []

    def count(entry: dict) -> None:
        kinds.update(entry["changes"])
        names.extend([entry["name"]] * (len(names) < MAX_NAMES_IN_MANIFEST))

    damage = yield from _check_list(here, manifest.changed_list, count)
    if not damage and (kinds != manifest.changed or tuple(names) != manifest.changed_names):
        yield Finding(MANIFEST_NAME, f"counts or names other pictures than {manifest.changed_list.name}: {REPAIR}.")


def _check_list(here: PlainSet, stored: StoredFile, count: Callable[[dict], None]) -> Iterator[Finding]:
    """A file of JSON lines; `count` is called with each entry of a sound one. Returns whether it is damaged."""
    damage = list(_check_file(here, stored))
    yield from damage
    path, lines = here.folder / stored.name, 0
    if not path.is_file():
        return True
    with path.open("rb") as file:
        for line in file:
            lines += 1
            if not damage:
                count(json.loads(line))
    yield from _check_line_count(stored, lines)
    return bool(damage)


def _check_line_count(stored: StoredFile, lines: int) -> Iterator[Finding]:
    if lines != stored.sample_count:
        yield Finding(stored.name, f"has {lines} lines where {MANIFEST_NAME} says {stored.sample_count}: {REPAIR}.")


def check_shard(here: PlainSet, number: int) -> Iterator[Finding]:
    parts = tar_parts if here.manifest.container == "tar" else beton_parts
    return _check_file(here, here.manifest.shards[number], parts(here, number) if here.is_indexed else None)


def check_dali(here: PlainSet, number: int) -> Iterator[Finding]:
    usable = here.is_indexed and _has_dali_indices(here.manifest)
    return _check_file(here, here.manifest.dali_indices[number], dali_parts(here, number) if usable else None)


def check_pixels(here: PlainSet, sample_ids: NDArray[np.int64]) -> Iterator[Finding]:
    """Whether JPEGs decode, and to the size that the index says."""
    for sample_id in sample_ids.tolist():
        record = here.records.read(sample_id, sample_id + 1)[0]
        content = _content(here, record) if record["encoding"] == JPEG else None
        if content is not None:
            yield from _check_jpeg(here, sample_id, record, content)
        here.tell(sample_bytes(here.manifest), content is not None)


def _check_jpeg(here: PlainSet, sample_id: int, record: np.void, content: bytes) -> Iterator[Finding]:
    try:
        # Gray is half the work: it takes every coefficient all the same, and there is where damage shows.
        height, width = simplejpeg.decode_jpeg(content, "GRAY", strict=True).shape[:2]
    except ValueError as error:
        shard = here.manifest.shards[record["shard"]].name
        yield Finding(shard, f"holds {here.named(sample_id)}, which cannot be decoded ({error}).", sample_id)
        return
    if (height, width) != (record["height"], record["width"]):
        sizes = f"{record['height']} x {record['width']} px, not {height} x {width}"
        yield Finding(INDEX_NAME, f"says that {here.named(sample_id)} is {sizes}.", sample_id)


def sample_bytes(manifest: Manifest) -> int:
    """On average."""
    return sum(shard.byte_count for shard in manifest.shards) // max(1, manifest.num_samples)


def _content(here: PlainSet, record: np.void) -> bytes | None:
    """A sample's bytes; None where they are not what the index says, which `check_shard` finds."""
    with contextlib.suppress(OSError, OverflowError, IndexError):
        stored = here.manifest.shards[record["shard"]]
        length = min(int(record["byte_count"]), stored.byte_count)
        content = read_at(here.folder / stored.name, int(record["offset"]), length)
        return content if xxhash.xxh3_64_intdigest(content) == record["checksum"] else None
    return None


def check_against(here: PlainSet, path: Path) -> Iterator[Finding]:
    """Sample by sample, by the indexes: that they tell the truth is for the others to check."""
    there = PlainSet(folder_of(path))
    mine, others = here.manifest, there.manifest

    def differs(what: str, ours: object, theirs: object, sample_id: int | None = None) -> Finding:
        return Finding(str(path), f"has {what} {theirs} where {here.folder} has {ours}.", sample_id)

    if mine.num_samples != others.num_samples:
        yield differs("a number of samples of", mine.num_samples, others.num_samples)
    if mine.class_names != others.class_names:
        yield Finding(str(path), f"has other class names than {here.folder}.")
    count = min(len(here.records), len(there.records)) if mine.content != others.content else 0
    for first, rows in here.records.slices(0, count):
        other_rows = there.records.read(first, first + len(rows))
        unequal = {name: rows[name] != other_rows[name] for name in _COMPARED}
        for i in np.flatnonzero(np.any(list(unequal.values()), axis=0)).tolist():
            names = [name for name in _COMPARED if unequal[name][i]]
            ours, theirs = (", ".join(f"{name} {r[name][i]}" for name in names) for r in (rows, other_rows))
            yield differs(f"{here.named(first + i)} with", ours, theirs, first + i)
    if mine.names.checksum != others.names.checksum:
        paths = here.folder / mine.names.name, there.folder / others.names.name
        with paths[0].open("rb") as our_names, paths[1].open("rb") as their_names:
            for sample_id, (ours, theirs) in enumerate(zip(our_names, their_names)):
                if ours != theirs:
                    yield differs(f"sample {sample_id} with the name", _text(ours), _text(theirs), sample_id)


def _text(line: bytes) -> str:
    return line.rstrip(b"\n").decode("utf-8", "surrogateescape")

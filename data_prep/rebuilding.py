"""What every byte of a shard, a beton or DALI's index has to be, built anew from our index; compared with what is there."""

from collections.abc import Iterator
from tarfile import BLOCKSIZE
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep import beton
from data_prep.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    ShardError,
    StoredFile,
)
from data_prep.plain_reading import PIECE_BYTES, Finding, PlainFile, PlainSet
from data_prep.shards import DALI_INDEX_VERSION, dali_entry, sample_members, tar_end, tar_header


class Part(NamedTuple):
    """What a stretch of a file has to be, up to a piece long."""

    what: str
    expected: bytes
    sample_id: int | None = None
    row_length: int | None = None
    """Of the rows of several samples, from `sample_id` on."""

    @property
    def length(self) -> int:
        return len(self.expected)


class Content(NamedTuple):
    """The stretch that holds a sample, of any length."""

    checksum: int
    length: int
    indexed: int
    """Where the index says that it is."""
    sample_id: int
    what: str = "the content of"
    row_length: int | None = None


def _contents(rows: NDArray[np.void], first: int) -> Iterator[Content]:
    columns = (rows[name].tolist() for name in ("checksum", "byte_count", "offset"))
    return (Content(*row, sample_id) for sample_id, row in enumerate(zip(*columns, strict=True), first))


def _zeros(what: str, length: int, sample_id: int | None = None) -> Iterator[Part]:
    for start in range(0, length, PIECE_BYTES):
        yield Part(what, bytes(min(PIECE_BYTES, length - start)), sample_id)


def tar_parts(here: PlainSet, number: int) -> Iterator[Part | Content]:
    shard_number = _shard_number(here.manifest.shards[number])
    first, stop = here.firsts[number : number + 2].tolist()
    position = 0
    for start, rows in here.records.slices(first, stop):
        for content, label in zip(_contents(rows, start), rows["label"].tolist(), strict=True):
            for part in _tar_sample(shard_number, content.sample_id - first, content, label):
                position += part.length
                yield part
    yield Part("the end of the archive", tar_end(position))


def _tar_sample(shard_number: int, place: int, content: Content, label: int) -> Iterator[Part | Content]:
    sample_id = content.sample_id
    (name, _), *label_member = sample_members(shard_number, place, b"", label)
    yield Part("the tar header of", tar_header(name, content.length), sample_id)
    yield content
    yield from _zeros("the padding after", -content.length % BLOCKSIZE, sample_id)
    for name, text in label_member:
        yield Part("the tar header of the label of", tar_header(name, len(text)), sample_id)
        yield Part("the label of", text, sample_id)
        yield from _zeros("the padding after the label of", -len(text) % BLOCKSIZE, sample_id)


def dali_parts(here: PlainSet, number: int) -> Iterator[Part]:
    """The lines of a shard's index for DALI: of each member its extension, position, byte count and name."""
    shard_number = _shard_number(here.manifest.shards[number])
    first, stop = here.firsts[number : number + 2].tolist()
    yield Part("its first line", f"{DALI_INDEX_VERSION} {stop - first}\n".encode())
    position = 0
    for start, rows in here.records.slices(first, stop):
        for sample_id, (byte_count, label) in enumerate(
            zip(rows["byte_count"].tolist(), rows["label"].tolist(), strict=True), start
        ):
            members = []
            for name, text in sample_members(shard_number, sample_id - first, b"", label):
                length = len(text) or byte_count
                members.append(dali_entry(name, position + BLOCKSIZE, length))
                position += BLOCKSIZE + length + -length % BLOCKSIZE
            yield Part("the line of", " ".join(members).encode() + b"\n", sample_id)


def _shard_number(shard: StoredFile) -> int:
    return int(shard.name.removeprefix("shard-").removesuffix(".tar"))


def beton_parts(here: PlainSet, _: int) -> Iterator[Part | Content]:
    count = int(here.firsts[-1])
    num_listed = count + sum(here.manifest.rejected.values())
    layout = beton.Layout(num_listed)
    try:
        for _, rows in here.records.slices(0, count):
            layout.place(rows["byte_count"])
    except ValueError as error:
        raise ShardError(f"says what cannot be ({error})") from None

    def placed() -> Iterator[tuple[int, NDArray[np.void]]]:
        layout = beton.Layout(num_listed)
        for first, rows in here.records.slices(0, count):
            rows = np.array(rows)
            rows["offset"] = layout.place(rows["byte_count"])
            yield first, rows

    head = layout.head(count)
    yield Part("the header", head[: beton.HEADER_DTYPE.itemsize])
    yield Part("the description of the fields", head[beton.HEADER_DTYPE.itemsize :])
    for first, rows in placed():
        table = beton.metadata_of(rows)
        yield Part("the metadata of", table.tobytes(), first, table.itemsize)
    position = len(head) + count * beton.METADATA_DTYPE.itemsize
    yield from _zeros("the padding before the first page", layout.data_start - position)
    position = layout.data_start
    for first, rows in placed():
        indexed = here.records.read(first, first + len(rows))
        for content, start in zip(_contents(indexed, first), rows["offset"].tolist(), strict=True):
            yield from _zeros("the padding of the page after", start - position, content.sample_id - 1)
            yield content
            position = start + content.length
    for first, rows in placed():
        table = beton.allocations_of(first, rows)
        yield Part("the allocation of", table.tobytes(), first, table.itemsize)


def compare(here: PlainSet, stored: StoredFile, file: PlainFile, parts: Iterator[Part | Content]) -> Iterator[Finding]:
    """Compare a file with its parts, until the one or the other ends."""
    for part in parts:
        start = file.position
        if isinstance(part, Content) and part.indexed != start:
            place = f"at byte {part.indexed} of {stored.name}, not {start}"
            yield Finding(INDEX_NAME, f"says that {here.named(part.sample_id)} is {place}.", part.sample_id)
        try:
            for offset, how in _differences(file, part):
                yield _finding(here, stored, part, start, offset, "differs in", how)
        except EOFError:
            yield _finding(here, stored, part, start, file.position, "ends in", f"at byte {file.position}")
            return
        except OSError as error:
            how = f"from byte {file.position} on ({error.strerror})"
            yield _finding(here, stored, part, start, file.position, "cannot be read in", how)
            file.skip_to(start + part.length)
    if file.position != stored.byte_count:
        sizes = f"is {stored.byte_count} bytes long, where its samples in {INDEX_NAME} make {file.position}"
        yield Finding(MANIFEST_NAME, f"says that {stored.name} {sizes}.")


def _differences(file: PlainFile, part: Part | Content) -> Iterator[tuple[int, str]]:
    """(position of the first byte that differs, where that is) of a part, or of each of its rows, that differs."""
    start = file.position
    if isinstance(part, Content):
        checksum = xxhash.xxh3_64()
        for done in range(0, part.length, PIECE_BYTES):
            checksum.update(file.read(min(PIECE_BYTES, part.length - done)))
        if checksum.intdigest() != part.checksum:
            yield start, f"within bytes {start} to {start + part.length - 1}"
        return
    found = file.read(part.length)
    if found == part.expected:
        return
    differing = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(part.expected, np.uint8))
    _, first_of_row = np.unique(differing // (part.row_length or part.length), return_index=True)
    for at in differing[first_of_row].tolist():
        yield start + at, f"at byte {start + at} (found 0x{found[at]:02x}, expected 0x{part.expected[at]:02x})"


def _finding(
    here: PlainSet, stored: StoredFile, part: Part | Content, start: int, offset: int, verb: str, how: str
) -> Finding:
    """What is wrong at `offset`, in a part that begins at `start`."""
    what, sample_id = part.what, part.sample_id
    if sample_id is not None:
        sample_id += (offset - start) // part.row_length if part.row_length else 0
        what = f"{what} {here.named(sample_id)}"
    return Finding(stored.name, f"{verb} {what}, {how}.", sample_id, offset)

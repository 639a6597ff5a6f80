"""FFCV's file format, version 2, as FFCV 1.0.2 reads it. FFCV itself is not needed to write it.

    header        HEADER_DTYPE
    fields        two FIELD_DTYPE: "image" and "label"
    metadata      one METADATA_DTYPE per sample
    pages         the samples' bytes in the order of their ids, none across the end of a page
    allocations   one ALLOCATION_DTYPE per sample, to the end of the file

FFCV's own writer lays samples where its workers happen to be, hangs when one dies and re-encodes what it stores. This one
is given the samples in order and always writes the same bytes.
"""

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.index import BETON_NAME, JPEG, STATE_NAME, ShardError, StoredFile, stored_file
from inscon.guard import naming

FFCV_VERSION = 2
MIN_PAGE_SIZE = 1 << 23  # bytes; FFCV's own default
MAX_PAGE_SIZE = 1 << 30  # bytes; FFCV reads a page in one call, and Linux less than 2 GiB at a time

_HEADER = {"version": "<u2", "num_fields": "<u2", "page_size": "<u4", "num_samples": "<u8", "alloc_table_ptr": "<u8"}
HEADER_DTYPE = np.dtype(list(_HEADER.items()), align=True)
FIELD_DTYPE = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE_DTYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA_DTYPE = np.dtype([("f0", IMAGE_DTYPE), ("f1", "<i8")], align=True)
ALLOCATION_DTYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

_FIELDS = (2, b"image"), (1, b"label")  # with FFCV's type ids of pictures and integers
_MODE_OF_JPEG, _MODE_OF_RAW = 0, 1  # FFCV's image modes
_SHARDS_PER_SYNC = 8  # to wait for the disk takes as long as some shards
_METADATA_START = HEADER_DTYPE.itemsize + 2 * FIELD_DTYPE.itemsize


class Layout:
    """Where everything lies in a beton: `place` is called with all samples in order, some at a time."""

    def __init__(self, num_listed: int) -> None:
        """`num_listed`: samples and pictures that were left out; room is kept for the metadata of all."""
        # Of what was placed so far: the smallest that holds the largest sample, and the position of the first free byte.
        self.page_size = MIN_PAGE_SIZE
        self.end = _up(_METADATA_START + num_listed * METADATA_DTYPE.itemsize, MIN_PAGE_SIZE)

    def place(self, byte_counts: NDArray[np.unsignedinteger]) -> NDArray[np.uint64]:
        """Positions, [n] uint64, of the next n samples: one after the other, none across the end of a page. Pages grow with a
        sample that is larger. It begins at a multiple of its page, so what was placed before lies within such pages too.
        ValueError for a sample that no page of FFCV holds."""
        positions = []
        for byte_count in byte_counts.tolist():
            if self.end % MIN_PAGE_SIZE + byte_count > MIN_PAGE_SIZE:
                page = max(MIN_PAGE_SIZE, 1 << (byte_count - 1).bit_length())
                if page > MAX_PAGE_SIZE:
                    raise ValueError(
                        f"A .beton holds samples of at most {MAX_PAGE_SIZE} bytes. Found: {byte_count}; shrink the pictures "
                        "(--max-resolution) or store them with --write-mode jpg."
                    )
                self.page_size = max(self.page_size, page)
                self.end = _up(self.end, page)
            positions.append(self.end)
            self.end += byte_count
        return np.array(positions, np.uint64)

    def head(self, num_samples: int) -> bytes:
        """Header and field descriptions, once all samples are placed."""
        header = np.array((FFCV_VERSION, 2, self.page_size, num_samples, self.end), HEADER_DTYPE)
        fields = [bytes([kind]) + name.ljust(FIELD_DTYPE.itemsize - 1, b"\0") for kind, name in _FIELDS]
        return header.tobytes() + b"".join(fields)


def metadata_of(records: NDArray[np.void]) -> NDArray[np.void]:
    """METADATA_DTYPE rows, [n], of n index records whose offsets are positions in the beton."""
    rows = np.zeros(len(records), METADATA_DTYPE)
    rows["f0"]["mode"] = np.where(records["encoding"] == JPEG, _MODE_OF_JPEG, _MODE_OF_RAW)
    rows["f0"]["width"], rows["f0"]["height"] = records["width"], records["height"]
    rows["f0"]["data_ptr"], rows["f1"] = records["offset"], records["label"]
    return rows


def allocations_of(first_id: int, records: NDArray[np.void]) -> NDArray[np.void]:
    """ALLOCATION_DTYPE rows, [n], of n index records, the first of which is sample `first_id`."""
    rows = np.zeros(len(records), ALLOCATION_DTYPE)
    rows["sample_id"] = first_id + np.arange(len(records))
    rows["ptr"], rows["size"] = records["offset"], records["byte_count"]
    return rows


def _up(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size


def shard_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:06d}.tar"


def report_path(out: Path, shard: int) -> Path:
    """What is known of a shard."""
    return out / STATE_NAME / f"shard-{shard:06d}.report"


class BetonFile:
    """samples.beton while it is written: tar shards are laid into it in order, as they are reported, while others are written. A
    shard is removed when the disk has its samples in the beton, so it hardly ever has them twice, and what has a report and no
    file of its own is in the beton. Opened again after any stop, it goes on where it was."""

    def __init__(self, out: Path, num_shards: int, num_listed: int, report_of: Callable[[int], Any]) -> None:
        """`report_of`: the report of a shard, or None where it is not written yet."""
        self._out, self._num_shards, self._report_of = out, num_shards, report_of
        self._path = out / STATE_NAME / BETON_NAME
        if (out / BETON_NAME).exists():  # whole already, but for the manifest
            os.replace(out / BETON_NAME, self._path)
        self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._layout, self._next = self._found(num_listed)
        self._laid: list[Path] = []
        self._file.truncate(self._layout.end)
        self._tables, self._num_samples = Layout(num_listed), 0

    def _found(self, num_listed: int) -> tuple[Layout, int]:
        """What the beton has, and how many shards that is. Shards that are nowhere are not reported any more."""
        layout, end = Layout(num_listed), 0
        while end < self._num_shards and not shard_path(self._out, end).exists() and (report := self._report_of(end)):
            layout.place(report.records["byte_count"])
            end += 1
        if self._path.stat().st_size < layout.end:
            layout, end = Layout(num_listed), 0
        for shard in range(end, self._num_shards):
            if not shard_path(self._out, shard).exists():
                report_path(self._out, shard).unlink(missing_ok=True)
        return layout, end

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, of which was heard already
            self._file.close()

    def lay(self) -> None:
        """Lay the shards that are reported by now and come next."""
        while self._next < self._num_shards and (report := self._report_of(self._next)):
            shard = shard_path(self._out, self._next)
            self._append(report.records, shard)
            self._laid.append(shard)
            self._next += 1
            if len(self._laid) >= _SHARDS_PER_SYNC or self._next == self._num_shards:
                self._sync()
                for laid in self._laid:  # the first one first: what follows one that is there is no longer in the beton
                    laid.unlink()
                self._laid.clear()

    def _append(self, records: NDArray[np.void], shard: Path) -> None:
        """A shard's samples at their places, the same ones where it failed before; what lies between is zero."""
        columns = [records[name].tolist() for name in ("offset", "byte_count", "checksum")]
        layout = copy.copy(self._layout)
        places = layout.place(records["byte_count"]).tolist()
        with naming(self._out / BETON_NAME), shard.open("rb") as source:
            for place, start, byte_count, checksum in zip(places, *columns, strict=True):
                source.seek(start)
                content = source.read(byte_count)
                if xxhash.xxh3_64_intdigest(content) != checksum:
                    report_path(self._out, self._next).unlink()
                    raise ShardError(f"{shard} is not as it was written: run the same command again to mend it.")
                self._file.seek(place)
                self._file.write(content)
        self._layout = layout

    def _sync(self) -> None:
        with naming(self._out / BETON_NAME):
            self._file.flush()
            os.fsync(self._file.fileno())

    def write_tables(self, records: NDArray[np.void]) -> None:
        """The rows of the next shard's samples; gives `records` their places in the beton."""
        records["offset"] = self._tables.place(records["byte_count"])
        row, first = METADATA_DTYPE.itemsize, self._num_samples
        self._file.seek(_METADATA_START + first * row)
        self._file.write(metadata_of(records).tobytes())
        self._file.seek(self._layout.end + first * ALLOCATION_DTYPE.itemsize)
        self._file.write(allocations_of(first, records).tobytes())
        self._num_samples += len(records)

    def commit(self) -> StoredFile:
        """Write its head, and give it its name."""
        self._file.seek(0)
        self._file.write(self._layout.head(self._num_samples))
        self._sync()
        os.replace(self._path, self._out / BETON_NAME)
        return stored_file(self._out / BETON_NAME, self._num_samples)

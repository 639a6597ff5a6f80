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
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.index import BETON_NAME, JPEG, STATE_NAME, ShardError, StoredFile, stored_file
from inscon.guard import naming, whole_file

FFCV_VERSION = 2
MIN_PAGE_SIZE = 1 << 23
"""Bytes; FFCV's own default."""
MAX_PAGE_SIZE = 1 << 30
"""Bytes; FFCV's process cache reads a page in one call, and Linux reads less than 2 GiB at a time."""

HEADER_DTYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_DTYPE = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE_DTYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA_DTYPE = np.dtype([("f0", IMAGE_DTYPE), ("f1", "<i8")], align=True)
ALLOCATION_DTYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

_INT_FIELD, _IMAGE_FIELD = 1, 2  # FFCV's type ids
_MODE_OF_JPEG, _MODE_OF_RAW = 0, 1  # FFCV's image modes
_LOOK_EVERY_S = 0.1
_PARTS_PER_SYNC = 8  # to wait for the disk takes as long as some parts
_METADATA_START = HEADER_DTYPE.itemsize + 2 * FIELD_DTYPE.itemsize


class Layout:
    """Where everything lies in a beton, worked out while its samples become known.

    `place` is to be called with all samples in order, some at a time; `end` and `page_size` then know the rest. Two
    layouts that are given the same place the same.
    """

    def __init__(self, num_listed: int) -> None:
        """`num_listed`: samples and pictures that were left out; room is kept for the metadata of all."""
        self.page_size = MIN_PAGE_SIZE
        """Of what was placed so far: the smallest that holds the largest sample."""
        self.data_start = _up(_METADATA_START + num_listed * METADATA_DTYPE.itemsize, MIN_PAGE_SIZE)
        self.end = self.data_start
        """Of what was placed so far: the position of the first free byte."""

    def place(self, byte_counts: NDArray[np.unsignedinteger]) -> NDArray[np.uint64]:
        """Positions, [n] uint64, of the next n samples: one after the other, none across the end of a page.

        Pages are of the smallest size until a sample is larger. It begins at a multiple of the page that holds it, so
        what was placed before it lies within such pages too. ValueError for a sample that no page of FFCV holds.
        """
        positions = []
        for byte_count in byte_counts.tolist():
            if self.end % MIN_PAGE_SIZE + byte_count > MIN_PAGE_SIZE:
                self.end = _up(self.end, self._page_of(byte_count))
            positions.append(self.end)
            self.end += byte_count
        return np.array(positions, np.uint64)

    def _page_of(self, byte_count: int) -> int:
        page = max(MIN_PAGE_SIZE, 1 << (byte_count - 1).bit_length())
        if page > MAX_PAGE_SIZE:
            raise ValueError(
                f"A .beton holds samples of at most {MAX_PAGE_SIZE} bytes. Found: {byte_count}; shrink the pictures "
                "(--max-resolution) or store them with --write-mode jpg."
            )
        self.page_size = max(self.page_size, page)
        return page

    def head(self, num_samples: int) -> bytes:
        """Header and field descriptions, once all samples are placed."""
        header = np.zeros(1, HEADER_DTYPE)
        header["version"], header["num_fields"], header["page_size"] = FFCV_VERSION, 2, self.page_size
        header["num_samples"], header["alloc_table_ptr"] = num_samples, self.end
        fields = np.zeros(2, FIELD_DTYPE)
        for field, name, type_id in zip(fields, (b"image", b"label"), (_IMAGE_FIELD, _INT_FIELD), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name, np.uint8)
        return header.tobytes() + fields.tobytes()


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


def read_header(path: Path) -> NDArray[np.void]:
    """The HEADER_DTYPE record of a beton. ShardError where it is none, or one of another version of FFCV."""
    with path.open("rb") as file:
        head = file.read(HEADER_DTYPE.itemsize)
    if len(head) < HEADER_DTYPE.itemsize:
        raise ShardError(
            f"{path} is {len(head)} bytes long and no .beton: copy it again or rerun data_prep/make_ffcv.py."
        )
    header = np.frombuffer(head, HEADER_DTYPE)[0]
    if header["version"] != FFCV_VERSION:
        raise ShardError(
            f"{path} says it is of version {header['version']} of FFCV's format, this program reads {FFCV_VERSION}: rerun "
            "data_prep/make_ffcv.py."
        )
    return header


def _up(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size


def num_laid(out: Path) -> int:
    """How many parts are in the beton, and on the disk."""
    try:
        return int((out / STATE_NAME / "laid").read_text())
    except FileNotFoundError:
        return 0


def part_path(out: Path, part: int) -> Path:
    return out / STATE_NAME / f"part-{part:06d}"


class BetonFile:
    """samples.beton while it is written: parts are laid into it in order, as they are reported, while others are still written.

    A part is removed when the disk has its samples in the beton, so the disk hardly ever has them twice. Opened again after any
    stop, it goes on where it was. Use it in a `with`.
    """

    def __init__(self, out: Path, num_parts: int, num_listed: int, report_of: Callable[[int], Any]) -> None:
        """`report_of`: the report of a part, or something false where it is not written yet."""
        self._out, self._num_parts, self._num_listed, self._report_of = out, num_parts, num_listed, report_of
        self._path = out / STATE_NAME / BETON_NAME
        if (out / BETON_NAME).exists():  # whole already, but for the manifest
            os.replace(out / BETON_NAME, self._path)
        self._layout, self._next = Layout(num_listed), num_laid(out)
        is_whole = True
        for part in range(self._next):
            report = report_of(part)
            is_whole = is_whole and bool(report)
            if report:
                self._layout.place(report.records["byte_count"])
        found = self._path.stat().st_size if self._path.exists() else 0
        if self._next and (not is_whole or found < self._layout.end):
            (out / STATE_NAME / "laid").unlink()  # it is gone, and with it its parts, which then are not done
            self._layout, self._next = Layout(num_listed), 0
        self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._file.truncate(self._layout.end)
        self._file.seek(self._layout.end)
        self._tables, self._num_samples = Layout(num_listed), 0

    def __enter__(self) -> "BetonFile":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a full disk, of which was heard already
            self._file.close()

    @contextlib.contextmanager
    def laid_meanwhile(self) -> Iterator[None]:
        """A thread lays parts until all are laid, which is waited for."""
        stopped = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            ending = thread.submit(self.lay, stopped)
            try:
                yield
            except BaseException:
                stopped.set()
                raise
            ending.result()

    def lay(self, stopped: threading.Event) -> None:
        """Lay all parts, waiting for each to be reported; ends early when `stopped` is set."""
        while self._next < self._num_parts and not stopped.is_set():
            report, part = self._report_of(self._next), part_path(self._out, self._next)
            if not report or (report.files and not part.exists()):  # it is being written, maybe once more
                stopped.wait(_LOOK_EVERY_S)
                continue
            self._lay(report, part)
            self._next += 1
            if self._next % _PARTS_PER_SYNC == 0 or self._next == self._num_parts:
                self._settle()

    def _lay(self, report: Any, part: Path) -> None:
        """Append a part's samples at their places; what lies between is zero."""
        checksum, records = xxhash.xxh3_128(), report.records
        offsets = self._layout.place(records["byte_count"])
        with naming(self._out / BETON_NAME), part.open("rb") if len(records) else contextlib.nullcontext() as source:
            for offset, byte_count in zip(offsets.tolist(), records["byte_count"].tolist(), strict=True):
                content = source.read(byte_count)
                checksum.update(content)
                self._file.seek(offset)
                self._file.write(content)
        if len(records) and checksum.hexdigest() != report.files[0].checksum:
            part.unlink()
            raise ShardError(
                f"{part} was not as it was written, and was removed: run the same command again, it goes on."
            )

    def _settle(self) -> None:
        self._sync()
        before = num_laid(self._out)
        with whole_file(self._out / STATE_NAME / "laid") as file:
            file.write(b"%d" % self._next)
        for part in range(before, self._next):
            part_path(self._out, part).unlink(missing_ok=True)

    def _sync(self) -> None:
        with naming(self._out / BETON_NAME):
            self._file.flush()
            os.fsync(self._file.fileno())

    def write_tables(self, records: NDArray[np.void]) -> None:
        """The rows of the next part's samples; gives `records` their places in the beton."""
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

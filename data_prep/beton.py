"""FFCV's file format, version 2, as FFCV 1.0.2 reads it. FFCV itself is not needed to write it.

    header        HEADER_DTYPE
    fields        two FIELD_DTYPE: "image" and "label"
    metadata      one METADATA_DTYPE per sample
    pages         the samples' bytes in the order of their ids, none across the end of a page
    allocations   one ALLOCATION_DTYPE per sample, to the end of the file

FFCV's own writer lays samples where its workers happen to be, hangs when one dies and re-encodes what it stores. This one
is given the samples in order and always writes the same bytes.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.index import JPEG, ShardError

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
        sums = np.concatenate([[0], np.cumsum(byte_counts, dtype=np.int64)])
        positions = np.empty(len(byte_counts), np.uint64)
        first = 0
        while first < len(byte_counts):
            room = MIN_PAGE_SIZE - self.end % MIN_PAGE_SIZE  # a whole page at a page's beginning
            stop = int(np.searchsorted(sums, sums[first] + room, side="right")) - 1
            if stop == first:
                page = self._page_of(int(byte_counts[first]))
                self.end = _up(self.end, page)
                stop += page > MIN_PAGE_SIZE
            positions[first:stop] = self.end + sums[first:stop] - sums[first]
            self.end += int(sums[stop] - sums[first])
            first = stop
        return positions

    def _page_of(self, byte_count: int) -> int:
        page = MIN_PAGE_SIZE
        while page < byte_count:
            page *= 2
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

"""FFCV's format as we write it: where samples lie, and that FFCV itself finds the same."""

from itertools import pairwise

import numpy as np
import pytest

from data_prep import beton
from data_prep.beton import Layout, allocations_of, metadata_of
from data_prep.index import JPEG, NO_LABEL, RAW, RECORD_DTYPE
from tests.packed import Sample, write_set

MB = 1 << 20
HEAD = 24 + 2 * 1041  # header, two descriptions of 1 + 16 + 1024
ROW = 24


def placed(layout, byte_counts):
    return layout.place(np.array(byte_counts, np.uint32)).tolist()


def test_pages_begin_after_the_metadata():
    assert Layout(1).end == 8 * MB
    last = (8 * MB - HEAD) // ROW
    assert Layout(last).end == 8 * MB
    assert Layout(last + 1).end == 16 * MB


def test_samples_lie_one_after_the_other_and_none_across_pages():
    layout = Layout(6)
    assert layout.page_size == 8 * MB
    # 3 and 4 MB fill a page but for one, 2 MB do not fit; 6 MB fill the second page exactly; 8 MB take one alone.
    assert placed(layout, [3 * MB, 4 * MB, 2 * MB, 6 * MB, 8 * MB, 1]) == [
        8 * MB, 11 * MB, 16 * MB, 18 * MB, 24 * MB, 32 * MB,
    ]  # fmt: skip
    assert layout.end == 32 * MB + 1


def test_a_sample_that_does_not_fit_by_one_byte_begins_a_page():
    assert placed(Layout(3), [1, 8 * MB - 1, 1]) == [8 * MB, 8 * MB + 1, 16 * MB]
    assert placed(Layout(3), [1, 8 * MB, 1]) == [8 * MB, 16 * MB, 24 * MB]
    assert placed(Layout(2), [2, 8 * MB - 1]) == [8 * MB, 16 * MB]


@pytest.mark.parametrize("seed", range(10))
def test_no_sample_crosses_a_page_however_many_are_placed_at_a_time(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, rng.choice([1, 7, 60, 300]) * MB, 200)
    at_once, piecewise = Layout(200), Layout(200)
    starts = np.array(placed(at_once, sizes))
    cuts = [0, *np.sort(rng.integers(0, 201, 12)).tolist(), 200]  # some pieces are empty
    assert [start for a, b in pairwise(cuts) for start in placed(piecewise, sizes[a:b])] == starts.tolist()
    page = at_once.page_size
    assert page == piecewise.page_size == max(8 * MB, 2 ** int(np.ceil(np.log2(sizes.max()))))
    assert (starts // page == (starts + sizes - 1) // page).all()
    assert (starts[1:] >= (starts + sizes)[:-1]).all() and at_once.end == starts[-1] + sizes[-1]


@pytest.mark.parametrize(
    ("largest", "page_size"), [(1, 8), (8 * MB, 8), (8 * MB + 1, 16), (16 * MB, 16), (100 * MB, 128), (2**30, 1024)]
)
def test_a_page_doubles_until_it_holds_the_largest_sample(largest, page_size):
    layout = Layout(4)
    positions = placed(layout, [5, largest, 7, 9 * MB])
    assert layout.page_size == max(page_size, 16) * MB
    sizes = [5, largest, 7, 9 * MB]
    assert all(start // layout.page_size == (start + n - 1) // layout.page_size for start, n in zip(positions, sizes))
    assert all(start + n <= after for (start, n), after in zip(zip(positions, sizes), positions[1:]))
    assert positions[1] % (page_size * MB) == 0 or page_size == 8
    header = np.frombuffer(layout.head(4)[:24], beton.HEADER_DTYPE)[0]
    assert header["page_size"] == layout.page_size


def test_a_sample_that_no_page_holds_is_refused():
    with pytest.raises(
        ValueError, match=r"samples of at most 1073741824 bytes. Found: 1073741825; .* --write-mode jpg"
    ):
        placed(Layout(1), [2**30 + 1])


def test_the_head_by_hand():
    layout = Layout(3)
    placed(layout, [MB])
    head = layout.head(3)
    assert len(head) == HEAD
    assert head[:24] == (
        b"\x02\x00" + b"\x02\x00" + (8 * MB).to_bytes(4, "little") + (3).to_bytes(8, "little")
        + (9 * MB).to_bytes(8, "little")
    )  # fmt: skip
    assert head[24 : 24 + 1041] == b"\x02image" + bytes(11 + 1024)
    assert head[24 + 1041 :] == b"\x01label" + bytes(11 + 1024)


def test_rows_of_the_tables_by_hand():
    records = np.zeros(2, RECORD_DTYPE)
    records["offset"], records["byte_count"] = [8 * MB, 2**40], [7, 2**31]
    records["height"], records["width"] = [300, 65_500], [500, 1]
    records["label"], records["encoding"] = [NO_LABEL, 999], [JPEG, RAW]
    first, second = (row.tobytes() for row in metadata_of(records))
    # mode, width, height, position; three bytes of alignment; label
    assert first[:13] == b"\0" + b"\xf4\x01" + b"\x2c\x01" + (8 * MB).to_bytes(8, "little")
    assert first[16:] == (-(2**31)).to_bytes(8, "little", signed=True)
    assert second[:13] == b"\x01" + b"\x01\x00" + b"\xdc\xff" + (2**40).to_bytes(8, "little")
    assert second[16:] == (999).to_bytes(8, "little")
    assert first[13:16] == second[13:16] == bytes(3)
    assert allocations_of(41, records).tolist() == [(41, 8 * MB, 7), (42, 2**40, 2**31)]


# ---------------------------------------------------------------------------------------------------------- FFCV itself


@pytest.fixture(scope="module")
def ffcv_types():
    return pytest.importorskip("ffcv.types", reason="ffcv is not installed")


def test_types_are_ffcvs(ffcv_types):
    from ffcv.fields import IntField, RGBImageField

    assert ffcv_types.CURRENT_VERSION == beton.FFCV_VERSION
    assert ffcv_types.HeaderType == beton.HEADER_DTYPE
    assert ffcv_types.FieldDescType == beton.FIELD_DTYPE
    assert ffcv_types.ALLOC_TABLE_TYPE == beton.ALLOCATION_DTYPE
    assert ffcv_types.get_metadata_type([RGBImageField(), IntField()]) == beton.METADATA_DTYPE
    for ours, theirs in (
        (beton.HEADER_DTYPE, ffcv_types.HeaderType),
        (beton.FIELD_DTYPE, ffcv_types.FieldDescType),
        (beton.METADATA_DTYPE, ffcv_types.get_metadata_type([RGBImageField(), IntField()])),
    ):
        assert ours.itemsize == theirs.itemsize
        assert [ours.fields[name][1] for name in ours.names] == [theirs.fields[name][1] for name in theirs.names]


def test_ffcv_finds_every_sample(ffcv_types, tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader

    rng = np.random.default_rng(0)
    sizes = [(3 * MB, JPEG), (8 * MB + 5, JPEG), (30, RAW), (1, JPEG), (7 * MB, JPEG)]
    samples = [
        Sample(rng.bytes(size), 2 + i, 5 + i, label, f"{i}.jpg", encoding)
        for i, ((size, encoding), label) in enumerate(zip(sizes, [0, 1, NO_LABEL, 1, 0]))
    ]
    write_set(tmp_path / "set", samples, per_shard=2, container="beton")
    path = tmp_path / "set/samples.beton"
    reader = Reader(str(path))
    assert (reader.num_samples, reader.page_size) == (5, 16 * MB)
    assert list(reader.handlers) == ["image", "label"]
    assert [type(handler) for handler in reader.handlers.values()] == [RGBImageField, IntField]
    assert reader.metadata["f1"].tolist() == [sample.label for sample in samples]
    images = reader.metadata["f0"]
    assert images["mode"].tolist() == [0, 0, 1, 0, 0]  # FFCV's "jpg" and "raw"
    assert images["height"].tolist() == [2, 3, 4, 5, 6] and images["width"].tolist() == [5, 6, 7, 8, 9]
    assert reader.alloc_table["sample_id"].tolist() == list(range(5))
    assert reader.alloc_table["ptr"].tolist() == images["data_ptr"].tolist()
    content = path.read_bytes()
    pages = set()
    for sample, (_, start, size) in zip(samples, reader.alloc_table.tolist()):
        assert content[start : start + size] == sample.content
        pages.add(start // reader.page_size)
        assert (start + size - 1) // reader.page_size == start // reader.page_size  # FFCV reads a page at a time
    assert len(pages) == 2

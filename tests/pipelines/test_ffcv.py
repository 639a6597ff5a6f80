"""What only FFCV has: pixels and JPEGs in one file, threads of our own around its graph, its bugs kept away from everybody else."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)

import numba

from data_prep.index import DatasetIndex, ShardError
from data_prep.make_dali import pack_folder
from data_prep.make_ffcv import pack_beton
from inscon.plan import ColorSpec, ViewSpec
from pipelines import ffcv
from pipelines.color import MEAN, STD
from tests.packed import Sample, write_set
from tests.pipelines.conftest import (
    PAIR,
    REAL,
    as_jpeg,
    assert_same,
    batches,
    beton_beside,
    draw_picture,
    ids_of,
    opened,
)

ROOT = Path(__file__).resolve().parents[2]


def from_beton(name: str, beton: Path, total_steps: int, *, loader=None, **feed) -> list:
    """`batches` of a .beton, for ffcv and for the reference."""
    return batches(name, None, total_steps, loader={"data": beton, **(loader or {})}, **feed)


def assert_equal_the_reference(beton: Path, total_steps: int, **settings) -> list:
    made, wanted = (from_beton(name, beton, total_steps, **settings) for name in ("ffcv", "reference"))
    for one, other in zip(made, wanted, strict=True):
        assert_same(one, other, by_pil=True)
    return made


@pytest.fixture
def beton(make_shards):
    """A .beton of its own, to be damaged."""
    return beton_beside(make_shards()) / "samples.beton"


# ----------------------------------------------------------------------------------------------------- pixels and JPEGs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 pictures, some large enough to be shrunk."""
    folder = tmp_path_factory.mktemp("pictures") / "a"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02}.jpg").write_bytes(as_jpeg(draw_picture(i, 90 + 13 * i, 400 - 11 * i)))
    return folder.parent


@pytest.mark.parametrize(
    "settings",
    [
        {"write_mode": "raw"},
        {"max_resolution": 150, "quality": 90},
        {"write_mode": "raw", "max_resolution": 150},
        {"short_side": 100},
    ],
)
def test_raw_and_shrunk_betons_equal_the_reference(settings, pictures, tmp_path):
    index = pack_beton(pictures, tmp_path / "beton", workers=1, **settings)
    encodings = set(index.records(range(24))["encoding"].tolist())
    assert encodings == {int(settings.get("write_mode") == "raw")}
    assert_equal_the_reference(tmp_path / "beton", 5, batch_size=12)


def test_pixels_stored_raw_are_those_of_the_shrunk_jpegs(pictures, tmp_path):
    """The same shrunk pictures as JPEGs in tar shards, read by PIL, and decoded at packing time in a .beton."""
    pack_folder(pictures, tmp_path / "shards", workers=1, max_resolution=150)
    pack_beton(tmp_path / "shards", tmp_path / "beton", workers=1, write_mode="raw")
    made = from_beton("ffcv", tmp_path / "beton", 4, batch_size=12)
    for one, other in zip(made, batches("reference", tmp_path / "shards", 4, batch_size=12), strict=True):
        assert_same(one, other, by_pil=True)


@pytest.mark.parametrize("name", ["ffcv", "reference"])
def test_raw_pixels_of_another_size_are_named_or_replaced(name, tmp_path, caplog):
    samples = [Sample(bytes(3 * 40 * 50), 40, 50, 0, f"{i}.png", 1) for i in range(20)]
    samples[7] = Sample(bytes(3 * 40 * 49), 40, 50, 0, "7.png", 1)
    write_set(tmp_path / "set", samples, container="beton")
    with pytest.raises(
        ValueError, match=r"sample 7 \(7.png\) in samples.beton .*\(5880 bytes are not 40x50 px of 3 bytes"
    ):
        from_beton(name, tmp_path / "set", 4)
    made = from_beton(name, tmp_path / "set", 4, substitute=True)
    assert all(len(set(ids)) == 8 and 7 not in ids for ids in ids_of(made))
    assert "5880 bytes" in caplog.text and "stands in for it" in caplog.text


def test_center_crops_of_raw_pixels_are_those_of_the_jpegs(pictures, tmp_path):
    """What kNN and show_views read: any packed set."""
    from pipelines.evaluation import LabelledViews

    jpegs = pack_beton(pictures, tmp_path / "jpegs", workers=1, max_resolution=150)
    raw = pack_beton(tmp_path / "jpegs", tmp_path / "raw", workers=1, write_mode="raw")
    crops = (LabelledViews(data.path, 64, 10).center_crops() for data in (jpegs, raw))
    for (one, labels), (other, same) in zip(*crops, strict=True):
        assert torch.equal(one, other) and torch.equal(labels, same)


def test_dali_says_who_reads_raw_pixels(tmp_path):
    write_set(tmp_path / "set", [Sample(bytes(3 * 40 * 50), 40, 50, 0, "a.png", 1)] * 20, container="beton")
    with pytest.raises(ValueError, match="is stored as raw pixels: read this set with --pipeline ffcv"):
        batches("dali", tmp_path / "set", 1)


def test_a_bad_picture_leaves_no_stale_pixels(tmp_path):
    """FFCV's own decoder returns what lay in its memory before; here the batch shows other samples, whole ones."""
    samples = [Sample(as_jpeg(Image.new("RGB", (90, 70), (10 * i,) * 3)), 70, 90, 0, f"{i}.jpg") for i in range(20)]
    broken = {3, 8, 15}
    for i in broken:
        samples[i] = samples[i]._replace(content=samples[i].content[: len(samples[i].content) // 2])
    write_set(tmp_path / "set", samples, container="beton")
    views = (ViewSpec(name="query", size=64, color=ColorSpec(jitter_probability=0.0)),)
    for batch in from_beton("ffcv", tmp_path / "set", 10, views=views, substitute=True, batch_size=4):
        assert not broken & set(batch.sample_ids.tolist())
        std, mean = torch.tensor(STD), torch.tensor(MEAN)
        level = (batch.views["query"].pixels * std[:, None, None] + mean[:, None, None]) * 255
        assert (level - 10.0 * batch.sample_ids[:, None, None, None]).abs().max() <= 1.01


def test_what_follows_a_refused_picture_is_decoded_whole(tmp_path, caplog):
    """libjpeg-turbo may take the next picture for the rest of the one before. Cut within each of the header's segments; one
    thread, so that every picture follows another."""
    whole = as_jpeg(draw_picture(1, 60, 80))
    assert whole.index(b"\xff\xda") > 600
    samples = [Sample(as_jpeg(draw_picture(i, 60, 80)), 60, 80, 0, f"{i}.jpg") for i in range(40)]
    cuts = {3 + 4 * n: length for n, length in enumerate([2, 10, 30, 200, 400, 600, 640, 690])}
    for sample, length in cuts.items():
        samples[sample] = samples[sample]._replace(content=whole[:length])
    write_set(tmp_path / "set", samples, container="beton")
    made = assert_equal_the_reference(tmp_path / "set", 20, batch_size=4, substitute=True, loader={"threads": 1})
    assert not set(cuts) & {sample for ids in ids_of(made) for sample in ids}
    assert all(f"sample {sample} ({sample}.jpg)" in caplog.text for sample in cuts)


def test_ffcvs_libjpeg_turbo_decodes_as_pil_where_ffcv_itself_does_not():
    """The flag that FFCV sets is why: the accurate transform is PIL's, the fast one is up to dozens of levels away."""
    from ffcv.libffcv import imdecode

    image = draw_picture(1, 200, 240)
    jpeg = np.frombuffer(as_jpeg(image), np.uint8)
    wanted = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    theirs = np.zeros((200, 240, 3), np.uint8)
    imdecode(jpeg, theirs, 200, 240, 200, 240)
    ours, bench = np.zeros((200, 240, 3), np.uint8), ffcv.Bench()
    done = ffcv._decompress(int(bench.tools[0]), jpeg.ctypes.data, jpeg.size, ours.ctypes.data, 240, 0, 200, 0, 0)
    bench.close()
    assert done == 0 and np.array_equal(ours, wanted)
    assert np.abs(theirs - wanted).max() > 0


# ------------------------------------------------------------------------------------------- files that are not as they should


def cuts(path: Path) -> list[int]:
    """Ten lengths: nothing, within header, fields and metadata, before and in the first sample, on, at the end."""
    size, index = path.stat().st_size, DatasetIndex.open(path.parent)
    records = index.records(range(len(index)))
    first, last = int(records["offset"][0]), records[-1]
    end = int(last["offset"]) + int(last["byte_count"])
    return [0, 10, 24, 1500, 2200, first, first + 100, (first + end) // 2, end, size - 1]


@pytest.mark.parametrize("number", range(10))
def test_a_beton_cut_short_is_one_sentence(number, beton):
    os.truncate(beton, cuts(beton)[number])
    with pytest.raises(ShardError) as caught:
        from_beton("ffcv", beton.parent, 4)
    message = str(caught.value)
    assert f"{beton} is {beton.stat().st_size} bytes long where the manifest says" in message and "cut short" in message
    assert "copy it again or rerun data_prep/make_ffcv.py" in message and "\n" not in message


@pytest.mark.parametrize("number", range(10))
def test_a_beton_cut_short_while_it_is_read_is_one_sentence(number, beton, whole):
    """No SIGBUS, no stale pixels: a sample that is gone is named; where only FFCV's own table went, nothing is missing."""
    length, wanted = cuts(beton)[number], iter(whole("ffcv"))
    with opened("ffcv", None, 7 if number >= 8 else 30, loader={"data": beton.parent}) as pipeline:
        made = iter(pipeline)
        assert_same(next(made), next(wanted))
        os.truncate(beton, length)
        if number >= 8:
            for one, other in zip(made, wanted, strict=True):
                assert_same(one, other)
            return
        with pytest.raises(
            ShardError, match=r"sample \d+ \(a/picture_\d+.jpg\) in samples.beton is not whole, .*cut short"
        ):
            for one, other in zip(made, wanted):
                assert_same(one, other)
            list(made)


def test_a_beton_without_our_index_is_refused(beton, tmp_path):
    foreign = tmp_path / "elsewhere.beton"
    foreign.write_bytes(beton.read_bytes())
    with pytest.raises(ShardError, match=r"elsewhere.beton is no packed set.*python data_prep/make_ffcv.py"):
        from_beton("ffcv", foreign, 1)


def test_tar_shards_are_refused_with_both_ways_out(shards):
    with pytest.raises(
        ShardError,
        match=r"tar shards, and the pipeline ffcv reads a .beton: python data_prep/make_ffcv.py .*--pipeline dali",
    ):
        from_beton("ffcv", shards, 1)


# ------------------------------------------------------------------------------------------------------------ settings


def test_there_is_no_decoder_on_the_gpu(shards):
    with pytest.raises(
        ValueError, match="decodes on the host, and decode is mixed; set --decode cpu or --pipeline dali"
    ):
        opened("ffcv", shards, 1, loader={"decode": "mixed"})


def test_a_thread_keeps_its_memory():
    bench = ffcv.Bench()
    small = bench.room("picture", 3_000_000)
    assert len(small) >= 3_000_000 and bench.room("picture", 1_000_000) is small
    assert bench.room("stored", 1_000_000) is not small
    assert len(bench.room("picture", 30_000_000)) >= 30_000_000
    bench.close()


# ----------------------------------------------------------------------------------------------- ends, threads, other code


def test_an_error_in_a_thread_reaches_the_consumer(shards, monkeypatch):
    """FFCV's own loader thread dies of it, and the consumer waits for ever."""
    with opened("ffcv", shards, 9) as pipeline:
        batch = iter(pipeline)
        next(batch)
        monkeypatch.setattr(ffcv.FfcvEngine, "_make", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(batch)


def test_out_of_host_memory_is_a_sentence(shards, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(ffcv.Bench, "room", full)
    with (
        opened("ffcv", shards, 9) as pipeline,
        pytest.raises(MemoryError, match="the pipeline ran out of memory on the host: set a smaller --prefetch or"),
    ):
        list(pipeline)


def test_other_code_does_not_notice_ffcv():
    """In a process of its own: FFCV sets everybody's threads to 1 when it is imported, and numba's uint8 arrays read-only
    when a loader of its own is made."""
    code = """
        import torch, numba, numpy as np
        before = torch.get_num_threads(), numba.get_num_threads()
        from pipelines import ffcv
        assert (torch.get_num_threads(), numba.get_num_threads()) == before, "threads"
        assert type(ffcv.IMAGE_MODES) is dict and numba.typed.Dict is not dict, "dictionaries"
        ffcv.compile_decoder()
        assert numba.uint8[::1].mutable and numba.uint64[::1].mutable

        @numba.njit
        def fill(a):
            for i in range(len(a)):
                a[i] = 7

        a = np.zeros(5, np.uint8)
        fill(a)
        assert a.tolist() == [7] * 5
        print("unharmed")
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "unharmed\n", done.stderr


def test_a_numba_function_over_bytes_compiles_after_a_pipeline_ran(whole):
    whole("ffcv")

    @numba.njit
    def invert(levels):
        for i in range(levels.shape[0]):
            levels[i] = 255 - levels[i]

    levels = np.arange(3, dtype=np.uint8)
    invert(levels)
    assert levels.tolist() == [255, 254, 253]


# ------------------------------------------------------------------------------------------------------ what is missing


def test_without_ffcv_the_others_work_and_it_says_so(shards):
    """In a process where it cannot be imported."""
    code = f"""
        import sys
        sys.modules["ffcv"] = None
        from pathlib import Path
        from inscon.config import LoaderConfig
        from inscon.plan import ViewSpec
        from pipelines import open_pipeline
        from pipelines.feed import Feed, open_index
        for name in ("reference", "ffcv"):
            loader = LoaderConfig(data=Path({str(shards)!r}), pipeline=name, threads=int(name == "ffcv"))
            feed = Feed(open_index(loader), [ViewSpec(name="query", size=64)], batch_size=8, seed=0)
            try:
                with open_pipeline(feed, loader, total_steps=2) as pipeline:
                    print(name, len(list(pipeline)))
            except ValueError as error:
                print(error)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    works, refused = done.stdout.splitlines()
    assert works == "reference 2", done.stderr
    assert (
        "ffcv does not load (" in refused and "apt-get install" in refused and "pip install 'inscon[ffcv]'" in refused
    )


@pytest.mark.parametrize("settings", [{"quality": 90}, {"write_mode": "raw"}])
def test_real_pictures_shrunk_and_raw_equal_the_reference(settings, tmp_path):
    if not REAL.is_dir():
        pytest.skip(f"no pictures in {REAL}")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(REAL.glob("*/*.JPEG"))[::6]))
    index = pack_beton(listed, tmp_path / "beton", workers=1, max_resolution=400, **settings)
    assert max(index.sizes(range(len(index))).max(1)) == 400
    views = [ViewSpec(name=spec.name, overlap=spec.overlap) for spec in PAIR]
    assert_equal_the_reference(tmp_path / "beton", 2, views=views)

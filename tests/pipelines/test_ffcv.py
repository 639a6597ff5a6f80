"""What only FFCV has: pixels and JPEGs in one file, threads of our own around its graph, its bugs kept away from everybody else."""

import dataclasses
import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)

import numba

from data_prep.index import DatasetIndex, ShardError
from data_prep.make_dali import pack_folder
from data_prep.make_ffcv import pack_beton
from pipelines import ffcv, open_pipeline
from pipelines.feed import open_feed
from tests.packed import Sample, write_set
from tests.pipelines.conftest import REAL, as_jpeg, assert_rounds_leave_nothing, beton_beside, draw_picture
from tests.pipelines.test_engines import assert_same, batches, opened
from tests.pipelines.test_faults import ids_of, substituting

ROOT = Path(__file__).resolve().parents[2]


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
        {"write_mode": "smart", "smart_threshold": 6.1},
        {"max_resolution": 150, "quality": 90},
        {"write_mode": "raw", "max_resolution": 150},
        {"write_mode": "smart", "short_side": 100, "smart_threshold": 4.7},
    ],
)
def test_raw_mixed_and_shrunk_betons_equal_the_reference(settings, pictures, make_config, tmp_path):
    index = pack_beton(pictures, tmp_path / "beton", workers=1, **settings)
    encodings = set(index.records(range(24))["encoding"].tolist())
    assert encodings == {"raw": {1}, "smart": {0, 1}}.get(settings.get("write_mode"), {0})
    config = make_config(tmp_path / "beton", batch_size=12)
    made = open_pipeline("ffcv", config=config, total_steps=5)
    with made, open_pipeline("reference", config=config, total_steps=5) as wanted:
        for one, other in zip(made, wanted, strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.key.crop_box, other.key.crop_box)
            assert (one.query.pixels - other.query.pixels).abs().mean() * 255 * 0.226 <= 0.15
            if int(PIL.__version__.split(".")[0]) >= 13:
                assert_same(one, other)


def test_pixels_stored_raw_are_those_of_the_shrunk_jpegs(pictures, make_config, tmp_path):
    """The same shrunk pictures as JPEGs in tar shards, read by PIL, and decoded at packing time in a .beton."""
    pack_folder(pictures, tmp_path / "shards", workers=1, max_resolution=150)
    pack_beton(tmp_path / "shards", tmp_path / "beton", workers=1, write_mode="raw")
    configs = [make_config(tmp_path / name, batch_size=12) for name in ("beton", "shards")]
    made = open_pipeline("ffcv", config=configs[0], total_steps=4)
    with made, open_pipeline("reference", config=configs[1], total_steps=4) as wanted:
        for one, other in zip(made, wanted, strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids)
            assert (one.query.pixels - other.query.pixels).abs().mean() * 255 * 0.226 <= 0.15


@pytest.mark.parametrize("name", ["ffcv", "reference"])
def test_raw_pixels_of_another_size_are_named_or_replaced(name, make_config, tmp_path, caplog):
    samples = [Sample(bytes(3 * 40 * 50), 40, 50, 0, f"{i}.png", 1) for i in range(20)]
    samples[7] = Sample(bytes(3 * 40 * 49), 40, 50, 0, "7.png", 1)
    write_set(tmp_path / "set", samples, container="beton")
    config = make_config(tmp_path / "set")
    with pytest.raises(
        ValueError, match=r"sample 7 \(7.png\) in samples.beton .*\(5880 bytes are not 40x50 px of 3 bytes"
    ):
        list(open_pipeline(name, config=config, total_steps=4))
    with open_pipeline(name, config=substituting(config), total_steps=4) as pipeline:
        assert all(len(set(ids)) == 8 and 7 not in ids for ids in ids_of(pipeline))
    assert "5880 bytes" in caplog.text and "stands in for it" in caplog.text


def test_center_crops_of_raw_pixels_are_those_of_the_jpegs(pictures, tmp_path):
    """What kNN and show_views read: any packed set."""
    from pipelines.evaluation import LabelledViews

    jpegs = pack_beton(pictures, tmp_path / "jpegs", workers=1, max_resolution=150)
    raw = pack_beton(tmp_path / "jpegs", tmp_path / "raw", workers=1, write_mode="raw")
    crops = (LabelledViews(data.path, 64, 10).center_crops() for data in (jpegs, raw))
    for (one, labels), (other, same) in zip(*crops, strict=True):
        assert torch.equal(one, other) and torch.equal(labels, same)


def test_dali_says_who_reads_raw_pixels(make_config, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    write_set(tmp_path / "set", [Sample(bytes(3 * 40 * 50), 40, 50, 0, "a.png", 1)] * 20, container="beton")
    with pytest.raises(ValueError, match="is stored as raw pixels: read this set with --pipeline ffcv"):
        list(open_pipeline("dali", config=make_config(tmp_path / "set"), total_steps=1))


def test_a_bad_picture_leaves_no_stale_pixels(make_config, tmp_path):
    """FFCV's own decoder returns what lay in its memory before; here the batch shows other samples, whole ones."""
    samples = [Sample(as_jpeg(Image.new("RGB", (90, 70), (10 * i,) * 3)), 70, 90, 0, f"{i}.jpg") for i in range(20)]
    broken = {3, 8, 15}
    for i in broken:
        samples[i] = samples[i]._replace(content=samples[i].content[: len(samples[i].content) // 2])
    write_set(tmp_path / "set", samples, container="beton")
    config = make_config(tmp_path / "set", jitter_probability=0.0)
    with open_pipeline("ffcv", config=substituting(config), total_steps=10) as pipeline:
        for batch in pipeline:
            assert not broken & set(batch.sample_ids.tolist())
            std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
            level = (batch.key.pixels * std[:, None, None] + mean[:, None, None]) * 255
            assert (level - 10.0 * batch.sample_ids[:, None, None, None]).abs().max() <= 1.01
        assert set(pipeline.bad_samples()) <= broken and pipeline.bad_samples()


@pytest.mark.parametrize("cut", [2, 10, 30, 200, 400, 600, 640, 690])
def test_what_follows_a_refused_picture_is_decoded_whole(cut, make_config, tmp_path):
    """libjpeg-turbo may take the next picture for the rest of the one before. Cut within each of the header's segments; one
    thread, so that every picture follows every other."""
    whole = as_jpeg(draw_picture(1, 60, 80))
    assert whole.index(b"\xff\xda") > 600
    samples = [Sample(as_jpeg(draw_picture(i, 60, 80)), 60, 80, 0, f"{i}.jpg") for i in range(20)]
    samples[6] = samples[6]._replace(content=whole[:cut])
    write_set(tmp_path / "set", samples, container="beton")
    config = make_config(tmp_path / "set", threads=1)
    with open_pipeline("ffcv", config=substituting(config), total_steps=16) as pipeline:
        made = list(pipeline)
        assert pipeline.bad_samples() == [6]
    with open_pipeline("reference", config=substituting(config), total_steps=16) as wanted:
        for one, other in zip(made, wanted, strict=True):
            assert_like(one, other)


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
def test_a_beton_cut_short_is_one_sentence(number, beton, make_config):
    os.truncate(beton, cuts(beton)[number])
    with pytest.raises(ShardError) as caught:
        open_pipeline("ffcv", config=make_config(beton.parent), total_steps=4)
    message = str(caught.value)
    assert f"{beton} is {beton.stat().st_size} bytes long where the manifest says" in message and "cut short" in message
    assert "copy it again or rerun data_prep/make_ffcv.py" in message and "\n" not in message


@pytest.mark.parametrize("number", range(10))
def test_a_beton_cut_short_while_it_is_read_is_one_sentence(number, beton, make_config):
    """No SIGBUS, no stale pixels: a sample that is gone is named; where only FFCV's own table went, nothing is missing."""
    config, length = make_config(beton.parent), cuts(beton)[number]
    with open_pipeline("reference", config=config, total_steps=30) as pipeline:
        wanted = list(pipeline)
    with open_pipeline("ffcv", config=config, total_steps=30) as pipeline:
        made = iter(pipeline)
        assert_like(next(made), wanted[0])
        os.truncate(beton, length)
        if number >= 8:
            for one, other in zip(made, wanted[1:], strict=True):
                assert_like(one, other)
            return
        with pytest.raises(
            ShardError, match=r"sample \d+ \(a/picture_\d+.jpg\) in samples.beton is not whole, .*cut short"
        ):
            for one, other in zip(made, wanted[1:]):
                assert_like(one, other)


def assert_like(one, other):
    assert torch.equal(one.sample_ids, other.sample_ids)
    assert (one.query.pixels - other.query.pixels).abs().mean() * 255 * 0.226 <= 0.15


def test_a_beton_without_our_index_is_refused(beton, make_config, tmp_path):
    foreign = tmp_path / "elsewhere.beton"
    foreign.write_bytes(beton.read_bytes())
    with pytest.raises(
        ShardError, match=r"elsewhere.beton has no index of ours beside it.*python data_prep/make_ffcv.py"
    ):
        open_pipeline("ffcv", config=make_config(foreign), total_steps=1)


def test_a_beton_of_another_version_of_ffcv_is_refused(beton, make_config):
    with open(beton, "r+b") as file:
        file.write(b"\x03")
    with pytest.raises(
        ShardError, match=r"of version 3 of FFCV's format, this program reads 2: rerun data_prep/make_ffcv.py"
    ):
        open_pipeline("ffcv", config=make_config(beton.parent), total_steps=1)


def test_a_beton_of_another_set_is_refused(beton, make_config):
    with open(beton, "r+b") as file:
        file.seek(8)
        file.write((21).to_bytes(8, "little"))
    with pytest.raises(
        ShardError, match=r"says it holds 21 samples where its index has 20; the two are not of one run"
    ):
        open_pipeline("ffcv", config=make_config(beton.parent), total_steps=1)


def test_tar_shards_are_refused_with_both_ways_out(shards, make_config):
    with pytest.raises(
        ShardError,
        match=r"tar shards, and the pipeline ffcv reads a .beton: python data_prep/make_ffcv.py .*--pipeline dali",
    ):
        open_pipeline("ffcv", config=make_config(shards), total_steps=1)


# ------------------------------------------------------------------------------------------------------------ settings


def test_at_least_one_thread(make_config):
    with pytest.raises(ValueError, match="at least 1 thread. Found: 0"):
        opened("ffcv", config=make_config(threads=0), total_steps=1)


def test_there_is_no_decoder_on_the_gpu(make_config):
    with pytest.raises(
        ValueError, match="decodes on the host, and decode is mixed; set --decode cpu or --pipeline dali"
    ):
        opened("ffcv", config=make_config(decode="mixed"), total_steps=1)


@pytest.mark.parametrize("chunks", [1, 2, 100])
def test_pieces_of_a_batch_change_nothing(chunks, make_config, monkeypatch):
    wanted = batches("ffcv", make_config(threads=1), 5)
    monkeypatch.setattr(ffcv, "CHUNKS", chunks)
    for threads in (1, 3):
        for one, other in zip(batches("ffcv", make_config(threads=threads), 5), wanted, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
@pytest.mark.parametrize("start_step", [0, 3, 7])
def test_a_windowed_order_is_every_engines(name, start_step, make_config, tmp_path, monkeypatch):
    """Blocks of 4, windows of 8, 20 samples: pixels follow the order, also from the middle."""
    monkeypatch.setattr("inscon.sampling.BLOCK", 4)
    config = make_config(threads=0 if name == "reference" else 2, batch_size=4)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, shuffle_window=8))
    made = batches(name, config, 10, start_step=start_step)
    order = open_feed(config, 0, 1).order
    assert ids_of(made) == [order.global_batch(step).tolist() for step in range(start_step, 10)]
    for epoch in range(-(-start_step // 5), 2):
        shown = ids_of(made)[epoch * 5 - start_step : epoch * 5 - start_step + 5]
        assert sorted(i for ids in shown for i in ids) == list(range(20))
    with opened(name, config=config, total_steps=1) as pipeline:
        assert "shuffled in windows of 8 samples, 2 blocks of 4" in pipeline.describe()
        assert "\n" not in pipeline.describe()


def test_only_large_pictures_give_their_memory_back():
    bench = ffcv.Bench()
    small = bench.room("picture", 3_000_000)
    assert len(small) >= 3_000_000 and bench.room("picture", 1_000_000) is small
    assert bench.room("stored", 1_000_000) is not small
    large = bench.room("picture", ffcv.KEPT + 1)
    assert len(large) > ffcv.KEPT and bench.room("picture", 3_000_000) is small
    bench.close()


def test_stages_are_timed(make_config):
    with opened("ffcv", config=make_config(), total_steps=6) as pipeline:
        list(pipeline)
        figures = pipeline.read()
        assert all(figures[f"loader_{stage}_ms"] > 0 for stage in ("read", "decode", "finish"))
        assert 0 <= figures["loader_graph_starved_percent"] <= 100 and figures["loader_substituted"] == 0
        assert pipeline.read()["loader_decode_ms"] == 0


# ----------------------------------------------------------------------------------------------- ends, threads, other code


def test_leaving_early_leaves_no_thread(make_config):
    def leave(_):
        with opened("ffcv", config=make_config(), total_steps=100) as pipeline:
            next(iter(pipeline))

    assert_rounds_leave_nothing(leave, 6)


def test_twenty_runs_in_one_process_leave_nothing(make_config):
    """An epoch each, every one left in the middle by an exception."""

    def leave(run):
        with pytest.raises(ZeroDivisionError), opened("ffcv", config=make_config(), total_steps=50) as pipeline:
            for step, _ in enumerate(pipeline):
                if step == run:
                    raise ZeroDivisionError

    assert_rounds_leave_nothing(leave, 18)


def test_two_pipelines_at_once(make_config):
    with (
        opened("ffcv", config=make_config(), total_steps=4) as one,
        opened("ffcv", config=make_config(), total_steps=4, start_step=1) as other,
    ):
        for a, b in zip(list(one)[1:], other, strict=True):
            assert_same(a, b)


def test_batches_stay_as_they_were_given_out(make_config):
    with opened("ffcv", config=make_config(), total_steps=8) as pipeline:
        kept = [(batch, batch.query.pixels.clone(), batch.mosaic.clone()) for batch in pipeline]
    for batch, pixels, mosaic in kept:
        assert torch.equal(batch.query.pixels, pixels) and torch.equal(batch.mosaic, mosaic)


def test_an_error_in_a_thread_reaches_the_consumer(make_config, monkeypatch):
    """FFCV's own loader thread dies of it, and the consumer waits for ever."""
    with opened("ffcv", config=make_config(), total_steps=9) as pipeline:
        batch = iter(pipeline)
        next(batch)
        monkeypatch.setattr(ffcv.Engine, "_make", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(batch)


def test_out_of_host_memory_is_a_sentence(make_config, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(ffcv.Bench, "room", full)
    with (
        opened("ffcv", config=make_config(), total_steps=9) as pipeline,
        pytest.raises(MemoryError, match="ffcv ran out of memory on the host: set a smaller --prefetch or"),
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
        ffcv.compile_decoder(64)
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


def test_a_numba_function_over_bytes_compiles_after_a_pipeline_ran(make_config):
    batches("ffcv", make_config(), 2)

    @numba.njit
    def invert(levels):
        for i in range(levels.shape[0]):
            levels[i] = 255 - levels[i]

    levels = np.arange(3, dtype=np.uint8)
    invert(levels)
    assert levels.tolist() == [255, 254, 253]


# ------------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'ffcv'", name="ffcv"),
            r"needs the package ffcv, which is not installed and is compiled .*: apt-get install g\+\+ pkg-config libopencv-dev "
            r"libturbojpeg0-dev && pip install 'inscon\[ffcv\]' \(conda: conda install .*\), or set --pipeline dali",
        ),
        (
            ImportError("libopencv_imgproc.so.406: cannot open shared object file: No such file or directory"),
            r"compiled part does not load \(libopencv_imgproc.so.406: .*\): apt-get install .*libopencv-dev libturbojpeg0-dev && "
            r"pip install --force-reinstall .*ffcv==1.0.2",
        ),
        (
            ModuleNotFoundError("No module named 'ffcv._libffcv'", name="ffcv._libffcv"),
            r"compiled part does not load .*apt-get install g\+\+",
        ),
        (ModuleNotFoundError("No module named 'distutils'", name="distutils"), "pip install setuptools"),
        (
            ModuleNotFoundError("No module named 'fastargs'", name="fastargs"),
            r"needs the package fastargs.*inscon\[ffcv\]",
        ),
        (
            ImportError("libGL.so.1: cannot open shared object file"),
            "opencv-python does not load .* libgl1 libglib2.0-0",
        ),
    ],
)
def test_what_is_missing_is_one_sentence_with_the_command(error, said):
    sentence = ffcv._why_not(error)
    assert re.search(said, sentence) and "\n" not in sentence and sentence.endswith("or set --pipeline dali")


def test_without_ffcv_the_others_work_and_it_says_so(make_config, shards):
    """In a process where it cannot be imported."""
    code = f"""
import sys
sys.modules["ffcv"] = None
from pathlib import Path
from inscon.config import Config, LoaderConfig, OptimConfig, ViewConfig
from pipelines import open_pipeline
config = Config(loader=LoaderConfig(data=Path({str(shards)!r}), threads=0), views=ViewConfig(view_size=64),
                optim=OptimConfig(batch_size=8))
with open_pipeline("reference", config=config, total_steps=2) as pipeline:
    assert len(list(pipeline)) == 2
try:
    open_pipeline("ffcv", config=config, total_steps=1)
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "needs the package ffcv, which is not installed" in done.stdout and "apt-get install" in done.stdout, (
        done.stderr
    )
    assert done.stdout.count("\n") == 1


def test_real_pictures_shrunk_and_raw_equal_the_reference(make_config, tmp_path):
    if not REAL.is_dir():
        pytest.skip(f"no pictures in {REAL}")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(REAL.glob("*/*.JPEG"))[::6]))
    for settings in ({"max_resolution": 400, "quality": 90}, {"max_resolution": 400, "write_mode": "raw"}):
        folder = tmp_path / "-".join(settings)
        index = pack_beton(listed, folder, workers=1, **settings)
        assert max(index.sizes(range(len(index))).max(1)) == 400
        config = make_config(folder, view_size=224)
        made = open_pipeline("ffcv", config=config, total_steps=4)
        with made, open_pipeline("reference", config=config, total_steps=4) as wanted:
            for one, other in zip(made, wanted, strict=True):
                assert_like(one, other)
                if int(PIL.__version__.split(".")[0]) >= 13:
                    assert_same(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("color", ["device", "host", "auto"])
def test_on_a_gpu_views_are_those_of_the_cpu(make_config, color):
    config = make_config()
    there = dataclasses.replace(config, loader=dataclasses.replace(config.loader, color=color))
    with (
        opened("ffcv", config=there, total_steps=5, device="cuda") as made,
        opened("ffcv", config=config, total_steps=5) as wanted,
    ):
        for one, other in zip(made, wanted, strict=True):
            assert one.query.pixels.device.type == "cuda" and one.mosaic.device.type == "cuda"
            assert torch.equal(one.sample_ids, other.sample_ids)
            difference = (one.query.pixels.cpu() - other.query.pixels).abs() * 255 * 0.225
            assert difference.mean() <= 1e-2

"""What every engine promises: the same plan executed, fixed shapes, resumable, shared over ranks, closed cleanly."""

import functools
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from inscon.config import LoaderConfig
from inscon.plan import ColorSpec, Grid, Mosaics, OverlapRule, ViewSpec
from pipelines import ENGINES, open_pipeline
from pipelines.color import MEAN, STD
from pipelines.feed import open_index, threads_per_rank
from pipelines.finish import assemble
from tests.packed import Sample
from tests.pipelines.conftest import (
    MOSAICS,
    PAIR,
    REAL,
    as_jpeg,
    assert_rounds_leave_nothing,
    assert_same,
    batches,
    compiled,
    every,
    feed_of,
    ids_of,
    levels_apart,
    loader_of,
    opened,
    write_both,
    write_shards,
)

every_one = pytest.mark.parametrize("name", ENGINES)
QUERY = PAIR[0]
PATCHES = ViewSpec(name="patches", size=255, scale=(0.6, 1.0), grid=Grid(shuffled=True))
TABLE = {
    "a pair": (PAIR, MOSAICS),
    "a third view on the mosaic": ((*PAIR, ViewSpec(name="tile", size=64)), Mosaics(view="tile")),
    "halved": (PAIR, Mosaics(view="query", tile="half")),
    "gray first, no mosaic": (
        (QUERY, ViewSpec(name="key", size=64, color=ColorSpec(gray_first=True, gray_probability=0.5, hue=0.5))),
        None,
    ),
    "of every kind": (
        (
            ViewSpec(name="large", size=96, color=ColorSpec(solarize_probability=0.5)),
            ViewSpec(
                name="small",
                size=48,
                scale=(0.05, 0.3),
                flip="large",
                overlap=OverlapRule(view="large", min_side=8.0),
                color=ColorSpec(jitter_probability=0.0, blur_probability=1.0, solarize_probability=1.0),
            ),
            ViewSpec(name="third", size=64, flip=1.0, overlap=OverlapRule(view="small", min_iou=0.05, candidates=3)),
            PATCHES,
        ),
        Mosaics(view="small"),
    ),
    "a jigsaw and halves": ((PATCHES, ViewSpec(name="plain", size=80)), Mosaics(view="plain", tile="half")),
}
"""What methods may ask for: views, mosaics."""


@pytest.fixture(scope="session")
def expected(shards):
    """(row of TABLE) -> five steps of it by PIL, made once."""
    return functools.cache(lambda case: batches("reference", shards, 5, views=TABLE[case][0], mosaics=TABLE[case][1]))


# ------------------------------------------------------------------------------------------------------------- batches


@every_one
def test_a_batch_is_what_the_plan_and_the_specs_say(name, shards):
    views, mosaics = TABLE["of every kind"]
    made = batches(name, shards, 3, views=views, mosaics=mosaics, dtype=torch.bfloat16)
    feed = feed_of(loader_of(name, shards), views, mosaics)
    assert len(made) == 3
    for step, batch in enumerate(made):
        work = feed.work(step)
        np.testing.assert_array_equal(batch.sample_ids, work.sample_ids)
        assert batch.sample_ids.dtype == torch.int64 and len(set(batch.sample_ids.tolist())) == batch.size == 8
        assert list(batch.views) == ["large", "small", "third", "patches"]
        for spec in views:
            view, plan = batch.views[spec.name], work.plan.views[spec.name]
            shape = (8, 9, 3, 64, 64) if spec.grid else (8, 3, spec.size, spec.size)
            assert view.pixels.shape == shape and view.pixels.dtype == torch.bfloat16
            assert view.pixels.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)
            box, flipped = (plan.crop_box[:, 0], plan.flipped[:, 0]) if spec.grid else (plan.crop_box, plan.flipped)
            assert view.crop_box.dtype == torch.float32 and view.flipped.dtype == torch.bool
            np.testing.assert_array_equal(view.crop_box, box)
            np.testing.assert_array_equal(view.flipped, flipped)
        assert torch.equal(batch.views["small"].flipped, batch.views["large"].flipped)
        assert batch.overlaps.keys() == work.plan.overlaps.keys() == {("large", "small"), ("small", "third")}
        for pair, overlap in batch.overlaps.items():
            for field in ("first_box", "second_box", "weight"):
                np.testing.assert_array_equal(getattr(overlap, field), getattr(work.plan.overlaps[pair], field))
        assert batch.mosaic.shape == (2, 3, 96, 96) and batch.mosaic.dtype == torch.bfloat16
        assert batch.mosaic.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.mosaic, assemble(batch.views["small"].pixels, mosaics))


@pytest.mark.parametrize("color", ["host", "device"])
@every
@pytest.mark.parametrize("case", TABLE)
def test_engines_are_equal_to_the_last_bit(case, name, color, shards, expected):
    """Twenty pictures: grays, 1x1 px, slivers. Colored on the host, or as crops by `pipelines.color`, on a CPU here."""
    views, mosaics = TABLE[case]
    made = batches(name, shards, 5, views=views, mosaics=mosaics, loader={"color": color})
    assert {sample for ids in ids_of(made) for sample in ids} == set(range(20))
    for one, other in zip(made, expected(case), strict=True):
        assert_same(one, other, by_pil=name != "reference")
        assert (one.mosaic is None) == (mosaics is None)


@pytest.fixture(scope="module")
def real_set(tmp_path_factory):
    """24 of ImageNet's, at full size, and what the reference makes of them."""
    paths = sorted(REAL.glob("*/*.JPEG"))[::5][:24]
    if not paths:
        pytest.skip(f"no pictures in {REAL}")
    samples = []
    for path in paths:
        width, height = Image.open(path).size
        samples.append(Sample(path.read_bytes(), height, width, label=0, name=path.name))
    folder = tmp_path_factory.mktemp("real") / "set"
    write_both(folder, samples)
    return folder, batches("reference", folder, 3, views=REAL_VIEWS)


REAL_VIEWS = (ViewSpec(name="query"), ViewSpec(name="key", overlap=OverlapRule(view="query")), PATCHES)


@compiled
def test_real_jpegs_equal_the_reference(name, real_set):
    folder, wanted = real_set
    for one, other in zip(batches(name, folder, 3, views=REAL_VIEWS), wanted, strict=True):
        assert_same(one, other, by_pil=True)


@every
def test_pixels_are_the_pictures(name, make_shards):
    """Not against another engine: a picture of one gray keeps it wherever it is cropped."""
    plain = {i: as_jpeg(Image.new("RGB", (90, 70), (10 * i,) * 3)) for i in range(20)}
    folder = make_shards(jpegs=plain, sizes=dict.fromkeys(range(20), (70, 90)))
    views = tuple(ViewSpec(name=n, size=64, color=ColorSpec(jitter_probability=0.0)) for n in ("query", "key"))
    for batch in batches(name, folder, 2, views=views):
        level = (batch.views["key"].pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
        assert (level - 10.0 * batch.sample_ids[:, None, None, None]).abs().max() <= 1.01


@every
def test_half_precision_is_the_full_one_rounded(name, shards, whole):
    for one, other in zip(batches(name, shards, 3, dtype=torch.bfloat16), whole(name)):
        assert torch.equal(one.views["query"].pixels, other.views["query"].pixels.bfloat16())
        assert torch.equal(one.mosaic, other.mosaic.bfloat16())


@compiled
def test_batches_stay_as_they_were_given_out(name, shards):
    """Engines write their memory again; what was handed out must not change under the reader."""
    with opened(name, shards, 8) as pipeline:
        kept = [(batch, [tensor.clone() for tensor in batch.tensors()]) for batch in pipeline]
    for batch, tensors in kept:
        assert all(map(torch.equal, batch.tensors(), tensors))


@pytest.mark.parametrize("color", ["auto", "device"])
def test_noise_has_unit_variance(color, monkeypatch):
    """It is finished: where a GPU has kernels to color with, too, which would take it for levels."""
    monkeypatch.setattr("pipelines.finish.fused_kernels", lambda *_: object())
    [batch] = batches("synthetic", None, 1, loader={"color": color})
    pixels = batch.views["query"].pixels
    assert abs(float(pixels.mean())) < 0.05 and abs(float(pixels.std()) - 1) < 0.05


def test_normalization_is_imagenets():
    assert MEAN == (0.485, 0.456, 0.406) and STD == (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------- from the middle, over ranks


@every_one
def test_resuming_at_any_step_repeats_the_batches(name, shards, whole):
    """Two steps per epoch: starts inside epochs and at their seams."""
    for start_step in (1, 2, 5):
        rest = batches(name, shards, 7, start_step=start_step)
        assert len(rest) == 7 - start_step
        for one, other in zip(rest, whole(name)[start_step:]):
            if name != "synthetic":
                assert_same(one, other)
            else:  # whose pixels are noise
                assert torch.equal(one.sample_ids, other.sample_ids)
                assert torch.equal(one.views["key"].crop_box, other.views["key"].crop_box)


@every
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(name, shards, whole):
    ranks = [
        batches(name, shards, 4, start_step=1, rank=r, world_size=2, loader={"threads": int(name != "reference")})
        for r in range(2)
    ]
    for left, right, one in zip(*ranks, whole(name)[1:]):
        assert left.size == right.size == 4 and left.mosaic.shape[0] == 1
        assert torch.equal(torch.cat([left.sample_ids, right.sample_ids]), one.sample_ids)
        assert all(map(torch.equal, map(torch.cat, zip(left.tensors(), right.tensors())), one.tensors()))


@compiled
def test_pieces_of_a_batch_change_nothing(name, tmp_path):
    """DALI makes a batch of 52 in runs of 32 and 20, FFCV in pieces of 13 or 4."""
    folder, settings = write_shards(tmp_path / "shards", copies=3), {"batch_size": 52}
    wanted = batches("reference", folder, 2, **settings)
    for threads in (1, 3):
        made = batches(name, folder, 2, loader={"threads": threads}, **settings)
        for one, other in zip(made, wanted, strict=True):
            assert_same(one, other, by_pil=True)


def test_a_feed_is_the_same_after_a_pickle(shards):
    """As workers get it: files and maps stay behind."""
    feed = feed_of(loader_of("reference", shards), *TABLE["of every kind"], rank=1, world_size=2, substitute=True)
    feed.load(2)
    other = pickle.loads(pickle.dumps(feed))
    for step in (0, 2, 3):
        (one, jpegs, _), (same, others, _) = feed.load(step), other.load(step)
        np.testing.assert_array_equal(one.sample_ids, same.sample_ids)
        np.testing.assert_array_equal(one.rows(), same.rows())
        assert all(map(np.array_equal, jpegs, others))


# -------------------------------------------------------------------------------------------------- threads and workers


def test_workers_change_nothing_and_end(shards, whole):
    pipeline = opened("reference", shards, 50, loader={"threads": 2})
    for one, other in zip(pipeline, whole("reference")):
        assert_same(one, other)
    assert len(multiprocessing.active_children()) >= 2
    pipeline.close()
    pipeline.close()
    deadline = time.monotonic() + 20  # they were killed, and end
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_an_error(shards):
    with opened("reference", shards, 200, loader={"threads": 1}) as pipeline:
        made = iter(pipeline)
        next(made)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="a worker process of the pipeline reference died"):
            list(made)


@compiled
def test_leaving_early_leaves_nothing(name, shards):
    """By the end of the block, or by an exception, at one step or another."""

    def leave(run):
        with pytest.raises(ZeroDivisionError), opened(name, shards, 100) as pipeline:
            for step, _ in enumerate(pipeline):
                if step == run:
                    raise ZeroDivisionError

    assert_rounds_leave_nothing(leave, 4)


@compiled
def test_two_pipelines_at_once(name, shards):
    with opened(name, shards, 4) as one, opened(name, shards, 4, start_step=1) as other:
        for a, b in zip(list(one)[1:], other, strict=True):
            assert_same(a, b)


@compiled
def test_stages_are_timed(name, shards):
    with opened(name, shards, 6) as pipeline:
        list(pipeline)
        figures = pipeline.read()
        assert all(figures[f"loader_{stage}_ms"] > 0 for stage in ("read", "decode", "finish"))
        assert 0 <= figures["loader_starved_percent"] <= 100 and figures["loader_substituted"] == 0
        assert ("loader_graph_starved_percent" in figures) == (
            name == "ffcv"
        )  # DALI's read in the thread that takes pictures
        assert pipeline.read()["loader_decode_ms"] == 0


def test_cores_are_divided_by_the_ranks_of_this_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads_per_rank(None) == 3 and threads_per_rank(7) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads_per_rank(None) == 1


# ------------------------------------------------------------------------------------------------- opened, or refused


@every_one
def test_no_steps_no_batches_and_one_line_for_the_log(name, shards):
    with opened(name, shards, 4, start_step=4) as pipeline:
        assert list(pipeline) == []
        assert name in pipeline.description and "\n" not in pipeline.description


def test_an_unknown_engine_is_refused_with_those_there_are(shards):
    loader = LoaderConfig(data=shards, pipeline="fcv")
    with pytest.raises(ValueError, match='no pipeline "fcv".*dali, ffcv, reference, synthetic'):
        open_pipeline(feed_of(loader), loader, total_steps=1)


def test_a_missing_package_is_named_with_the_remedy(shards, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'nvidia.dali'", name="nvidia.dali")

    loader = loader_of("dali", shards)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package nvidia\.dali.*pip install 'inscon\[dali\]'"):
        open_pipeline(feed_of(loader), loader, total_steps=1)


@compiled
def test_at_least_one_thread(name, shards):
    with pytest.raises(ValueError, match="at least 1 thread. Found: 0"):
        opened(name, shards, 1, loader={"threads": 0})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"start_step": 4}, r"start_step must lie in 0\.\.3.*Found: 4"),
        ({"batch_size": 24}, r"at least one batch of 24 images.*Found: 20.*--batch-size 20"),
        ({"batch_size": 12, "world_size": 2}, r"multiple of 4 times 2 rank.*Found: 12; set --batch-size 8"),
        ({"batch_size": 8, "world_size": 3}, "multiple of the 3 ranks. Found: 8"),
        ({"mosaics": Mosaics(view="tile")}, "one of the views, not of patches. Found: tile"),
        ({"views": (PATCHES,), "mosaics": Mosaics(view="patches")}, "not of patches. Found: patches"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(settings, sentence, shards):
    with pytest.raises(ValueError, match=sentence):
        opened("reference", shards, 3, **settings)


@every
def test_no_data_is_refused_with_the_remedy(name):
    with pytest.raises(ValueError, match="loader.data is not set.*--data SHARDS"):
        open_index(LoaderConfig(pipeline=name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "decode", "color"),
    [
        *[("dali", decode, "device") for decode in ("cpu", "mixed")],
        ("dali", "cpu", "host"),
        ("dali", "auto", "auto"),
        *[(name, "cpu", color) for name in ("ffcv", "reference") for color in ("device", "host", "auto")],
    ],
)
def test_on_a_gpu_views_are_those_of_the_cpu(name, decode, color, shards):
    """Not the reference's, whose pixels are those of the Pillow that is installed; on a CPU they are compared."""
    views, mosaics = TABLE["of every kind"]
    wanted = batches(name, shards, 5, views=views, mosaics=mosaics)
    loader = {"decode": decode, "color": color}
    with opened(name, shards, 5, device="cuda", loader=loader, views=views, mosaics=mosaics) as pipeline:
        for one, other in zip(pipeline, wanted, strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids)
            for a, b in zip(one.tensors(), other.tensors(), strict=True):
                assert a.device.type == "cuda" and a.shape == b.shape
                if a.ndim < 4:
                    assert torch.equal(a.cpu(), b)
                else:
                    # Crops from the host are the same; nvJPEG and DALI's resize differ by about a level, and by more where a
                    # level is at the threshold of solarize.
                    assert levels_apart(a, b) <= (1e-2 if decode == "cpu" else 4.0)
        found = pipeline.read().get("loader_device_mb")
        assert found is None or found >= 0
        assert decode == "auto" or (found is None) == (decode == "cpu")  # which takes none of it

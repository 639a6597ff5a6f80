"""What every engine promises: the same plan executed, fixed shapes, resumable, shared over ranks, closed cleanly."""

import dataclasses
import io
import multiprocessing
import os
import re
import signal

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from data_prep.index import DatasetIndex
from inscon.batch import Batch
from inscon.mosaic import assemble
from pipelines import ENGINES, open_pipeline
from pipelines.color import MEAN, STD
from pipelines.feed import open_feed, threads_per_rank
from tests.packed import Sample, write_set
from tests.pipelines.conftest import REAL, beton_beside, data_for


def engine(name):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        pytest.importorskip("numba", reason="numba is not installed")
    if name == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)
    return name


def opened(name, *, config, **arguments):
    """`open_pipeline` on what that engine reads of the data set."""
    loader = dataclasses.replace(config.loader, data=data_for(name, config.loader.data))
    return open_pipeline(engine(name), config=dataclasses.replace(config, loader=loader), **arguments)


def batches(name, config, total_steps, **arguments) -> list[Batch]:
    with opened(name, config=config, total_steps=total_steps, **arguments) as pipeline:
        return list(pipeline)


def stored_in(name: str, shard: str = r"shard-\d+.tar") -> str:
    """How an engine's messages call the file that a sample is in."""
    return "samples.beton" if name == "ffcv" else shard


def packer(name: str) -> str:
    return "data_prep/make_ffcv.py" if name == "ffcv" else "data_prep/make_dali.py"


def assert_same(a: Batch, b: Batch):
    assert torch.equal(a.sample_ids, b.sample_ids)
    for one, other in ((a.query, b.query), (a.key, b.key)):
        assert torch.equal(one.crop_box, other.crop_box) and torch.equal(one.flipped, other.flipped)
        assert torch.equal(one.pixels, other.pixels)
    assert (a.mosaic is None) == (b.mosaic is None)
    assert a.mosaic is None or torch.equal(a.mosaic, b.mosaic)


@pytest.mark.parametrize("name", ENGINES)
def test_shapes_types_and_layout(name, make_config):
    made = batches(name, make_config(), 3, dtype=torch.bfloat16)
    assert len(made) == 3
    for batch in made:
        for view in (batch.query, batch.key):
            assert view.pixels.shape == (8, 3, 64, 64) and view.pixels.dtype == torch.bfloat16
            assert view.pixels.is_contiguous(memory_format=torch.channels_last)
            assert view.crop_box.shape == (8, 4) and view.crop_box.dtype == torch.float32
            assert view.flipped.shape == (8,) and view.flipped.dtype == torch.bool
        assert batch.mosaic.shape == (2, 3, 128, 128) and batch.mosaic.dtype == torch.bfloat16
        assert batch.mosaic.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.mosaic, assemble(batch.query.pixels))
        assert batch.sample_ids.dtype == torch.int64 and len(set(batch.sample_ids.tolist())) == 8


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_boxes_and_ids_are_the_plans(name, make_config):
    config = make_config()
    feed = open_feed(config, 0, 1)
    for step, batch in enumerate(batches(name, config, 3)):
        work = feed.work(step)
        np.testing.assert_array_equal(batch.sample_ids, work.sample_ids)
        np.testing.assert_array_equal(batch.query.crop_box, work.plans.query.crop_box)
        np.testing.assert_array_equal(batch.key.flipped, work.plans.key.flipped)


@pytest.mark.parametrize("name", ["dali", "ffcv"])
@pytest.mark.parametrize("views", [{}, {"tiles_from": "third"}, {"tile": "half"}, {"gray_first": True, "hue": 0.4}])
def test_engines_equal_the_reference(name, views, make_config):
    """Twenty pictures over nine steps: grays, 1x1 px, slivers, all of them."""
    config = make_config(**views)
    made, wanted = batches(name, config, 9), batches("reference", config, 9)
    assert {int(i) for batch in made for i in batch.sample_ids} == set(range(20))
    for one, other in zip(made, wanted, strict=True):
        if int(PIL.__version__.split(".")[0]) >= 13:
            assert_same(one, other)
        # Before Pillow 13 a tall crop may differ from the kernel's in the last bit of the resize.
        assert torch.equal(one.query.crop_box, other.query.crop_box) and torch.equal(one.key.flipped, other.key.flipped)
        for a, b in ((one.query, other.query), (one.key, other.key)):
            assert (a.pixels - b.pixels).abs().mean() * 255 * np.mean(STD) <= 0.15


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="before Pillow 13 tall crops differ in the last bit"
)
@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_real_jpegs_equal_the_reference(name, make_config, tmp_path):
    """24 of ImageNet's, at full size: ids, boxes, flips, mosaics and every pixel."""
    paths = sorted(REAL.glob("*/*.JPEG"))[::5][:24]
    if not paths:
        pytest.skip(f"no pictures in {REAL}")
    samples = []
    for path in paths:
        width, height = Image.open(path).size
        samples.append(Sample(path.read_bytes(), height, width, label=0, name=path.name))
    write_set(tmp_path / "real", samples, per_shard=7, class_names=["a"])
    write_set(beton_beside(tmp_path / "real"), samples, per_shard=7, class_names=["a"], container="beton")
    config = make_config(tmp_path / "real", view_size=224)
    for one, other in zip(batches(name, config, 6), batches("reference", config, 6), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_pixels_are_the_pictures(name, make_config, make_shards):
    """Not against another engine: a picture of one gray keeps it wherever it is cropped."""
    plain = {i: as_jpeg(Image.new("RGB", (90, 70), (10 * i,) * 3)) for i in range(20)}
    config = make_config(make_shards(jpegs=plain, sizes=dict.fromkeys(range(20), (70, 90))), jitter_probability=0.0)
    for batch in batches(name, config, 2):
        level = (batch.query.pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
        wanted = 10.0 * batch.sample_ids[:, None, None, None]
        assert (level - wanted).abs().max() <= 1.01


def as_jpeg(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize("name", ENGINES)
def test_without_the_multi_head_there_is_no_mosaic(name, make_config):
    [batch] = batches(name, make_config(heads=("single", "cell"), tiles_from="third"), 1)
    assert batch.mosaic is None


@pytest.mark.parametrize("name", ENGINES)
def test_resuming_at_any_step_repeats_the_batches(name, make_config):
    """Two steps per epoch: starts inside epochs and at their seams."""
    config = make_config()
    whole = batches(name, config, 7)
    for start_step in range(1, 7):
        rest = batches(name, config, 7, start_step=start_step)
        assert len(rest) == 7 - start_step
        for one, other in zip(whole[start_step:], rest, strict=True):
            if name == "synthetic":  # whose pixels are noise
                assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(
                    one.key.crop_box, other.key.crop_box
                )
            else:
                assert_same(one, other)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
@pytest.mark.parametrize("start_step", [1, 2, 3])
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(name, start_step, make_config):
    whole = batches(name, make_config(), 5)[start_step:]
    parts = [batches(name, make_config(threads=1), 5, start_step=start_step, rank=r, world_size=2) for r in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for one, left, right in zip(whole, *parts, strict=True):
        for name_of in ("query", "key"):
            halves = [getattr(part, name_of) for part in (left, right)]
            view = getattr(one, name_of)
            assert torch.equal(torch.cat([half.pixels for half in halves]), view.pixels)
            assert torch.equal(torch.cat([half.crop_box for half in halves]), view.crop_box)
            assert torch.equal(torch.cat([half.flipped for half in halves]), view.flipped)
        assert torch.equal(torch.cat([left.mosaic, right.mosaic]), one.mosaic)
        assert torch.equal(torch.cat([left.sample_ids, right.sample_ids]), one.sample_ids)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
@pytest.mark.parametrize("views", [{}, {"tiles_from": "third"}, {"tile": "half", "tiles_from": "third"}])
def test_color_on_the_device_gives_the_same_pixels(name, views, make_config):
    """Here the device is the CPU too. What a GPU gets are crops; `pipelines.color` finishes them."""
    host = make_config(**views)
    device = dataclasses.replace(host, loader=dataclasses.replace(host.loader, color="device"))
    for one, other in zip(batches(name, host, 6), batches(name, device, 6), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_half_precision_is_the_full_one_rounded(name, make_config):
    for one, other in zip(
        batches(name, make_config(), 3), batches(name, make_config(), 3, dtype=torch.bfloat16), strict=True
    ):
        assert torch.equal(one.query.pixels.bfloat16(), other.query.pixels)
        assert torch.equal(one.mosaic.bfloat16(), other.mosaic)


@pytest.mark.parametrize("parts", [(4, 1), (3, 1), (32, 8)])
def test_parts_of_a_batch_change_nothing(parts, make_config, monkeypatch):
    """DALI makes a batch in several runs of its graph: of 4 pictures, of 3, 3 and 2, of all 8."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from pipelines import dali

    wanted = batches("reference", make_config(), 5)
    monkeypatch.setattr(dali, "PART", parts[0])
    monkeypatch.setattr(dali, "PARTS_OF_THREADS", parts[1])
    made = batches("dali", make_config(threads=1), 5)
    for one, other in zip(made, wanted, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert (one.query.pixels - other.query.pixels).abs().mean() < 0.01


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_ranks_share_the_global_batch(name, make_config):
    whole = batches(name, make_config(), 3)
    parts = [batches(name, make_config(threads=1), 3, rank=rank, world_size=2) for rank in range(2)]
    for one, left, right in zip(whole, *parts, strict=True):
        assert left.size == 4 and left.mosaic.shape[0] == 1
        assert torch.equal(torch.cat([left.sample_ids, right.sample_ids]), one.sample_ids)
        assert torch.equal(torch.cat([left.query.pixels, right.query.pixels]), one.query.pixels)
        assert torch.equal(torch.cat([left.key.crop_box, right.key.crop_box]), one.key.crop_box)
        assert torch.equal(torch.cat([left.mosaic, right.mosaic]), one.mosaic)


@pytest.mark.parametrize("threads", [0, 1])
def test_workers_change_nothing(threads, make_config):
    for one, other in zip(
        batches("reference", make_config(threads=threads), 4), batches("reference", make_config(), 4), strict=True
    ):
        assert_same(one, other)


def test_reference_closes_its_workers(make_config):
    pipeline = open_pipeline("reference", config=make_config(), total_steps=50)
    next(iter(pipeline))
    assert multiprocessing.active_children()
    pipeline.close()
    pipeline.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_an_error(make_config):
    with open_pipeline("reference", config=make_config(), total_steps=200) as pipeline:
        batches = iter(pipeline)
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="a worker process of the pipeline reference died"):
            list(batches)


@pytest.mark.parametrize("name", ENGINES)
def test_no_steps_no_batches(name, make_config):
    assert batches(name, make_config(), 4, start_step=4) == []


@pytest.mark.parametrize("name", ENGINES)
def test_the_log_line_is_one_line(name, make_config):
    with opened(name, config=make_config(), total_steps=1) as pipeline:
        assert name in pipeline.describe() and "\n" not in pipeline.describe()
        assert pipeline.steps_per_epoch == (2 if name != "synthetic" else 1_281_167 // 8)


def test_an_unknown_engine_is_refused_with_those_there_are(make_config):
    with pytest.raises(ValueError, match='no pipeline "fcv".*dali, ffcv, reference, synthetic'):
        open_pipeline("fcv", config=make_config(), total_steps=1)


def test_a_missing_package_is_named_with_the_remedy(make_config, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'nvidia.dali'", name="nvidia.dali")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package nvidia\.dali.*pip install 'inscon\[dali\]'"):
        open_pipeline("dali", config=make_config(), total_steps=1)


def test_a_start_after_the_end_is_refused(make_config):
    with pytest.raises(ValueError, match=r"start_step must lie in 0\.\.3.*Found: 4"):
        open_pipeline("synthetic", config=make_config(), total_steps=3, start_step=4)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_a_data_set_smaller_than_a_batch_is_refused(name, make_config):
    with pytest.raises(ValueError, match=r"at least one batch of 24 images.*Found: 20.*--batch-size 20"):
        opened(name, config=make_config(batch_size=24), total_steps=1)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_no_data_is_refused_with_the_remedy(name, make_config):
    with pytest.raises(ValueError, match="loader.data is not set.*--data SHARDS"):
        opened(name, config=make_config(data=None), total_steps=1)


def test_a_batch_that_fills_no_mosaic_is_refused(make_config):
    with pytest.raises(ValueError, match=r"multiple of 4 times 2 rank.*Found: 12; set --batch-size 8"):
        open_pipeline("reference", config=make_config(batch_size=12), total_steps=1, world_size=2)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_a_corrupt_sample_is_named(name, make_config, make_shards):
    config = make_config(make_shards(jpegs={11: b"\xff\xd8\xff" + bytes(3000)}))
    with pytest.raises(ValueError) as caught:
        batches(name, config, 4)
    message = str(caught.value)
    assert re.search(rf"sample 11 \(a/picture_11.jpg\) in {stored_in(name)} cannot be decoded", message)
    assert f"rerun {packer(name)}" in message and "\n" not in message


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_a_sample_cut_short_is_named(name, make_config, make_shards, shards):
    jpeg = DatasetIndex.open(shards).read(14).tobytes()
    config = make_config(make_shards(jpegs={14: jpeg[: len(jpeg) // 2]}))
    with pytest.raises(ValueError, match=rf"sample 14 \(a/picture_14.jpg\) in {stored_in(name)} cannot be decoded"):
        batches(name, config, 4)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_a_picture_of_another_size_than_the_index_says_is_named(name, make_config, make_shards):
    config = make_config(make_shards(sizes={12: (900, 900)}))
    with pytest.raises(ValueError, match=r"sample 12 .* decodes to 132x130 px .* index says 900x900"):
        batches(name, config, 4)


@pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
def test_a_shard_that_vanished_is_an_error(name, make_config, make_shards):
    folder = make_shards()
    with opened(name, config=make_config(folder), total_steps=40) as pipeline:
        for shard in [*folder.glob("*.tar"), *beton_beside(folder).glob("*.beton")]:
            shard.unlink()
        with pytest.raises(ValueError, match=rf"{stored_in(name)} is missing"):
            list(pipeline)


def test_noise_has_unit_variance(make_config):
    [batch] = batches("synthetic", make_config(), 1)
    assert abs(float(batch.query.pixels.mean())) < 0.05 and abs(float(batch.query.pixels.std()) - 1) < 0.05


def test_normalization_is_imagenets():
    assert MEAN == (0.485, 0.456, 0.406) and STD == (0.229, 0.224, 0.225)


def test_cores_are_divided_by_the_ranks_of_this_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads_per_rank(None) == 3 and threads_per_rank(7) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads_per_rank(None) == 1

"""What only DALI has: its threads, its own resize, its flavours. What all engines share is in test_engines.py."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
pytest.importorskip("numba", reason="numba is not installed")

from nvidia.dali import Pipeline as Graph
from nvidia.dali import fn, types

from inscon.plan import ViewPlan
from pipelines import dali, open_pipeline, reference
from pipelines.feed import open_feed
from tests.pipelines.conftest import assert_rounds_leave_nothing


def test_leaving_early_leaves_no_thread(make_config):
    def leave(_):
        with open_pipeline("dali", config=make_config(), total_steps=100) as pipeline:
            next(iter(pipeline))

    assert_rounds_leave_nothing(leave, 6)


def test_two_pipelines_at_once(make_config):
    with (
        open_pipeline("dali", config=make_config(), total_steps=4) as one,
        open_pipeline("dali", config=make_config(), total_steps=4, start_step=1) as other,
    ):
        for a, b in zip(list(one)[1:], other, strict=True):
            assert torch.equal(a.query.pixels, b.query.pixels)


def test_batches_stay_as_they_were_given_out(make_config):
    """DALI writes its buffers again; what was handed out must not change under the reader."""
    with open_pipeline("dali", config=make_config(), total_steps=8) as pipeline:
        kept = [(batch, batch.query.pixels.clone(), batch.mosaic.clone()) for batch in pipeline]
    for batch, pixels, mosaic in kept:
        assert torch.equal(batch.query.pixels, pixels) and torch.equal(batch.mosaic, mosaic)


def test_the_source_is_not_asked_past_the_end(make_config, monkeypatch):
    asked = []
    work = dali.Feed.work
    monkeypatch.setattr(dali.Feed, "work", lambda self, step: asked.append(step) or work(self, step))
    with open_pipeline("dali", config=make_config(), total_steps=5, start_step=2) as pipeline:
        assert len(list(pipeline)) == 3
    assert asked == [2, 3, 4]


@pytest.mark.parametrize(("box", "flipped"), [((20, 10, 300, 250), 0), ((20, 10, 300, 250), 1), ((0, 0, 320, 260), 1)])
def test_dalis_own_crop_is_where_the_plan_says(box, flipped):
    """The GPU's crop operator runs on the CPU too: same box, same mirror, PIL's picture to a few levels."""
    coarse = np.random.default_rng(0).integers(0, 256, (14, 16, 3), np.uint8)
    image = Image.fromarray(coarse).resize((320, 260), Image.Resampling.BICUBIC)
    plan = ViewPlan(
        crop_box=np.float32([box]), flipped=np.array([bool(flipped)]), color_ops=np.zeros((1, 5), np.uint8),
        factors=np.float32([[1, 1, 1, 0]]), blur_sigma=np.zeros(1, np.float32),
    )  # fmt: skip
    graph = Graph(batch_size=1, num_threads=1, device_id=None)
    with graph:
        pictures, rows = fn.external_source(
            source=lambda: ([np.asarray(image)], plan.rows()[None]), num_outputs=2, dtype=[types.UINT8, types.FLOAT]
        )
        graph.set_outputs(dali.crop_by_dali(pictures, rows[0], 128))
    made = np.asarray(graph.run()[0].as_array())[0].astype(int)
    difference = np.abs(made - np.asarray(reference.render_view(image, plan, 0, 128)))
    assert difference.mean() < 0.5 and difference.max() <= 2  # on the border too: it cuts before it resizes


@pytest.mark.parametrize("part", [3, 64])
@pytest.mark.parametrize("views", [{}, {"tiles_from": "third"}, {"tile": "half"}])
def test_the_path_of_a_gpu_on_a_cpu(views, part, make_config, monkeypatch):
    """Decoding and crops by DALI's operators, color by the device tail, batches put together from several runs. Only the
    device differs; the pixels, by DALI's resize."""
    monkeypatch.setattr(dali, "MIXED", "cpu")
    monkeypatch.setattr(dali, "DEVICE_PART", part)
    config = make_config(**views)
    feed, cpu = open_feed(config, 0, 1), torch.device("cpu")
    engine = dali.Engine(feed, range(6), cpu, torch.float32, 2, dali.Decode("mixed", None), False)
    kept = list(engine.batches())
    assert engine.part == min(part, 8) and engine.read()["loader_finish_ms"] > 0
    engine.end()
    with open_pipeline("reference", config=config, total_steps=6) as wanted:
        for one, other in zip(kept, wanted, strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.key.crop_box, other.key.crop_box)
            for a, b in ((one.query.pixels, other.query.pixels), (one.mosaic, other.mosaic)):
                assert a.shape == b.shape and a.is_contiguous(memory_format=torch.channels_last)
                assert (a - b).abs().mean() * 255 * 0.225 < 0.6


def test_a_picture_that_the_gpus_decoder_refuses_is_named_or_replaced(make_config, make_shards, monkeypatch, caplog):
    """The decoder is DALI's for CPUs here; what is done about its refusal is the same."""
    monkeypatch.setattr(dali, "MIXED", "cpu")
    monkeypatch.setattr(dali, "DEVICE_PART", 3)
    config = make_config(make_shards(jpegs={11: b"\xff\xd8\xff" + bytes(3000)}))
    cpu = torch.device("cpu")

    def batches(config):
        feed = open_feed(config, 0, 1)
        engine = dali.Engine(feed, range(4), cpu, torch.float32, 1, dali.Decode("mixed", 0.9), False)
        return [batch.sample_ids.tolist() for batch in engine.batches()], feed.bad

    with pytest.raises(ValueError, match=r"sample 11 .* cannot be decoded by DALI, decode mixed \(.*\): rerun"):
        batches(config)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, on_bad_sample="substitute"))
    ids, bad = batches(config)
    assert bad == {11} and all(len(set(step)) == 8 and 11 not in step for step in ids)
    assert "decode mixed" in caplog.text and "Another sample stands in for it." in caplog.text


def test_the_fastest_way_to_decode_is_found_by_trying(make_config, monkeypatch, caplog):
    """Both on the CPU, and one that cannot be had is left out."""
    monkeypatch.setattr(dali, "MIXED", "cpu")
    monkeypatch.setattr(dali, "TRIAL_S", 0.1)
    feed, cpu = open_feed(make_config(), 0, 1), torch.device("cpu")
    ways = [dali.Decode("cpu", None), dali.Decode("mixed", None)]
    rates = dali.try_out(feed, ways, (cpu, torch.float32, 2), False, 0)
    assert set(rates) == set(ways) and min(rates.values()) > 10
    monkeypatch.setattr(dali, "MIXED", "mixed")  # which no CPU has
    rates = dali.try_out(feed, ways, (cpu, torch.float32, 2), False, 0)
    assert rates[ways[0]] > 10 and rates[ways[1]] == 0 and "decode mixed is left out, it fails: " in caplog.text


@pytest.mark.parametrize("on_bad_sample", ["fail", "substitute"])
def test_a_trial_passes_no_verdict_on_a_sample(on_bad_sample, make_config, make_shards, monkeypatch, caplog):
    """A picture that one decoder refuses rules that way out at most; whether it is bad is for the way that is taken."""
    monkeypatch.setattr(dali, "TRIAL_S", 0.1)
    config = make_config(make_shards(jpegs={i: b"\xff\xd8\xff" + bytes(3000) for i in (11, 12)}))
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, on_bad_sample=on_bad_sample))
    feed, way = open_feed(config, 0, 1, [12]), dali.Decode("cpu", None)
    before = set(feed.bad)
    rates = dali.try_out(feed, [way], (torch.device("cpu"), torch.float32, 2), False, 0)
    assert feed.bad == before
    assert rates[way] == 0 if on_bad_sample == "fail" else rates[way] > 10
    assert ("decode cpu is left out, it fails: sample 1" in caplog.text) == (on_bad_sample == "fail")


def test_mixed_decoding_needs_a_gpu(make_config):
    with pytest.raises(ValueError, match="decode=mixed needs a GPU.*--decode cpu"):
        open_pipeline("dali", config=make_config(decode="mixed"), total_steps=1)


def test_at_least_one_thread(make_config):
    with pytest.raises(ValueError, match="at least 1 thread. Found: 0"):
        open_pipeline("dali", config=make_config(threads=0), total_steps=1)


@pytest.mark.parametrize(
    ("driver", "flavour"), [(12040, "cuda120"), (13000, "cuda130"), (13010, "cuda120"), (12000, "cuda110")]
)
def test_a_driver_runs_what_was_built_for_it_or_before(driver, flavour):
    dali.check_dali(driver, flavour)


def test_a_driver_too_old_is_told_with_the_package_to_install():
    with pytest.raises(
        ValueError, match=r"CUDA 13 is installed.*driver offers CUDA 12.*pip install nvidia-dali-cuda120"
    ):
        dali.check_dali(12080, "cuda130")


def test_the_installed_flavour_is_found():
    assert dali.installed_flavour() in ("cuda110", "cuda120", "cuda130")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("decode", "color"), [("cpu", "device"), ("cpu", "host"), ("mixed", "device"), ("auto", "auto")]
)
def test_on_a_gpu_views_are_those_of_the_cpu(make_config, decode, color):
    """Not the reference's, whose pixels are those of the Pillow that is installed; on a CPU they are compared."""
    config = make_config()
    there = dataclasses.replace(config, loader=dataclasses.replace(config.loader, decode=decode, color=color))
    with (
        open_pipeline("dali", config=there, total_steps=5, device="cuda") as made,
        open_pipeline("dali", config=config, total_steps=5) as wanted,
    ):
        for one, other in zip(made, wanted, strict=True):
            assert one.query.pixels.device.type == "cuda" and one.query.crop_box.device.type == "cuda"
            assert torch.equal(one.query.crop_box.cpu(), other.query.crop_box)
            assert torch.equal(one.sample_ids, other.sample_ids)
            difference = (one.query.pixels.cpu() - other.query.pixels).abs() * 255 * 0.225
            # Crops from the host are the same; nvJPEG and DALI's resize differ by about a level.
            assert difference.mean() <= (1e-2 if decode == "cpu" else 2.0)
        assert made.read()["loader_device_mb"] >= 0

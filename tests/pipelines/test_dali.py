"""What only DALI has: its operators for crops, its ways to decode, its flavors. What all engines share is in test_engines.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
pytest.importorskip("numba", reason="numba is not installed")

from nvidia.dali import Pipeline as Graph
from nvidia.dali import fn, types

from inscon.plan import NO_COLOR, Grid, Mosaics, ViewSpec, plan_views
from pipelines import auto, dali, open_pipeline, reference
from pipelines.feed import Feed
from tests.pipelines.conftest import NO_JPEG, PAIR, batches, feed_of, ids_of, levels_apart, loader_of, opened

CPU = torch.device("cpu")
JIGSAW = (*PAIR, ViewSpec(name="patches", size=255, grid=Grid()))


def test_the_source_is_not_asked_past_the_end(shards):
    class Noted(Feed):
        def load(self, step, *arguments):
            asked.append(step)
            return super().load(step, *arguments)

    asked, loader = [], loader_of("dali", shards)
    feed = Noted(feed_of(loader).index, PAIR, batch_size=8, seed=0)
    with open_pipeline(feed, loader, total_steps=5, start_step=2) as pipeline:
        assert len(list(pipeline)) == 3
    assert asked == [2, 3, 4]


@pytest.mark.parametrize("flipped", [0.0, 1.0])
@pytest.mark.parametrize(
    "spec",
    [{"size": 128}, {"size": 128, "scale": (1.0, 1.0), "ratio": (320 / 260, 320 / 260)}, {"size": 255, "grid": Grid()}],
)
def test_dalis_own_crop_is_where_the_plan_says(spec, flipped):
    """The GPU's crop operator runs on the CPU too: same box, same mirror, same patch, PIL's picture to a few levels, also on the
    border, since it cuts before it resizes."""
    coarse = np.random.default_rng(0).integers(0, 256, (14, 16, 3), np.uint8)
    image = Image.fromarray(coarse).resize((320, 260), Image.Resampling.BICUBIC)
    spec = ViewSpec(name="view", flip=flipped, color=NO_COLOR, **spec)
    plan = plan_views(0, 0, np.array([5]), np.array([[260, 320]]), [spec]).views["view"]
    graph = Graph(batch_size=1, num_threads=1, device_id=None)
    with graph:
        pictures, rows = fn.external_source(
            source=lambda: ([np.asarray(image)], plan.rows()), num_outputs=2, dtype=[types.UINT8, types.FLOAT]
        )
        graph.set_outputs(*[dali.crop_by_dali(pictures, rows[number], spec) for number in range(spec.count)])
    for number, made in enumerate(graph.run()):
        wanted = np.asarray(reference.render_view(image, plan.ravel(), number))
        difference = np.abs(np.asarray(made.as_array())[0].astype(int) - wanted)
        assert difference.mean() < 0.5 and difference.max() <= 2


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """DALI's way for a GPU, on a CPU."""
    monkeypatch.setattr(dali, "MIXED", "cpu")
    monkeypatch.setattr(dali, "DEVICE_PART", 3)
    monkeypatch.setattr(dali, "check_device", lambda loader, device: None)


MIXED = {"decode": "mixed", "color": "device"}


@pytest.mark.parametrize("mosaics", [Mosaics(view="query"), Mosaics(view="key", tile="half")])
def test_the_path_of_a_gpu_on_a_cpu(mosaics, shards, no_gpu_needed):
    """Decoding and crops by DALI's operators, color by the device tail, batches put together from several runs. Only the
    device differs; the pixels, by DALI's resize."""
    with opened("dali", shards, 4, views=JIGSAW, mosaics=mosaics, loader=MIXED) as pipeline:
        kept = list(pipeline)
        assert "decode mixed" in pipeline.description and pipeline.read()["loader_finish_ms"] > 0
    wanted = batches("reference", shards, 4, views=JIGSAW, mosaics=mosaics)
    for one, other in zip(kept, wanted, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            assert a.shape == b.shape
            if a.ndim < 4:
                assert torch.equal(a, b)
            else:
                assert a.flatten(0, -4).is_contiguous(memory_format=torch.channels_last) and levels_apart(a, b) < 0.6


def test_a_picture_that_the_gpus_decoder_refuses_is_named_or_replaced(make_shards, no_gpu_needed, caplog):
    """The decoder is DALI's for CPUs here; what is done about its refusal is the same."""
    folder = make_shards(jpegs={11: NO_JPEG})
    with pytest.raises(ValueError, match=r"sample 11 .* cannot be decoded by DALI, decode mixed \(.*\): rerun"):
        batches("dali", folder, 4, loader=MIXED)
    made = batches("dali", folder, 4, loader=MIXED, substitute=True)
    assert ids_of(made) == ids_of(batches("reference", folder, 4, substitute=True))
    assert "decode mixed" in caplog.text and "Another sample stands in for it." in caplog.text


def rate(way: str, feed: Feed) -> float:
    loader = loader_of("dali", None, decode=way, color="device")
    return auto.try_out(feed, loader, device=CPU, dtype=torch.float32, start_step=0).images_per_s


def test_ways_to_decode_are_tried(shards, no_gpu_needed, monkeypatch, caplog):
    """Both on the CPU; and one that cannot be had is left out."""
    monkeypatch.setattr(auto, "TRIAL_S", 0.1)
    feed = feed_of(loader_of("dali", shards))
    assert rate("cpu", feed) > 10 and rate("mixed", feed) > 10
    monkeypatch.setattr(dali, "MIXED", "mixed")  # which no CPU has
    assert rate("cpu", feed) > 10 and rate("mixed", feed) == 0
    assert "decode mixed is left out, it fails: " in caplog.text


@pytest.mark.parametrize("substitute", [False, True])
def test_a_trial_passes_no_verdict_on_a_sample(substitute, make_shards, monkeypatch, caplog):
    """A picture that one decoder refuses rules that way out at most; whether it is bad is for the way that is taken."""
    monkeypatch.setattr(auto, "TRIAL_S", 0.1)
    feed = feed_of(loader_of("dali", make_shards(jpegs={11: NO_JPEG})), substitute=substitute)
    assert rate("cpu", feed) > 10 if substitute else rate("cpu", feed) == 0
    assert ("decode cpu is left out, it fails: sample 11" in caplog.text) == (not substitute)
    assert any(11 in feed.work(step).sample_ids for step in range(4))


def test_decode_is_chosen_among_the_ways_that_the_device_has(shards, monkeypatch):
    """With a GPU that is not there, and trials that are none: (images/s, 99th percentile) by decode and share of the engine."""
    made = {("cpu", 0.5): (1000, 0.1), ("mixed", 0.5): (1110, 0.1)}
    made |= {("mixed", share): (2000 - 100 * n, 0.1 / (n + 1)) for n, share in enumerate(dali.JPEG_ENGINE_SHARES)}
    monkeypatch.setattr(
        auto, "tried", lambda _, way, **where: asked.append(way) or auto.Trial(*made[way.decode, way.jpeg_engine])
    )
    feed = feed_of(loader_of("dali", shards))

    def choose(device, host_color=False, engine=False, decode="auto"):
        monkeypatch.setattr(dali, "has_jpeg_engine", lambda: engine)
        finish = SimpleNamespace(device=torch.device(device), host_color=host_color, dtype=torch.float32)
        asked.clear()
        way, words = dali.choose_decode(feed, loader_of("dali", shards, decode=decode, jpeg_engine=0.5), finish, 0)
        return way.decode, way.jpeg_engine, len(asked), words

    asked = []
    assert choose("cuda") == ("mixed", 0.5, 2, " (measured, images/s: cpu: 1000, mixed: 1110)")
    decode, share, tries, words = choose("cuda", engine=True)
    assert (decode, share, tries) == ("mixed", 0.3, 6)  # the second, of those within a tenth of 2,000 the steadiest
    assert "cpu: 1000, mixed 12%: 2000, mixed 30%: 1900" in words
    assert choose("cuda", host_color=True, engine=True) == choose("cpu") == ("cpu", 0.5, 0, "")
    assert choose("cuda", engine=True, decode="mixed") == ("mixed", 0.5, 0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have one")
def test_without_a_gpu_there_is_no_jpeg_engine():
    """nvJPEG's library is asked; its own answer is that there is no device."""
    assert not dali.has_jpeg_engine()


def test_mixed_decoding_needs_a_gpu(shards):
    with pytest.raises(ValueError, match="decode=mixed needs a GPU.*--decode cpu"):
        opened("dali", shards, 1, loader={"decode": "mixed"})

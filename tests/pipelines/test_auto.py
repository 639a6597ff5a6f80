"""What `auto` chooses, by rates of stand-ins; what is remembered of trials; runs whose color changes its place on the way."""

import contextlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inscon.config import LoaderConfig
from inscon.plan import ColorSpec, ViewSpec
from pipelines import auto, open_pipeline
from tests.pipelines.conftest import assert_same, feed_of, levels_apart, loader_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WHERE = {"device": CPU, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ({"cpu": (1000, 1), "mixed": (1090, 1)}, "cpu"),  # hardly faster: the GPU is the training's
        ({"cpu": (1000, 1), "mixed": (1110, 9)}, "mixed"),
        ({"cpu": (1000, 1), "a": (2000, 0.3), "b": (1900, 0.2), "c": (1700, 0.1)}, "b"),  # about as fast and steadier
        ({"cpu": (1000, 1), "a": (0, 0), "b": (1500, 2)}, "b"),  # one that failed
        ({"cpu": (0, 0), "mixed": (0, 0)}, "cpu"),
        ({"cpu": (0, 0), "mixed": (10, 1)}, "mixed"),
    ],
)
def test_the_way_to_decode(rates, wanted):
    assert auto.steadiest({name: auto.Trial(*trial) for name, trial in rates.items()}) == wanted


@pytest.mark.parametrize(
    ("host", "step", "place", "figures"),
    [
        (4565, 2732, "host", "4565 images/s, 1.67 times the 2732"),
        (900, 1000, "host", "0.90 times"),
        (890, 1000, "device", "890 images/s, 0.89 times the 1000"),
    ],
)
def test_color_goes_where_it_is_free(host, step, place, figures):
    found, why = auto.color_place(host, step)
    assert found == place and f"color on the {place}: " in why and figures in why and "--color host or device" in why


@pytest.mark.parametrize(
    ("settings", "color", "device", "wanted"),
    [
        ({}, ColorSpec(), CUDA, True),
        ({"decode": "cpu", "pipeline": "ffcv"}, ColorSpec(), CUDA, True),
        ({}, ColorSpec(), CPU, False),
        ({}, ColorSpec(randaugment=2), CUDA, False),
        ({"color": "host"}, ColorSpec(), CUDA, False),
        ({"color": "device"}, ColorSpec(), CUDA, False),
        ({"decode": "mixed"}, ColorSpec(), CUDA, False),
        ({"pipeline": "synthetic"}, ColorSpec(), CUDA, False),
    ],
)
def test_what_is_fixed_is_not_measured(settings, color, device, wanted, monkeypatch):
    monkeypatch.setattr(auto, "host_rate", lambda *_, **__: 100.0)
    loader, feed = LoaderConfig(**settings), SimpleNamespace(views=[ViewSpec(name="view", color=color)])
    assert auto.undecided(feed, loader, device) == wanted
    for step, place in ((50, "host"), (200, "device")):
        assert auto.placed(feed, loader, step, device=device) == (place if wanted else loader.color)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder; not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/inscon"


@pytest.fixture
def tries(monkeypatch):
    """Trials that are none: the n-th makes n images/s."""
    made = []
    monkeypatch.setattr(
        auto, "try_out", lambda _, loader, **__: made.append(loader) or auto.Trial(float(len(made)), 0.25)
    )
    return made


def tried(feed, loader, **changes):
    return auto.tried(feed, loader, **{**WHERE, "start_step": 0, **changes})


def test_a_trial_is_remembered_by_all_that_it_depends_on(shards, cache, tries):
    loader = loader_of("reference", shards)
    feed = feed_of(loader)
    assert tried(feed, loader) == tried(feed_of(loader), loader, start_step=7) == auto.Trial(1.0, 0.25)
    others = [
        (feed, loader_of("reference", shards, decode="cpu")), (feed, loader_of("reference", shards, color="device")),
        (feed, loader_of("reference", shards, threads=2)), (feed, loader_of("dali", shards, jpeg_engine=0.9)),
        (feed_of(loader, batch_size=4), loader), (feed_of(loader, mosaics=None), loader),
    ]  # fmt: skip
    assert [tried(*other).images_per_s for other in others] == [2, 3, 4, 5, 6, 7]
    assert tried(feed, loader, dtype=torch.bfloat16).images_per_s == 8
    assert [tried(*other).images_per_s for other in others] == [2, 3, 4, 5, 6, 7] and len(tries) == 8


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-3],
        lambda text: b"\xff\x00",
        lambda text: b"[1]",
        lambda text: text.replace(b'"images_per_s": 1.0', b'"images_per_s": "fast"'),
        lambda text: text.replace(b'"images_per_s": 1.0', b'"images_per_s": 0.0'),
        lambda text: json.dumps({**json.loads(text), "of": {"machine": "another"}}).encode(),
        lambda text: json.dumps({**json.loads(text), "trial": {"p99_s": 1.0}}).encode(),
    ],
)
def test_a_file_that_is_damaged_or_of_others_is_ignored_and_written_anew(spoil, shards, cache, tries):
    loader = loader_of("reference", shards)
    assert tried(feed_of(loader), loader).images_per_s == 1
    [path] = cache.iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    assert tried(feed_of(loader), loader).images_per_s == 2
    assert tried(feed_of(loader), loader).images_per_s == 2 and list(cache.iterdir()) == [path]


def test_a_failure_is_not_remembered_and_no_cache_is_needed(shards, cache, tries, monkeypatch):
    loader = loader_of("reference", shards)
    feed = feed_of(loader)
    cache.parent.write_text("no folder")
    assert [tried(feed, loader).images_per_s for _ in range(2)] == [1, 2]
    Path(cache.parent).unlink()
    monkeypatch.setattr(auto, "try_out", lambda *_, **__: auto.Trial(0.0, 0.0))
    assert tried(feed, loader).images_per_s == 0 and not cache.exists()


def test_a_trial_counts_images_and_waits(monkeypatch):
    """By a clock of its own: batches of 8 after 10, 10 and 400 ms."""
    moments = itertools.accumulate([0.0, *[0.01, 1.0] * 2, 0.4, 1.0])
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    monkeypatch.setattr(auto, "TRIAL_S", 0.4)
    batches = itertools.repeat(SimpleNamespace(size=8))
    monkeypatch.setattr(auto, "open_pipeline", lambda *_, **__: contextlib.nullcontext(batches))
    trial = auto.try_out(None, LoaderConfig(), start_step=0, **WHERE)
    assert trial.images_per_s == pytest.approx(24 / 0.42) and 0.39 < trial.p99_s <= 0.4


@pytest.fixture(scope="module")
def plain(shards):
    """Batches 3 to 15, colored by the reference on the CPU."""
    loader = loader_of("reference", shards)
    with open_pipeline(feed_of(loader), loader, start_step=3, total_steps=16) as pipeline:
        return list(pipeline)


@pytest.fixture
def opened(monkeypatch):
    """(color, step) of each pipeline that is opened."""
    seen = []

    def noted(feed, loader, **where):
        seen.append((loader.color, where["start_step"]))
        return open_pipeline(feed, loader, **where)

    monkeypatch.setattr(auto, "open_pipeline", noted)
    return seen


def run(shards, plain, stop) -> list[str]:
    """Steps 3 to stop - 1 must have the plain batches; what was said."""
    loader, said = loader_of("reference", shards), []
    batches = auto.TrainingBatches(feed_of(loader), loader, said.append, **WHERE, start_step=3, total_steps=stop)
    with contextlib.closing(batches):
        for made, wanted in itertools.zip_longest(batches, plain[: stop - 3]):
            assert_same(made, wanted)
        assert batches.read()["loader_substituted"] == 0
    return said


@pytest.mark.parametrize(
    ("host", "stop", "places"),
    [
        (1e12, 16, [("host", 3)]),  # faster than any loop
        (1.0, 16, [("host", 3), ("device", 13)]),
        (0.0, 16, [("device", 3)]),  # it failed
        (1.0, 13, [("host", 3)]),  # over when the verdict comes
        (1.0, 5, [("host", 3)]),
    ],
)
def test_a_run_begins_on_the_host_and_keeps_its_pixels(host, stop, places, shards, plain, opened, monkeypatch):
    """As on a GPU: bits do not tell where they were colored, nor whether a pipeline was opened at their step."""
    monkeypatch.setattr(auto, "undecided", lambda *_: True)
    monkeypatch.setattr(auto, "host_rate", lambda *_, **__: host)
    said, decided = run(shards, plain, stop), host > 0 and stop == 16
    assert opened == places and len(said) == len(places) + decided
    if decided:
        assert said[1].startswith(f"color on the {places[-1][0]}: the host alone makes {host:.0f} images/s")


def test_without_a_gpu_nothing_is_tried(shards, plain, opened):
    assert len(run(shards, plain, 16)) == 1 and opened == [("auto", 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("free", "places"), [(0.0, [("host", 3)]), (1e9, [("host", 3), ("device", 13)])])
def test_on_a_gpu_the_steps_are_timed_by_its_own_clock(free, places, shards, plain, cache, opened, monkeypatch):
    """The trial is a true one; it opens the host's pipeline too, first."""
    monkeypatch.setattr(auto, "FREE", free)
    loader, said = loader_of("reference", shards, decode="cpu"), []
    where = {"device": torch.device("cuda"), "dtype": torch.float32}
    batches = auto.TrainingBatches(feed_of(loader), loader, said.append, **where, start_step=3, total_steps=16)
    with contextlib.closing(batches):
        for made, wanted in zip(batches, plain, strict=True):
            assert torch.equal(made.sample_ids, wanted.sample_ids)
            assert levels_apart(made.mosaic, wanted.mosaic) < 1e-2
    assert opened == [("host", 3), *places] and f"color on the {places[-1][0]}: " in said[1]

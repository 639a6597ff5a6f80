"""Labelled views, one of each sample: against torchvision's own transforms, by every engine, over ranks, from the middle."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data_prep.index import NO_LABEL
from pipelines.color import MEAN, STD
from pipelines.evaluation import LabelledViews
from pipelines.reference import picture_of
from tests.packed import Sample, write_set
from tests.pipelines.conftest import as_jpeg, beton_beside, data_for, draw_picture

SIDE, COUNT, CLASSES = 64, 23, 3


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """23 pictures of three classes, larger than the crops."""
    folder = tmp_path_factory.mktemp("labelled") / "set"
    samples = []
    for i in range(COUNT):
        height, width = 80 + 9 * i, 210 - 5 * i
        samples.append(
            Sample(as_jpeg(draw_picture(i, height, width)), height, width, i % CLASSES, f"{i % CLASSES}/{i}.jpg")
        )
    names = ["a", "b", "c"]
    write_set(folder, samples, per_shard=6, class_names=names, seed=0)
    write_set(beton_beside(folder), samples, per_shard=6, class_names=names, seed=0, container="beton")
    return folder


@pytest.fixture(params=["reference", "dali", "ffcv"])
def views(request, labelled):
    """Makes LabelledViews of one engine; skips where it is not installed."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    if request.param == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)

    def make(**settings):
        return LabelledViews(
            data_for(request.param, labelled),
            SIDE,
            pipeline=request.param,
            **{"batch_size": 5, "threads": 1, **settings},
        )

    return make


def joined(batches):
    pixels, labels = zip(*((pixels.clone(), labels) for pixels, labels in batches))
    return torch.cat(pixels), torch.cat(labels)


def test_center_crops_are_imagenets(views):
    """torchvision resizes the whole picture and cuts; here the cut is resized. Edges are rounded to whole px before, not after."""
    one = views()
    pixels, labels = joined(one.center_crops())
    assert pixels.shape == (COUNT, 3, SIDE, SIDE) and labels.tolist() == [i % CLASSES for i in range(COUNT)]
    theirs = v2.Compose([v2.Resize(SIDE * 256 // 224), v2.CenterCrop(SIDE), v2.ToImage(),
                         v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])  # fmt: skip
    expected = torch.stack([theirs(picture_of(one.index, i)) for i in range(COUNT)])
    assert (pixels - expected).abs().mean() < 0.15  # of a standard deviation; fine noise moves with half a pixel
    shifted = torch.stack([theirs(picture_of(one.index, (i + 1) % COUNT)) for i in range(COUNT)])
    assert (pixels - shifted).abs().mean() > 1
    smooth = torch.nn.functional.avg_pool2d
    assert (smooth(pixels, 8) - smooth(expected, 8)).abs().max() < 0.35


def test_engines_see_the_same(labelled, views):
    exact = LabelledViews(labelled, SIDE, 5, "reference", threads=0)
    made, expected = joined(views().center_crops()), joined(exact.center_crops())
    assert (made[0] - expected[0]).abs().max() < 0.05 and torch.equal(made[1], expected[1])
    with views().random_crops(0, 6) as ours, exact.random_crops(0, 6) as theirs:
        (one, labels), (other, same) = joined(ours), joined(theirs)
    assert len(one) == 30 and (one - other).abs().max() < 0.05 and torch.equal(labels, same)


def test_center_crops_of_the_first_samples(views):
    whole, few = joined(views().center_crops()), joined(views(limit=7).center_crops())
    assert torch.equal(whole[0][:7], few[0]) and torch.equal(whole[1][:7], few[1]) and len(few[0]) == 7


def test_ranks_share_the_center_crops(views):
    """Every sample once, though 23 aren't divided by 2 ranks of 2."""
    whole, _ = joined(views().center_crops())
    parts = [joined(views(batch_size=4, rank=rank, world_size=2).center_crops())[0] for rank in range(2)]
    assert sum(map(len, parts)) == COUNT
    numbers = [int((whole - row).abs().amax((1, 2, 3)).argmin()) for part in parts for row in part]
    assert sorted(numbers) == list(range(COUNT))


def test_random_crops_resume_and_differ_between_epochs(views):
    one = views()
    with one.random_crops(0, 8) as batches:
        pixels, labels = joined(batches)
    with one.random_crops(3, 8) as batches:
        later, _ = joined(batches)
    assert torch.equal(pixels[15:], later)
    assert not torch.equal(pixels[:20], pixels[20:])
    assert sorted(np.bincount(labels[:20])) != [0, 0, 20] and len(labels) == 40


def test_nothing_is_tried_out_for_an_evaluation(labelled, monkeypatch):
    """Where a training would measure both ways to decode first, as on a GPU."""
    dali = pytest.importorskip("pipelines.dali", reason="DALI is not installed", exc_type=ImportError)
    choose = dali.choose_decode

    def checked(feed, loader, *arguments):
        assert loader.decode == "cpu"
        return choose(feed, loader, *arguments)

    monkeypatch.setattr(dali, "choose_decode", checked)
    views = LabelledViews(labelled, SIDE, 5, "dali", threads=1)
    assert len(joined(views.center_crops())[0]) == COUNT
    with views.random_crops(0, 1) as batches:
        assert len(joined(batches)[0]) == 5


def test_a_set_without_labels_is_refused(tmp_path):
    samples = [
        Sample(as_jpeg(Image.new("RGB", (70, 70), (9 * i,) * 3)), 70, 70, NO_LABEL, f"{i}.jpg") for i in range(8)
    ]
    write_set(tmp_path / "flat", samples, per_shard=8, class_names=[], seed=0)
    with pytest.raises(
        ValueError, match="frozen evaluation needs labels. Found: none in .*flat; pack a folder of class folders"
    ):
        LabelledViews(tmp_path / "flat", SIDE)
    assert LabelledViews(tmp_path / "flat", SIDE, labels_needed=False).labels.max() == NO_LABEL


def views_of(folder, class_names, used):
    """A set with a picture of each of the labels `used`."""
    content = as_jpeg(Image.new("RGB", (70, 70)))
    write_set(folder, [Sample(content, 70, 70, label, f"{label}.jpg") for label in used], class_names=class_names)
    return LabelledViews(folder, SIDE)


def test_sets_are_joined_by_the_names_of_their_classes(tmp_path):
    train = views_of(tmp_path / "train", ["ape", "bee", "cat", "dog"], [0, 1, 3])
    views_of(tmp_path / "val", ["bee", "cow", "dog"], [0, 2])  # lacks a class, and has a folder without pictures
    val = LabelledViews(tmp_path / "val", SIDE, pipeline="reference", threads=0, like=train)
    assert val.labels.tolist() == [1, 3] == joined(val.center_crops())[1].tolist()
    integers = views_of(tmp_path / "integers", list(map(str, range(12))), [0, 2, 11])
    views_of(tmp_path / "folders", ["0", "11", "2"], [0, 1, 2])  # as texts are sorted
    assert LabelledViews(tmp_path / "folders", SIDE, like=integers).labels.tolist() == [0, 11, 2]
    unknown = views_of(tmp_path / "unknown", ["ape", "cat", "eel"], [0, 1, 2]).index.path
    with pytest.raises(ValueError, match=f"{unknown} has pictures .*{train.index.path} .*Found: cat, eel; pack both"):
        LabelledViews(unknown, SIDE, like=train)


def test_without_threads_the_reference_is_taken(labelled):
    """As the monitor of a run with `--pipeline reference --threads 0` has it."""
    assert len(joined(LabelledViews(labelled, SIDE, 5, threads=0).center_crops())[0]) == COUNT


@pytest.mark.parametrize("pipeline", ["dali", "ffcv"])
def test_an_engine_without_a_thread_is_refused_at_once(labelled, pipeline):
    with pytest.raises(ValueError, match=f"{pipeline} needs at least 1 thread. Found: 0; set --threads 1"):
        LabelledViews(labelled, SIDE, pipeline=pipeline, threads=0)

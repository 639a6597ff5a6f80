"""Frozen features: nearest neighbors against a loop, the right backbone out of a checkpoint."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.make_dali import pack_folder
from inscon import checkpoint
from inscon.nn.backbones import build_backbone
from inscon.transfer import knn
from inscon.transfer.export import any_backbone, rebuild
from scripts import knn as knn_script
from scripts import linear as linear_script
from tests.inscon.test_export import BACKBONES, make_run


def test_knn_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    bank_labels, labels = torch.randint(5, (60,), generator=generator), torch.randint(5, (40,), generator=generator)
    correct = 0
    for q, label in zip(queries.double(), labels):
        nearest = sorted(((float(q @ row.double()), int(y)) for row, y in zip(bank, bank_labels)), reverse=True)[:7]
        votes = [sum(math.exp(s / 0.1) for s, y in nearest if y == c) for c in range(5)]
        correct += votes.index(max(votes)) == int(label)
    assert knn.accuracy((queries, labels), (bank, bank_labels), k=7) == correct / 40
    assert knn.accuracy((bank, bank_labels), (bank, bank_labels), k=1) == 1.0
    with pytest.raises(ValueError, match=r"k must lie in 1..60, the size of the bank. Found: 200"):
        knn.accuracy((queries, labels), (bank, bank_labels))


@pytest.mark.parametrize(("name", "width"), [*zip(BACKBONES, (512, 320, 192))])
def test_features_leave_the_backbone_as_it_is(name, width):
    backbone = build_backbone(name).eval()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    rows, labels = knn.features(backbone, [(torch.randn(3, 3, 64, 64), torch.arange(3))])
    assert rows.shape == (3, width) and labels.tolist() == [0, 1, 2]
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    with pytest.raises(AssertionError):
        knn.features(backbone.train(), [])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_of_a_checkpoint_is_the_trained_one_and_can_be_made_as_it_began(name, tmp_path):
    contents = checkpoint.load(checkpoint.latest(make_run(tmp_path, name)))
    backbone, facts = any_backbone(tmp_path)
    settings = facts["config"]
    assert settings == contents["config"] == rebuild(settings).to_dict() and not backbone.training
    encoders = [
        {n: contents["model"][f"{which}_encoder.backbone.network.{n}"] for n in backbone.network.state_dict()}
        for which in ("query", "key")
    ]
    began = any_backbone(tmp_path, untrained=True)[0].network.state_dict()
    for name, value in backbone.network.named_parameters():
        assert torch.equal(value, encoders[0][name]) and torch.equal(value, began[name])
        assert not torch.equal(value, encoders[1][name])
    assert all(torch.equal(value, encoders[0][name]) for name, value in backbone.network.named_buffers())
    with pytest.raises(ValueError, match="there is no file .*elsewhere; give a run folder"):
        any_backbone(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def classes_apart(tmp_path_factory):
    """A run, a training set of three classes of plain colors, and copies of those of its last two classes."""
    folder = tmp_path_factory.mktemp("classes")
    make_run(folder / "run")
    for number, (name, color) in enumerate({"ape": (250, 20, 20), "bee": (20, 250, 20), "cat": (20, 20, 250)}.items()):
        for split in ("train", "val") if number else ("train",):
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                noise = np.random.default_rng([number, i]).integers(-9, 9, (70, 80, 3))
                Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )
    sets = {split: pack_folder(folder / split, folder / f"{split}_set", workers=1).path for split in ("train", "val")}
    return {"view_size": 64, "pipeline": "reference", "threads": 0, **sets}, folder / "run"


def test_knn_knows_copies_of_training_pictures_though_a_class_is_missing(classes_apart):
    sets, trained = classes_apart
    assert knn_script.main(knn_script.KnnConfig(checkpoint=trained, k=1, **sets)) == {"untrained": 1.0, "trained": 1.0}
    with pytest.raises(ValueError, match="Found: ape; pack both from class folders of the same names"):
        knn_script.main(
            knn_script.KnnConfig(checkpoint=trained, k=1, **sets | {"train": sets["val"], "val": sets["train"]})
        )


def test_a_probe_knows_copies_of_training_pictures_though_a_class_is_missing(classes_apart, tmp_path):
    sets, trained = classes_apart
    config = linear_script.LinearConfig(
        checkpoint=trained, out=tmp_path, epochs=20, batch_size=9, untrained=True, **sets
    )
    linear_script.main(config)
    assert json.loads((tmp_path / "result.json").read_text())["top1"] > 0.9


def test_a_size_that_a_network_does_not_take_is_refused_before_pictures_are_read(classes_apart, tmp_path):
    sets, _ = classes_apart
    contents = checkpoint.load(checkpoint.latest(make_run(tmp_path, "convnext_atto")))
    contents["config"]["model"]["backbone"] = "pit_ti_224"
    contents["model"] = {
        contents["backbone"] + "." + n: v for n, v in build_backbone("pit_ti_224").network.state_dict().items()
    }
    checkpoint.save(tmp_path / "pit", contents, keep=1)
    asked = {**sets, "train": tmp_path / "none"}
    with pytest.raises(ValueError, match="pit_.* takes no pictures of this size. Found: 64 px .*--view-size"):
        knn_script.main(knn_script.KnnConfig(checkpoint=tmp_path / "pit", **asked))
    with pytest.raises(ValueError, match="pit_.* takes no pictures .* Found: 64 px"):
        linear_script.main(linear_script.LinearConfig(checkpoint=tmp_path / "pit", out=tmp_path / "out", **asked))

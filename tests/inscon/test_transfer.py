"""Frozen features: nearest neighbors against a loop, the right trunk out of a checkpoint, the report's arithmetic."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.make_dali import pack_folder
from inscon.config import resolve, smoke
from inscon.encoder import Trunk
from inscon.model import InsCon
from inscon.profiling.rates import read_metrics, run_speed
from inscon.transfer import knn
from inscon.transfer.trunk import load_trunk, untrained_trunk
from scripts import knn as knn_script
from scripts import linear as linear_script
from tests.inscon.test_train import make_config, run


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
    assert knn.accuracy(queries, labels, bank, bank_labels, k=7) == correct / 40
    assert knn.accuracy(bank, bank_labels, bank, bank_labels, k=1) == 1.0
    with pytest.raises(ValueError, match=r"k must lie in 1..60, the size of the bank. Found: 200"):
        knn.accuracy(queries, labels, bank, bank_labels)


def test_features_leave_the_trunk_as_it_is():
    trunk = Trunk("resnet18").eval()
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    rows, labels = knn.features(trunk, [(torch.randn(3, 3, 64, 64), torch.arange(3))])
    assert rows.shape == (3, 512) and labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert all(torch.equal(before[k], v) for k, v in trunk.state_dict().items())
    with pytest.raises(ValueError, match="Found: train mode"):
        knn.features(trunk.train(), [])


def test_the_trunk_of_a_checkpoint_is_the_query_encoders(tmp_path):
    training = run(make_config(tmp_path), total=2)
    trunk, settings = load_trunk(tmp_path)
    assert settings == training.config.to_dict() and not trunk.training
    for name, value in training.model.query_encoder.trunk.state_dict().items():
        assert torch.equal(trunk.state_dict()[name], value)
    assert not torch.equal(trunk.conv1.weight, training.model.key_encoder.trunk.conv1.weight)
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        load_trunk(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def classes_apart(tmp_path_factory):
    """A run, a training set of three classes of plain colors, and copies of those of its last two classes."""
    folder = tmp_path_factory.mktemp("classes")
    run(make_config(folder / "run"), total=2)
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


def test_knn_knows_copies_of_training_pictures_though_a_class_is_missing(classes_apart, capsys):
    sets, trained = classes_apart
    knn_script.main(knn_script.KnnConfig(run=trained, k=1, **sets))
    assert capsys.readouterr().out.count("trained: 100.0 % of 12 pictures") == 2
    with pytest.raises(ValueError, match="Found: ape; pack both from class folders of the same names"):
        knn_script.main(knn_script.KnnConfig(run=trained, k=1, **sets | {"train": sets["val"], "val": sets["train"]}))


def test_a_probe_knows_copies_of_training_pictures_though_a_class_is_missing(classes_apart, tmp_path):
    sets, trained = classes_apart
    config = linear_script.LinearConfig(
        checkpoint=trained, out=tmp_path, epochs=20, batch_size=9, untrained=True, **sets
    )
    linear_script.main(config)
    assert json.loads((tmp_path / "result.json").read_text())["top1"] > 0.9


def test_the_untrained_trunk_is_the_one_the_run_began_with():
    config = resolve(dataclasses.replace(smoke()), 1)
    torch.manual_seed(config.run.seed)
    began = InsCon(config.model, config.views, config.optim.batch_size).query_encoder.trunk
    again = untrained_trunk(config.to_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in began.state_dict().items())


def windows(rates):
    return [
        {
            "step": 10 * (i + 1),
            "step_s": 8 / r,
            "images_per_s": float(r),
            "data_wait_percent": i,
            "loss_single": 9.0 - i,
        }
        for i, r in enumerate(rates)
    ]


def test_the_report_gives_medians_without_warm_up():
    speed = run_speed(windows([1, 100, 200, 300, 400, 50]), fill_steps=15)
    assert (speed.windows, speed.steps, speed.images_per_s, speed.step_ms) == (5, 50, 200.0, 40.0)
    assert speed.step_ms_p99 == 160.0 and speed.data_wait_percent == 3
    assert speed.first["step"] == 30 and speed.first["loss_single"] == 7.0 and speed.last["loss_single"] == 4.0


def test_the_report_refuses_too_few_windows(tmp_path):
    with pytest.raises(ValueError, match="at least 6 log windows.* Found: 5"):
        run_speed(windows([1, 100, 200, 300, 400]), 15)
    with pytest.raises(ValueError, match="there are no metrics at"):
        read_metrics(tmp_path)

"""What every method is to those who don't know it: it is trained and resumed, and its backbone is exported and evaluated."""

import dataclasses

import pytest
import torch

from inscon import checkpoint, methods, train
from inscon.config import Config, ModelConfig, RunConfig
from inscon.methods.method import resolve
from inscon.recipes import RECIPES
from inscon.transfer import export, knn
from inscon.transfer.detection.models import Design, build, read_start
from pipelines import open_pipeline
from scripts.train import feed_of
from tests.inscon.test_linear import make_probe

CPU, STEPS, PER_EPOCH = torch.device("cpu"), 4, 1
SMALLER = {"hidden_dim": 32, "jigsaw_size": 51, "patch_size": 16, "dense_from_step": 3} | {
    f"{name}queue_size": 144 for name in ("", "cell_", "dense_", "jigsaw_", "local_")
}
every = pytest.mark.parametrize("name", methods.names())


def small_config(name, folder) -> Config:
    """As its first recipe has it, in miniature."""
    settings = methods.settings_of(name)
    config = next(made for made in (recipe() for recipe in RECIPES.values()) if type(made.method) is settings)
    fields = {field.name for field in dataclasses.fields(settings)}
    warm_up = min(config.optim.warmup_epochs, 1)
    return resolve(
        Config(
            method=dataclasses.replace(config.method, **{n: value for n, value in SMALLER.items() if n in fields}),
            loader=dataclasses.replace(config.loader, pipeline="synthetic"),
            views=dataclasses.replace(config.views, view_size=64, overlap_min_side=8.0),
            model=ModelConfig(backbone="test_resnet"),
            optim=dataclasses.replace(config.optim, batch_size=8, epochs=STEPS, lr=0.1, warmup_epochs=warm_up),
            run=RunConfig(run_dir=folder, log_every=1),
        ),
        1,
    )


def go_on(config, batches, total):
    training = train.set_up(config, CPU, "a set")
    train.train(training, batches[training.step : total], PER_EPOCH, total)
    return training


@pytest.mark.slow
@every
def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(name, tmp_path):
    configs = [small_config(name, tmp_path / folder) for folder in ("a", "b")]
    with open_pipeline(feed_of(configs[0]), configs[0].loader, total_steps=STEPS) as pipeline:
        batches = list(pipeline)
    undisturbed = go_on(configs[0], batches, STEPS)
    assert go_on(configs[1], batches, STEPS // 2).step == STEPS // 2
    resumed = go_on(configs[1], batches, STEPS)
    ours, theirs = resumed.state_dict(), undisturbed.state_dict()
    assert ours["model"].keys() == theirs["model"].keys()
    for key, value in theirs["model"].items():
        same = torch.equal(ours["model"][key], value) if torch.is_tensor(value) else ours["model"][key] == value
        assert same, key
    for index, state in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])


@every
def test_its_backbone_is_taken_by_all_without_knowing_it(name, tmp_path):
    """Checkpoint, export, nearest neighbors, linear probe, detector."""
    training, file = train.set_up(small_config(name, tmp_path), CPU, "a set"), tmp_path / "backbone.pth"
    checkpoint.save(tmp_path, training.state_dict(), keep=1)
    expected = training.method.backbone.network.state_dict()
    export.export(tmp_path, "timm", file)
    for source in (tmp_path, file):
        found = export.any_backbone(source)[0].network.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    backbone, called, _ = read_start(str(file))
    assert called == "test_resnet"
    rows, _ = knn.features(backbone.eval(), [(torch.randn(3, 3, 64, 64), torch.arange(3))])
    assert rows.shape == (3, backbone.channels[32])
    assert make_probe(tmp_path, backbone=backbone).layer.in_features == backbone.channels[32]
    plan = {"arch": "fasterrcnn-fpn", "backbone": called, "weights": "", "train_data": "", "categories": {1: "a"}}
    detector = build(Design(**plan, min_size=(64,), max_size=64, rois=16), read_start(str(file))[0]).train()
    boxes = torch.tensor([[4.0, 4, 40, 40]])
    losses = detector([torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.tensor([1])}])
    assert all(loss.isfinite() for loss in losses.values())

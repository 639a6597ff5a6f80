"""The configurations that come with the project, and the page that says how to reproduce the paper with them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inscon.config import ModelConfig, ViewConfig
from inscon.methods.method import resolve
from inscon.recipes import RECIPES
from inscon.report.flops import step_flops
from tests.inscon.methods.steps import backward, make_batch, make_config, small_inscon

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_resolve(recipe):
    c = resolve(RECIPES[recipe](), 1)
    assert getattr(c.method, "queue_size", 0) % c.optim.batch_size == 0


@pytest.mark.parametrize(("recipe", "trainings"), [
    ("moco_v2", 4 / 3), ("simclr_r50", 2.0), ("byol_r50", 2.67), ("pixpro_r50", 2.96),
])  # fmt: skip
def test_the_cost_of_an_image_is_what_the_page_says(recipe, trainings):
    """Counted, within 5 % of the arithmetic: views, passes, and PixPro's heads on maps."""
    counted = step_flops(resolve(RECIPES[recipe](), 1)).trainings
    assert counted == pytest.approx(trainings, rel=0.05)
    assert f"| {counted:.2f} |" in (ROOT / "docs/methods.md").read_text()


def test_the_cost_of_views_of_one_cell_can_be_counted():
    """Of 32 px: the last map is a single value, which BatchNorm refuses to normalize in training."""
    config = RECIPES["moco_v2"]()
    method = dataclasses.replace(config.method, queue_size=256)
    model, views = ModelConfig(backbone="test_resnet"), ViewConfig(view_size=32)
    small = dataclasses.replace(config, method=method, model=model, views=views)
    assert step_flops(resolve(small, 1)).trainings == pytest.approx(4 / 3, rel=0.05)


def test_a_step_is_counted_as_it_is_taken():
    """On tensors with contents, BatchNorm included."""
    config = make_config(small_inscon(), backbone="test_resnet")
    method = config.method.build(config, config.optim.batch_size)
    with FlopCounterMode(display=False) as counted:
        backward(method, make_batch(config.method, dtype=torch.float32))
    assert step_flops(config).per_image == counted.get_total_flops() / config.optim.batch_size


@pytest.mark.parametrize("recipe", ["simclr_r50", "byol_r50", "pixpro_r50"])
def test_recipes_for_large_batches_use_lars_and_spare_vectors(recipe):
    config = RECIPES[recipe]()
    optim = config.optim
    assert optim.optimizer == "lars" and not optim.decay_norm_and_bias and optim.schedule == "cosine-step"
    assert 0 < optim.weight_decay <= 1e-5 and optim.warmup_epochs in (5, 10)
    assert resolve(config, 8).model.norm == resolve(config, 1).model.norm == "sync" and config.views.scale == (
        0.08,
        1.0,
    )


def test_moco_v1_and_v2_differ_in_head_temperature_and_colors():
    v1, v2 = RECIPES["moco_v1"](), RECIPES["moco_v2"]()
    assert (v1.method.mlp, v1.method.temperature, v2.method.mlp, v2.method.temperature) == (False, 0.07, True, 0.2)
    color = v1.views.color()
    assert (color.gray_first, color.jitter_probability, color.hue, color.blur_probability) == (True, 1.0, 0.4, 0.0)
    color = v2.views.color()
    assert (color.gray_first, color.jitter_probability, color.hue, color.blur_probability) == (False, 0.8, 0.1, 0.5)


PRETRAININGS = {  # heads, cell temperature and stage of the runs behind the paper's Tables 2 to 9
    "moco_v2": (("single",), None, None),
    "r2": (("single", "multi"), None, None),
    "r3": (("single", "cell"), 0.2, "res5"),
    "r4": (("single", "cell"), 0.1, "res5"),
    "r5": (("single", "cell"), 0.3, "res5"),
    "r6": (("single", "cell"), 0.4, "res5"),
    "imagenet_r50": (("single", "multi", "cell"), 0.2, "res5"),
    "r8": (("single", "multi", "cell"), 0.2, "res4"),
}


@pytest.mark.parametrize("name", PRETRAININGS)
def test_the_eight_pretrainings_are_recipes_of_table_1(name):
    heads, temperature, stage = PRETRAININGS[name]
    config = RECIPES[name]()
    assert getattr(config.method, "heads", ("single",)) == heads
    if temperature is not None:
        assert (config.method.cell_temperature, config.method.cell_stage) == (temperature, stage)
    optim = config.optim
    assert (optim.batch_size, optim.epochs, optim.lr, optim.schedule) == (256, 200, 0.03, "cosine-epoch")
    assert config.model.backbone == "resnet50" and config.views.view_size == 224 and config.method.temperature == 0.2
    page = (ROOT / "docs/reproduce.md").read_text()
    assert f"| `{name}` | {', '.join(heads)} |" in page

"""Bad settings are refused before work starts, each with the value found and what to set."""

import dataclasses
import json

import pytest

from inscon import methods
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig, from_dict
from inscon.methods import byol, inscon, moco, pixpro, simclr
from inscon.methods.method import resolve
from inscon.plan import ColorSpec
from inscon.recipes import RECIPES, imagenet_r50


def config(batch=256, model=None, views=None, **method):
    return Config(
        method=inscon.Settings(**method),
        views=views or ViewConfig(),
        model=ModelConfig(**(model or {})),
        optim=OptimConfig(batch_size=batch),
    )


def test_the_main_recipe_is_table_1():
    c = resolve(imagenet_r50(), 8)
    assert (c.optim.lr, c.optim.momentum, c.optim.weight_decay) == (0.03, 0.9, 1e-4)
    assert (c.optim.batch_size, c.optim.epochs, c.optim.schedule) == (256, 200, "cosine-epoch")
    m = c.method
    assert (m.queue_size, m.cell_queue_size, m.embedding_dim, m.cell_dim) == (65536, 64512, 128, 256)
    assert (m.temperature, m.cell_temperature, m.key_momentum) == (0.2, 0.2, 0.999)
    assert (c.model.backbone, c.model.norm, c.model.split_size) == ("resnet50", "shuffle", None)


@pytest.mark.parametrize(
    ("batch", "keys", "cells"), [(256, 65536, 64512), (512, 65536, 64512), (96, 65472, 65664 - 864)]
)
def test_queues_round_down_to_whole_batches(batch, keys, cells):
    m = resolve(config(batch), 1).method
    assert m.queue_size == keys and m.cell_queue_size == cells
    assert keys % batch == 0 and cells % (9 * batch) == 0 and 65536 - keys < batch and 65536 - cells < 9 * batch
    assert m.memory(batch) == keys // batch and m.memory(batch) == config(batch).method.memory(batch)


@pytest.mark.parametrize(
    ("batch", "split"), [(256, 32), (128, 32), (64, 16), (32, 8), (16, 4), (8, 4), (96, 24), (28, 4)]
)
def test_one_process_splits_batchnorm_as_eight_gpus_would(batch, split):
    c = resolve(config(batch), 1)
    assert c.model.norm == "split" and c.model.split_size == split


@pytest.mark.parametrize(
    ("batch", "ranks", "norm", "group"),
    [
        (256, 8, "shuffle", None),
        (256, 4, "shuffle", None),
        (512, 4, "split", 32),
        (1280, 8, "split", 32),
        (528, 4, "shuffle", None),
        (256, 1, "split", 32),
    ],
)
def test_images_travel_only_where_a_rank_has_less_than_four_groups(batch, ranks, norm, group):
    model = resolve(config(batch), ranks).model
    assert (model.norm, model.split_size) == (norm, group)


@pytest.mark.parametrize("norm", ["auto", "split", "shuffle", "sync", "none"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_a_backbone_without_batchnorm_has_none_to_hide(norm, ranks):
    model = resolve(config(model={"backbone": "convnext_atto", "norm": norm}), ranks).model
    assert (model.norm, model.split_size) == ("none", None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_come_back_from_json(recipe):
    """What config.json and checkpoints hold, group by group; and whose settings they are."""
    c = resolve(RECIPES[recipe](), 1)
    plain = json.loads(json.dumps(c.to_dict()))
    plain["run"]["resume"] = "auto"  # a setting of before
    assert from_dict(RunConfig, plain["run"]).seed == c.run.seed
    assert type(c.method) is methods.settings_of(plain["method"].pop("name"))
    for group in ("method", "views", "model", "optim"):
        assert from_dict(type(getattr(c, group)), plain[group]) == getattr(c, group)


def test_views_are_drawn_as_the_settings_say():
    views = ViewConfig(
        view_size=96, scale=(0.1, 0.9), ratio=(1.0, 1.0), flip_probability=0.0, hue=0.4, gray_first=True,
        overlap_min_side=16.0, overlap_min_iou=0.1, overlap_candidates=3,
    )  # fmt: skip
    spec = views.spec("key", views.overlap("query"))
    assert (spec.name, spec.size, spec.scale, spec.ratio, spec.flip) == ("key", 96, (0.1, 0.9), (1.0, 1.0), 0.0)
    assert spec.color == ColorSpec(hue=0.4, gray_first=True)
    rule = spec.overlap
    assert (rule.view, rule.min_side, rule.min_iou, rule.candidates) == ("query", 16.0, 0.1, 3)
    assert views.spec("query").overlap is None


def test_what_a_method_looks_at_is_what_its_settings_ask_for():
    def asked(settings):
        specs = settings.view_specs(ViewConfig())
        return [spec.name for spec in specs], [spec.overlap and spec.overlap.view for spec in specs]

    assert asked(moco.Settings()) == (["query", "key"], [None, None]) and moco.Settings().mosaics() is None
    assert asked(inscon.Settings()) == (["query", "key"], [None, "query"])
    third = inscon.Settings(tiles_from="third", tile="half")
    assert asked(third) == (["query", "key", "tile"], [None, "query", None])
    assert (third.mosaics().view, third.mosaics().tile) == ("tile", "half")
    assert inscon.Settings().mosaics().view == "query"
    alone = inscon.Settings(heads=("cell",), tiles_from="third")
    assert asked(alone)[0] == ["query", "key"] and alone.mosaics() is None


def of_any_type(**settings):
    """InsCon's settings, refused by themselves and not by the tests' own type checks."""
    made = inscon.Settings()
    for name, value in settings.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


VIT = {"backbone": "vit_tiny_patch16_224"}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: resolve(config(30), 1), "multiple of 4 images .* times 1 rank.* Found: 30; set --batch-size 28"),
    (lambda: resolve(config(36), 2), "times 2 rank.* Found: 36; set --batch-size 32"),
    (lambda: resolve(config(2), 1), "Found: 2; set --batch-size 4"),
    (lambda: resolve(Config(method=moco.Settings(), optim=OptimConfig(batch_size=9)), 2), "of 2 rank.* 9; set --batch-size 8"),
    (lambda: resolve(config(queue_size=1000), 1), "multiple of the 256 keys.* Found: 1000; set --queue-size 1024"),
    (lambda: resolve(config(cell_queue_size=65536), 1), "2304 keys of one step. Found: 65536; set --cell-queue-size 64512"),
    (lambda: resolve(config(queue_size=128), 1), "Found: 128; set --queue-size 256"),
    (lambda: resolve(config(model={"norm": "shuffle"}), 1), "needs at least 2. Found: 1 rank; set --norm split"),
    (lambda: resolve(config(4), 1), "at least 2 BatchNorm groups.* Found: groups of 4; set --split-size 4, and --batch-size to at"),
    (lambda: resolve(config(64, model={"split_size": 12}), 1), "Found: groups of 12; set --split-size 4"),
    (lambda: resolve(config(views=ViewConfig(view_size=32)), 1), "map of at least 2x2 features.* set --view-size 64"),
    (lambda: resolve(config(model=VIT), 1), "strides 32 px .* vit_tiny_patch16_224 has others. Found: 16; set --cell-stage"),
    (lambda: resolve(config(model={"backbone": "resnet500"}), 1), "no backbone resnet500; set --backbone to"),
    (lambda: ViewConfig(view_size=100), "multiple of 32.* Found: 100"),
    (lambda: ViewConfig(scale=(0.5, 0.2)), "scale must be a range.* Found: 0.5 0.2"),
    (lambda: ViewConfig(scale=(0.5, 1.2)), "at most 1. Found: 1.2"),
    (lambda: ViewConfig(gray_probability=2), "--gray-probability must be from 0 to 1. Found: 2"),
    (lambda: ViewConfig(hue=0.7), "--hue must be from 0 to 0.5. Found: 0.7"),
    (lambda: ViewConfig(contrast=-1), "--contrast must be at least 0. Found: -1"),
    (lambda: ViewConfig(flip_probability=2), "flip_probability must lie in 0..1. Found: 2"),
    (lambda: ViewConfig(overlap_min_side=300), "0..224 px. Found: 300"),
    (lambda: ViewConfig(overlap_min_iou=-0.1), "--overlap-min-iou must be from 0 to 1. Found: -0.1"),
    (lambda: ViewConfig(overlap_candidates=0), "at least 1. Found: 0"),
    (lambda: LoaderConfig(prefetch=0), "--prefetch must be at least 1. Found: 0"),
    (lambda: LoaderConfig(stall_timeout=0), "--stall-timeout must be at least 1. Found: 0"),
    (lambda: LoaderConfig(stall_timeout=float("nan")), "--stall-timeout must be at least 1. Found: nan"),
    (lambda: LoaderConfig(decode="mixed", color="host"), "color=host needs them on the host; set --color device"),
    (lambda: of_any_type(heads=("single", "double")), "choice of single multi cell.* Found: single double"),
    (lambda: inscon.Settings(heads=("single", "single")), "each at most once. Found: single single"),
    (lambda: inscon.Settings(heads=()), "Found: $"),
    (lambda: inscon.Settings(cell_grid=0), "--cell-grid must be at least 1. Found: 0"),
    (lambda: inscon.Settings(cell_temperature=0.0), "--cell-temperature must be at least 0.001. Found: 0.0"),
    (lambda: moco.Settings(temperature=0.0), "--temperature must be at least 0.001. Found: 0"),
    (lambda: moco.Settings(key_momentum=1.5), "--key-momentum must be from 0 to 1. Found: 1.5"),
    (lambda: moco.Settings(embedding_dim=0), "--embedding-dim must be at least 1. Found: 0"),
    (lambda: OptimConfig(batch_size=0), "--batch-size must be at least 1. Found: 0"),
    (lambda: OptimConfig(max_steps=0), "--max-steps must be at least 1. Found: 0"),
    (lambda: OptimConfig(lr=-1), "lr must be at least 0. Found: -1"),
    (lambda: OptimConfig(epochs=5, warmup_epochs=5), "warmup_epochs must lie in 0..4, .* Found: 5; set --warmup-epochs 0"),
    (lambda: resolve(Config(method=moco.Settings(), optim=OptimConfig(batch_size=3)), 3), "Found: 1; set --batch-size 6 or"),
    (lambda: resolve(Config(method=simclr.Settings(), model=ModelConfig(norm="shuffle")), 2), "norm=shuffle .* set --norm sync"),
    (lambda: byol.Settings(target_momentum=1.5), "--target-momentum must be from 0 to 1. Found: 1.5"),
    (lambda: pixpro.Settings(pair_distance=-1.0), "--pair-distance must be at least 0. Found: -1.0"),
    (lambda: byol.Settings(second_blur_probability=2.0), "--second-blur-probability must be from 0 to 1. Found: 2.0"),
    (lambda: RunConfig(log_every=0), "--log-every must be at least 1. Found: 0"),
    (lambda: RunConfig(eval_pictures=1), "--eval-pictures must be at least 2. Found: 1"),
    (lambda: RunConfig(seed=-1), "seed must be at least 0. Found: -1"),
])  # fmt: skip
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_remedies_work():
    resolve(config(28), 1), resolve(config(32), 2), resolve(config(queue_size=1024, cell_queue_size=64512), 1)
    resolve(config(views=ViewConfig(view_size=64)), 1), resolve(config(64, model={"split_size": 4}), 1)
    assert resolve(config(model=VIT, cell_stage="res4"), 1).model.norm == "none"


def test_settings_are_frozen():
    for settings in (ModelConfig(), inscon.Settings(), ViewConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.backbone = "resnet18"

"""Bad settings are refused before work starts, each with the value found and what to set."""

import dataclasses
import json

import pytest

from inscon.config import (
    RECIPES,
    Config,
    LoaderConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewConfig,
    imagenet_r50,
    resolve,
)


def config(batch=256, **model):
    return Config(model=ModelConfig(**model), optim=OptimConfig(batch_size=batch))


def test_the_main_recipe_is_table_1():
    c = resolve(imagenet_r50(), 8)
    assert (c.optim.lr, c.optim.momentum, c.optim.weight_decay, c.optim.batch_size, c.optim.epochs) == (
        0.03,
        0.9,
        1e-4,
        256,
        200,
    )
    assert (c.model.queue_size, c.model.cell_queue_size) == (65536, 64512)
    assert (c.model.temperature, c.model.cell_temperature, c.model.embedding_dim, c.model.cell_dim) == (
        0.2,
        0.2,
        128,
        256,
    )
    assert c.optim.schedule == "cosine-epoch" and c.model.norm == "shuffle" and c.model.split_size is None


@pytest.mark.parametrize(
    ("batch", "keys", "cells"), [(256, 65536, 64512), (512, 65536, 64512), (96, 65472, 65664 - 864)]
)
def test_queues_round_down_to_whole_batches(batch, keys, cells):
    c = resolve(config(batch), 1)
    assert c.model.queue_size == keys and c.model.cell_queue_size == cells
    assert keys % batch == 0 and cells % (9 * batch) == 0 and 65536 - keys < batch and 65536 - cells < 9 * batch


@pytest.mark.parametrize(("batch", "split"), [(256, 32), (128, 32), (64, 16), (32, 8), (16, 4), (8, 4), (96, 24)])
def test_one_process_splits_batchnorm_as_eight_gpus_would(batch, split):
    c = resolve(config(batch), 1)
    assert c.model.norm == "split" and c.model.split_size == split


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_resolve_and_become_json(recipe):
    c = resolve(RECIPES[recipe](), 1)
    assert json.loads(json.dumps(c.to_dict()))["optim"]["batch_size"] == c.optim.batch_size
    assert RECIPES[recipe].__doc__


@pytest.mark.parametrize(("make", "message"), [
    (lambda: resolve(config(30), 1), "multiple of 4 images .* times 1 rank.* Found: 30; set --batch-size 28"),
    (lambda: resolve(config(36), 2), "times 2 rank.* Found: 36; set --batch-size 32"),
    (lambda: resolve(config(2), 1), "Found: 2; set --batch-size 4"),
    (lambda: resolve(config(256, queue_size=1000), 1), "multiple of the 256 keys.* Found: 1000; set --queue-size 1024"),
    (lambda: resolve(config(256, cell_queue_size=65536), 1), "2304 keys of one step. Found: 65536; set --cell-queue-size 64512"),
    (lambda: resolve(config(256, queue_size=128), 1), "Found: 128; set --queue-size 256"),
    (lambda: resolve(config(256, norm="shuffle"), 1), "needs at least 2. Found: 1 rank; set --norm split"),
    (lambda: resolve(config(4), 1), "at least 2 BatchNorm groups.* Found: 4"),
    (lambda: resolve(config(64, split_size=12), 1), "Found: 12; set --split-size 4"),
    (lambda: resolve(Config(views=ViewConfig(view_size=32)), 1), "map of at least 2x2 features.* set --view-size 64"),
    (lambda: ViewConfig(view_size=100), "multiple of 32.* Found: 100"),
    (lambda: ViewConfig(scale=(0.5, 0.2)), "scale must be a range.* Found: 0.5 0.2"),
    (lambda: ViewConfig(scale=(0.5, 1.2)), "at most 1. Found: 1.2"),
    (lambda: ViewConfig(gray_probability=2), "gray_probability must lie in 0..1. Found: 2"),
    (lambda: ViewConfig(hue=0.7), "hue must lie in 0..0.5 turns. Found: 0.7"),
    (lambda: ViewConfig(contrast=-1), "contrast must not be negative. Found: -1"),
    (lambda: ViewConfig(overlap_min_side=300), "0..224 px. Found: 300"),
    (lambda: ViewConfig(overlap_min_iou=-0.1), "overlap_min_iou must lie in 0..1. Found: -0.1"),
    (lambda: ViewConfig(overlap_candidates=0), "at least 1. Found: 0"),
    (lambda: LoaderConfig(prefetch=0), "prefetch must be at least 1 batch. Found: 0; set --prefetch 2"),
    (lambda: LoaderConfig(stall_timeout=0), "stall_timeout must be more than 0 seconds. Found: 0"),
    (lambda: LoaderConfig(stall_timeout=float("nan")), "stall_timeout must be more than 0 seconds. Found: nan"),
    (lambda: LoaderConfig(decode="mixed", color="host"), "color=host needs them on the host; set --color device"),
    (lambda: ModelConfig(heads=("single", "double")), "choice of single multi cell.* Found: single double"),
    (lambda: ModelConfig(heads=()), "Found: $"),
    (lambda: ModelConfig(temperature=0), "temperature must be greater than 0. Found: 0"),
    (lambda: ModelConfig(key_momentum=1.5), "key_momentum must lie in 0..1. Found: 1.5"),
    (lambda: ModelConfig(cell_grid=0), "cell_grid must be at least 1. Found: 0"),
    (lambda: OptimConfig(batch_size=0), "batch_size must be at least 1. Found: 0"),
    (lambda: OptimConfig(max_steps=0), "max_steps must be at least 1.* Found: 0"),
    (lambda: OptimConfig(lr=-1), "lr must not be negative. Found: -1"),
    (lambda: RunConfig(log_every=0), "log_every must be at least 1. Found: 0"),
    (lambda: RunConfig(seed=-1), "seed must not be negative. Found: -1"),
])  # fmt: skip
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().temperature = 1.0


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

"""Every method is fed by every engine, with equal batches."""

import math

import pytest
import torch

from inscon import methods
from tests.inscon.methods.steps import logged, take_steps
from tests.inscon.methods.test_every import small_config
from tests.pipelines.conftest import assert_same, batches


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_a_method_trains_on_equal_batches_of_every_engine(name, shards, tmp_path):
    config = small_config(name, tmp_path)
    asked = {"views": config.method.view_specs(config.views), "mosaics": config.method.mosaics()}
    made, losses = {engine: batches(engine, shards, 2, **asked) for engine in ("reference", "dali", "ffcv")}, {}
    for engine, found in made.items():
        for one, other in zip(found, made["reference"], strict=True):
            assert_same(one, other, by_pil=True)
        torch.manual_seed(0)
        method = config.method.build(config, 8).to(memory_format=torch.channels_last).train()
        losses[engine] = [logged(step)["loss"].item() for step in take_steps(method, found)]
    assert losses["dali"] == losses["ffcv"] and all(map(math.isfinite, losses["dali"]))
    assert losses["reference"] == pytest.approx(losses["dali"], rel=1e-2)

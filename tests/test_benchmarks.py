"""What a benchmark must not do: wait for a process that is gone."""

import argparse

import pytest

from benchmarks import step
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, ViewConfig
from inscon.methods import inscon
from inscon.methods.method import resolve


@pytest.mark.slow
def test_a_contender_that_dies_ends_the_benchmark(capfd):
    """Of a device that is not there."""
    config = Config(
        method=inscon.Settings(),
        loader=LoaderConfig(pipeline="synthetic"),
        views=ViewConfig(view_size=64),
        model=ModelConfig(backbone="resnet18", norm="split"),
        optim=OptimConfig(batch_size=8),
    )
    arguments = argparse.Namespace(threads=1, device="cuda:99", warm_up=1, rounds=1, steps=1)
    with pytest.raises(ChildProcessError, match='the contender "naive" ended with exit code 1'):
        step.contend(["naive"], resolve(config, 1), arguments)
    assert "CUDA" in capfd.readouterr().err

"""Faults planted in a training run, for test_throughput_report.py, and a rank of a report with one of them.

torchrun --nproc_per_node=2 tests/scripts/planted.py OUT none|delay DELAY_S
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inscon import distributed, train
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, ViewConfig
from inscon.gradients import FlatGradients
from inscon.report.measure import Measurement
from scripts.train import feed_of
from tests.inscon.methods import toy


def small_run(
    data: Path | None, *, pipeline: str = "synthetic", batch_size: int = 16, backbone: str = "test_resnet"
) -> Config:
    """A step of a tenth of a second, most in the networks; a method that the report has never heard of."""
    return Config(
        method=toy.Settings(),
        loader=LoaderConfig(data=data, pipeline=pipeline, threads=0 if pipeline == "reference" else 2),
        views=ViewConfig(view_size=64, overlap_min_side=8.0),
        model=ModelConfig(backbone=backbone, norm="none"),
        optim=OptimConfig(batch_size=batch_size, epochs=2),
    )


@dataclass(frozen=True, kw_only=True)
class Sleepy(toy.Settings):
    """The host does something else for a while in every step, outside of its parts."""

    sleep_s: float = 0.0
    """Of a step."""

    def build(self, config: Config, rank_batch_size: int) -> toy.Toy:
        method = super().build(config, rank_batch_size)
        method.schedule = lambda step, total_steps: time.sleep(self.sleep_s)
        return method


def measure(config: Config, out: Path, kind: str | None = None, device="cpu") -> dict:
    """A report of 10 steps; measured again where something else had the machine, or a verdict of another `kind` came out."""
    for _ in range(3):
        measurement = Measurement(config, feed_of, torch.device(device), out, steps=10, warm_up=2)
        report = measurement.report()
        if report["verdict"]["kind"] == (kind or report["verdict"]["kind"].replace("disturbed", "")):
            break
    return report | {"predictions": []}


def main(out: Path, fault: str, delay_s: float) -> None:
    class SlowGradients(FlatGradients):
        def average(self) -> None:
            time.sleep(delay_s)
            super().average()

    device = distributed.start()
    torch.set_num_threads(1)
    if fault == "delay":
        train.FlatGradients = SlowGradients
    config = dataclasses.replace(small_run(None), optim=OptimConfig(batch_size=32, epochs=2))
    report = measure(config, out.parent, device=device)
    if distributed.rank() == 0:
        out.write_text(json.dumps(report))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))

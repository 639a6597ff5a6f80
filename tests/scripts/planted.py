"""Faults planted in a training run, for test_throughput_report.py, and a rank of a report with one of them.

torchrun --nproc_per_node=2 tests/scripts/planted.py OUT none|delay
"""

import functools
import json
import os
import sys
import time
from pathlib import Path

import torch
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inscon import distributed, train
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig
from inscon.profiling.report import Measurement


@functools.cache
def delay_s() -> float:
    """Of each planted fault, about as long as a step here and now: machines differ, and the same one from day to day.

    1.3 forward and backward passes of what `small_run` trains. The ranks of a test are told the test's own in PLANTED_DELAY_S.
    """
    if "PLANTED_DELAY_S" in os.environ:
        return float(os.environ["PLANTED_DELAY_S"])
    trunk, pixels, seconds = resnet18(), torch.randn(64, 3, 32, 32), []
    for _ in range(3):
        start = time.perf_counter()
        trunk(pixels).sum().backward()
        seconds.append(time.perf_counter() - start)
    return max(0.15, 1.3 * min(seconds))


def small_run(
    data: Path | None, *, batch_size: int = 64, view_size: int = 32, pipeline: str = "synthetic", threads: int = 2
) -> Config:
    """A step of some tenths of a second, most in the trunk. `view_size`, px: at 32 a third of it is the same for any batch."""
    return Config(
        loader=LoaderConfig(data=data, pipeline=pipeline, threads=threads),
        views=ViewConfig(view_size=view_size, overlap_min_side=8.0),
        model=ModelConfig(arch="resnet18", heads=("single",), queue_size=2 * batch_size, split_size=batch_size // 2),
        optim=OptimConfig(batch_size=batch_size, epochs=2),
        run=RunConfig(tensorboard=False),
    )


def delayed(hook):
    """Gradients as from a slow network."""

    def slow(group, bucket):
        def late(future):
            time.sleep(delay_s())
            return future.value()

        return hook(group, bucket).then(late)

    return slow


def main(out: Path, fault: str) -> None:
    device = distributed.start()
    torch.set_num_threads(1)
    if fault == "delay":
        train.GRADIENT_HOOKS["fp32"] = delayed(train.GRADIENT_HOOKS["fp32"])
    config = small_run(None)
    report = Measurement(config, device, out.parent, steps=10, warm_up=2).report(["synthetic"], trace=0)
    if distributed.rank() == 0:
        out.write_text(json.dumps(report))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

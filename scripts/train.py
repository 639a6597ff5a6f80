"""Pre-train InsCon.

    python scripts/train.py --pipeline dali --data SHARDS                            # one GPU, or a CPU
    torchrun --nproc_per_node=8 scripts/train.py --pipeline dali --data SHARDS       # eight GPUs
    python scripts/train.py --recipe smoke --data SHARDS --epochs 5                  # any field of a recipe is a flag

`--recipe` is imagenet_r50 (the default), moco_v2, moco_v1, smoke, or r1 to r8 (docs/reproduce.md); `--help` lists every
setting with its reason.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon import distributed, guard, train
from inscon.config import RECIPES, Config, resolve
from inscon.transfer import knn
from pipelines import open_pipeline
from pipelines.evaluation import LabelledViews
from pipelines.facts import DataFacts, data_facts


def parse(arguments: list[str]) -> Config:
    """The recipe named by --recipe, with every flag on top."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES, default="imagenet_r50")
    chosen, rest = first.parse_known_args(arguments)
    return tyro.cli(
        Config, default=RECIPES[chosen.recipe](), args=rest, prog="scripts/train.py", description=__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    config = parse(arguments)
    if not config.run.run_dir.name:
        raise ValueError("run_dir must be a folder for this run; set --run-dir runs/NAME")
    device = distributed.start()
    try:
        world_size = distributed.world_size()
        config = resolve(config, world_size)
        facts = data_facts(config)
        with distributed.hold(config.run.run_dir, "--run-dir"):
            run(config, facts, device)
    finally:
        distributed.stop()


def run(config: Config, facts: DataFacts, device: torch.device) -> None:
    """From the newest checkpoint, if any, to the end or a stop; the run folder is this process's own."""
    training = train.set_up(config, device, facts.fingerprint)
    total_steps = config.optim.epochs * facts.steps_per_epoch
    if config.optim.max_steps is not None:
        total_steps = min(total_steps, config.optim.max_steps)
    if training.step >= total_steps:
        print(f"{config.run.run_dir} is finished: step {training.step} of {total_steps}.")
        return
    with open_pipeline(
        config.loader.pipeline, config=config, rank=distributed.rank(), world_size=distributed.world_size(), device=device,
        dtype=training.precision.pixel_dtype, start_step=training.step, total_steps=total_steps,
        bad_samples=training.bad_samples,
    ) as loader:  # fmt: skip
        if distributed.rank() == 0:
            print(loader.describe())
        monitor = knn_monitor(training)
        if train.train(training, loader, facts.steps_per_epoch, total_steps, telemetry=loader, monitor=monitor):
            guard.ignore_stops()


def knn_monitor(training: train.Training) -> train.Monitor | None:
    """What evaluates the trunk during training, if `eval_data` is set; the sentence about data that won't do comes at once."""
    config, device = training.config, training.device
    if config.run.eval_data is None:
        return None
    views = LabelledViews(
        config.run.eval_data, config.views.view_size, 64 * distributed.world_size(), threads=config.loader.threads,
        device=device, dtype=training.precision.pixel_dtype, rank=distributed.rank(), world_size=distributed.world_size(),
        limit=config.run.eval_pictures,
    )  # fmt: skip

    def evaluate(leave_off: Callable[[], bool]) -> dict[str, float]:
        trunk, amp_dtype = training.model.query_encoder.trunk, training.precision.autocast_dtype
        with contextlib.closing(views.center_crops()) as crops:
            batches = itertools.takewhile(lambda _: not leave_off(), crops)
            return {"knn": knn.monitor(trunk, batches, device, amp_dtype)}

    return evaluate


if __name__ == "__main__":
    guard.run_script("train.py", lambda: main(sys.argv[1:]))

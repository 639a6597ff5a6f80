"""Pre-train a backbone without labels.

    python scripts/train.py --pipeline dali --data SHARDS                            # one GPU, or a CPU
    torchrun --nproc_per_node=8 scripts/train.py --pipeline dali --data SHARDS       # eight GPUs
    python scripts/train.py --method moco --backbone convnext_tiny --data SHARDS     # another method, another network
    python scripts/train.py --recipe own --data SHARDS                               # settings that fit your number of pictures
    python scripts/train.py --recipe smoke --data SHARDS --epochs 5                  # any field of a recipe is a flag

`--recipe` is imagenet_r50 (the default), one of the rivals (docs/methods.md), own, smoke, or r2 to r8 (docs/reproduce.md).
`--method` starts from the first recipe of a method instead, or its defaults if there is none; its own settings are flags too, and
`--help` lists every setting with its reason.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon.guard import share_cores

share_cores()

import torch
import tyro

from data_prep.store import local_copy
from inscon import distributed, guard, methods, own, train
from inscon.config import Config
from inscon.methods.method import resolve
from inscon.recipes import RECIPES
from inscon.transfer import knn
from pipelines.auto import TrainingBatches
from pipelines.evaluation import LabelledViews
from pipelines.feed import Feed, open_index


def parse(arguments: list[str]) -> Config:
    """The recipe named by --recipe, or the first one of --method or its defaults, with every flag on top."""
    _, start, rest = chosen_start(arguments)
    return tyro.cli(
        Config[type(start.method)], default=start, args=rest, description=__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )  # fmt: skip


def chosen_start(arguments: list[str]) -> tuple[str | None, Config, list[str]]:
    """The value of --recipe, the configuration that it or --method begins with, and the other arguments."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES)
    first.add_argument("--method")
    chosen, rest = first.parse_known_args(arguments)
    start = RECIPES[chosen.recipe or "imagenet_r50"]()
    if chosen.method is not None and type(start.method) is not (settings := methods.settings_of(chosen.method)):
        if chosen.recipe not in (None, "own"):
            raise ValueError(f"the recipe {chosen.recipe} is not of the method {chosen.method}; set one of the two")
        recipes = (recipe() for recipe in RECIPES.values())
        start = next((made for made in recipes if type(made.method) is settings), Config(method=settings()))
    return chosen.recipe, start, rest


def fitted(config: Config, arguments: list[str], ranks: int) -> Config:
    """What `parse` made of the arguments; with --recipe own what no flag sets fits the data, and rank 0 says why."""
    recipe, start, _ = chosen_start(arguments)
    if recipe != "own":
        return config
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    given = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    config, lines = own.fit(config, start, given, open_index(config.loader), ranks)
    if distributed.rank() == 0:
        print(*lines, sep="\n", flush=True)
    return config


def main(arguments: list[str]) -> None:
    pretrain(parse(arguments), lambda config, ranks: fitted(config, arguments, ranks), guard.ignore_stops)


def pretrain(
    config: Config, fit: Callable[[Config, int], Config] = lambda config, ranks: config,
    when_stopped: Callable[[], None] = lambda: None,
) -> bool:  # fmt: skip
    """Train as `config` says, from the newest checkpoint in its run_dir, if any; whether a signal or Ctrl-C stopped it.
    `fit(config, ranks)` has the last word on settings. The log is run_dir/metrics.jsonl. ValueError before any work."""
    device = distributed.start()
    try:
        world = distributed.world_size()
        config = resolve(fit(config, world), world)
        feed = feed_of(config)
        with distributed.hold(config.run.run_dir, "--run-dir"):
            return run(config, feed, device, when_stopped)
    finally:
        distributed.stop()


def feed_of(config: Config) -> Feed:
    """The work of this rank, for a resolved `config`."""
    return Feed(
        open_index(config.loader), config.method.view_specs(config.views), config.method.mosaics(),
        batch_size=config.optim.batch_size, seed=config.run.seed, rank=distributed.rank(), world_size=distributed.world_size(),
        substitute=config.loader.on_bad_sample == "substitute", memory=config.method.memory(config.optim.batch_size),
    )  # fmt: skip


def run(config: Config, feed: Feed, device: torch.device, when_stopped: Callable[[], None]) -> bool:
    """From the newest checkpoint, if any, to the end or a stop, of which it returns True; the run folder is this process's own."""
    training = train.set_up(config, device, feed.index.fingerprint)
    total_steps = config.optim.epochs * feed.steps_per_epoch
    total_steps = min(total_steps, config.optim.max_steps or total_steps)
    if training.step >= total_steps:
        print(f"{config.run.run_dir} is finished: step {training.step} of {total_steps}.")
        return False
    say = print if distributed.rank() == 0 else lambda _: None
    batches = TrainingBatches(
        feed, config.loader, say, device=device, dtype=training.precision.pixel_dtype, start_step=training.step,
        total_steps=total_steps,
    )  # fmt: skip
    with contextlib.closing(batches) as loader:
        stopped = train.train(training, loader, feed.steps_per_epoch, total_steps, loader.read, knn_monitor(training))
        if stopped:
            when_stopped()
        return stopped


def knn_monitor(training: train.Training) -> Callable | None:
    """`train.train`'s, if `eval_data` is set; the sentence about data that won't do comes at once."""
    config, device = training.config, training.device
    if config.run.eval_data is None:
        return None
    data = local_copy(config.run.eval_data, config.loader.cache_dir, config.loader.cache_gb)
    views = LabelledViews(
        data, config.views.view_size, 64 * distributed.world_size(), threads=config.loader.threads,
        device=device, dtype=training.precision.pixel_dtype, rank=distributed.rank(), world_size=distributed.world_size(),
        limit=config.run.eval_pictures,
    )  # fmt: skip

    def evaluate(leave_off: Callable[[], bool]) -> dict[str, float]:
        amp_dtype = training.precision.autocast_dtype
        with contextlib.closing(views.center_crops()) as crops:
            batches = itertools.takewhile(lambda _: not leave_off(), crops)
            return {"knn": knn.monitor(training.method.backbone, batches, device, amp_dtype)}

    return evaluate


if __name__ == "__main__":
    guard.run_script("train.py", lambda: main(sys.argv[1:]))

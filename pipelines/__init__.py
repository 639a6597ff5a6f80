"""Shards in, batches on the device out: engines that execute the same plan, behind one function.

    feed = Feed(open_index(loader), views, mosaics, batch_size=256, seed=0)
    with open_pipeline(feed, loader, total_steps=1000) as pipeline:
        for step, batch in zip(range(1000), pipeline): ...

An engine is imported when it is asked for, so an installation needs only those that it uses.
"""

import importlib

import torch

from inscon import guard
from inscon.config import LoaderConfig
from pipelines.feed import Feed, color_on_host
from pipelines.finish import Finish
from pipelines.prefetch import Pipeline, StageClock

ENGINES = {"dali": "DaliEngine", "ffcv": "FfcvEngine", "reference": "ReferenceEngine", "synthetic": "SyntheticEngine"}
"""A module of this package -> its `pipelines.feed.Engine`."""


def open_pipeline(
    feed: Feed, loader: LoaderConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    start_step: int = 0, total_steps: int,
) -> Pipeline:  # fmt: skip
    """Batches of global steps `start_step` to `total_steps` - 1, which run on over the epochs, ready for the model.

    Args:
        feed: what is made, of which data, by which rank.
        loader: with which engine, a key of `ENGINES`, and how.
        device, dtype: of the pixels. Boxes come as float32 on `device`, sample ids as int64 on the CPU.

    Raises ValueError, in one sentence with the remedy, for an engine that does not exist or is not installed, and, while
    iterating, for a sample that changed after it was packed or cannot be decoded; MemoryError where memory runs out,
    TimeoutError where a stage hangs.
    """
    if loader.pipeline not in ENGINES:
        raise ValueError(f'there is no pipeline "{loader.pipeline}"; set --pipeline to one of: {", ".join(ENGINES)}')
    if not 0 <= start_step <= total_steps:
        raise ValueError(f"start_step must lie in 0..{total_steps}, the total of steps. Found: {start_step}")
    try:
        engine_class = getattr(importlib.import_module(f"pipelines.{loader.pipeline}"), ENGINES[loader.pipeline])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("nvidia", "numba"):
            raise
        raise ValueError(
            f"the pipeline {loader.pipeline} needs the package {error.name}, which is not installed: "
            "pip install 'inscon[dali]', or set --pipeline reference"
        ) from None
    device, clock = torch.device(device), StageClock()
    with guard.say_if_long(f"the pipeline {loader.pipeline} to start; the first time, kernels are compiled"):
        finish = Finish(feed, device, dtype, color_on_host(loader, device, feed.views))
        engine = engine_class(feed, loader, range(start_step, total_steps), finish, clock)
    return Pipeline(
        finish.batches(engine, clock), engine, clock, depth=None if engine.works_ahead else loader.prefetch, device=device,
        timeout_s=loader.stall_timeout,
    )  # fmt: skip

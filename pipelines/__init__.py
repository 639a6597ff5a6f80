"""Shards in, batches on the device out: engines that execute the same plan, behind one function.

    with open_pipeline("dali", config=config, total_steps=1000) as pipeline:
        for step, batch in zip(range(1000), pipeline): ...

An engine is imported when it is asked for, so an installation needs only those that it uses.
"""

import importlib
from collections.abc import Callable, Sequence

import torch

from inscon.config import Config
from pipelines.feed import Feed, Pipeline

ENGINES = {
    "dali": "pipelines.dali:open_dali",
    "ffcv": "pipelines.ffcv:open_ffcv",
    "reference": "pipelines.reference:open_reference",
    "synthetic": "pipelines.synthetic:open_synthetic",
}
"""Engine name -> "module:function", all with the arguments of `open_pipeline`."""
EXTRAS = {"nvidia": "dali", "numba": "dali"}
"""Package that may be missing -> the extra of this project that installs it."""


def check_engine(name: str) -> None:
    """ValueError for a name that is none of ENGINES'."""
    if name not in ENGINES:
        raise ValueError(f'there is no pipeline "{name}"; set --pipeline to one of: {", ".join(ENGINES)}')


def open_pipeline(
    name: str,
    *,
    config: Config,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    start_step: int = 0,
    total_steps: int,
    bad_samples: Sequence[int] = (),
    feeds: Callable[..., Feed] | None = None,
) -> Pipeline:
    """Batches of global steps `start_step` to `total_steps` - 1, which run on over the epochs, ready for the model.

    Args:
        name: a key of `ENGINES`.
        config: resolved (`inscon.config.resolve`) for `world_size` ranks.
        rank, world_size: this process among those that share the batch.
        device, dtype: of the pixels. Boxes come as float32 on `device`, sample ids as int64 on the CPU.
        bad_samples: what `Pipeline.bad_samples` gave on all ranks when the run that goes on was stopped.
        feeds: makes the engine's feed from (config, rank, world_size, bad_samples), importable by name; None: that of training.

    Raises ValueError, in one sentence with the remedy, for an engine that does not exist or is not installed, a data set
    that is missing, damaged or smaller than a batch, and, while iterating, for a sample that
    changed after it was packed or cannot be decoded; MemoryError where memory runs out, TimeoutError where a stage hangs.
    """
    check_engine(name)
    if not 0 <= start_step <= total_steps:
        raise ValueError(f"start_step must lie in 0..{total_steps}, the total of steps. Found: {start_step}")
    module, function = ENGINES[name].split(":")
    try:
        open_engine = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        raise ValueError(
            f"the pipeline {name} needs the package {error.name}, which is not installed: "
            f"pip install 'inscon[{EXTRAS[package]}]', or set --pipeline reference"
        ) from None
    return open_engine(
        config=config,
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        dtype=dtype,
        start_step=start_step,
        total_steps=total_steps,
        bad_samples=tuple(bad_samples),
        **({} if feeds is None else {"feeds": feeds}),
    )

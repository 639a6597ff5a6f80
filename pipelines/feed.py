"""What every engine is fed with and what it hands out: the work of a step, the batch made from it, the open pipeline.

`Feed.work(step)` joins the data set's index, the order of samples and the plan; an engine makes pixels of it, and
`make_batch` makes those a `Batch`. `Pipeline` is what `open_pipeline` returns, for every engine.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data_prep.index import DatasetIndex, ShardError
from inscon.batch import Batch, View
from inscon.config import Config
from inscon.mosaic import TILES_PER_CANVAS, assemble
from inscon.plan import Plans, ViewPlan, plan_views
from inscon.sampling import EpochOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one rank has to make for one step."""

    step: int
    """Global step, counted over all epochs."""
    epoch: int
    sample_ids: np.ndarray
    """[B] int64."""
    sizes: np.ndarray
    """[B 2] int64, (height, width) of each source image in px, as the index has them."""
    plans: Plans

    @property
    def views(self) -> tuple[ViewPlan, ...]:
        """The plans of the views to be made: query, key, and the third one if the mosaic takes it."""
        return tuple(plan for plan in (self.plans.query, self.plans.key, self.plans.tile) if plan is not None)

    def rows(self) -> np.ndarray:
        """[B V 16] float32: `ViewPlan.rows` of all views of each sample."""
        return np.stack([plan.rows() for plan in self.views], 1)


class Feed:
    """The work of any step of this rank: a pure function of the step, so it can be asked in any order and any process.

    Args:
        config: resolved for this number of ranks.
        index: an object with `len()` and `sizes(ids)`; in general a `DatasetIndex`.
        rank, world_size: this process among those that share the batch.

    Raises ValueError if the data set is smaller than one batch, or the batch per rank does not fill its mosaics.
    """

    def __init__(self, config: Config, index, rank: int, world_size: int):
        self.index, self.config, self.rank, self.world_size = index, config, rank, world_size
        self.order = EpochOrder(len(index), config.optim.batch_size, config.run.seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.batch_size = len(self.order.rank_batch(0, rank, world_size))
        self.wants_mosaic = "multi" in config.model.heads
        self.num_views = 3 if self.wants_mosaic and config.views.tiles_from == "third" else 2
        if self.wants_mosaic and self.batch_size % TILES_PER_CANVAS:
            raise ValueError(
                f"a mosaic takes {TILES_PER_CANVAS} images, so batch_size must be a multiple of {TILES_PER_CANVAS} times "
                f"{world_size} rank(s). Found: {config.optim.batch_size}; set --batch-size {4 * world_size} or a multiple"
            )

    def work(self, step: int) -> Work:
        """What this rank makes at global step `step`."""
        epoch = self.order.epoch_of(step)
        ids = self.order.rank_batch(step, self.rank, self.world_size)
        sizes = self.index.sizes(ids)
        plans = plan_views(self.config.run.seed, epoch, ids, sizes, self.config.views)
        if self.num_views == 2 and plans.tile is not None:
            plans = Plans(query=plans.query, key=plans.key, tile=None)
        return Work(step=step, epoch=epoch, sample_ids=ids, sizes=sizes, plans=plans)


def open_feed(config: Config, rank: int, world_size: int) -> Feed:
    """The feed of a data set on disk. ValueError, with the remedy, where there is none."""
    if config.loader.data is None:
        raise ValueError(
            "loader.data is not set: give the folder that data_prep/make_dali.py wrote, --data SHARDS, or take "
            "--pipeline synthetic, which needs none"
        )
    return Feed(config, DatasetIndex.open(config.loader.data), rank, world_size)


def make_batch(
    work: Work, pixels: list[Float[Tensor, "B 3 S S"]], feed: Feed, mosaic: Float[Tensor, "M 3 C C"] | None = None
) -> Batch:
    """A `Batch` from the finished `pixels` of `work.views`, on their device; lays the mosaic unless it is given."""
    device = pixels[0].device
    if feed.wants_mosaic and mosaic is None:
        mosaic = assemble(pixels[2] if feed.num_views == 3 else pixels[0], feed.config.views.tile)
    query, key = (
        View(pixels=made, crop_box=to_device(plan.crop_box, device), flipped=to_device(plan.flipped, device))
        for made, plan in zip(pixels[:2], work.views[:2], strict=True)
    )
    return Batch(query=query, key=key, mosaic=mosaic, sample_ids=torch.from_numpy(work.sample_ids))


def check_sizes(index: DatasetIndex, work: Work, decoded: np.ndarray) -> None:
    """ShardError if a picture is not of the size its boxes were drawn for. `decoded` [B 2]: height, width in px."""
    wrong = np.flatnonzero((decoded != work.sizes).any(1))
    if len(wrong):
        (height, width), (stored_height, stored_width) = decoded[wrong[0]], work.sizes[wrong[0]]
        raise ShardError(
            f"{index.describe(work.sample_ids[wrong[0]])} decodes to {height}x{width} px (height x width) where the index says "
            f"{stored_height}x{stored_width}: copy the shards again or rerun data_prep/make_dali.py"
        )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on `device`; the copy is queued, the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # A copy from pageable memory would wait for the device; PyTorch keeps the pinned block until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def threads_per_rank(asked: int | None) -> int:
    """`asked`, or the cores this process may use divided by the ranks on this machine (torchrun's LOCAL_WORLD_SIZE)."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


class Pipeline:
    """Batches of one rank from `start_step` to `total_steps`, once through; a context manager that ends the engine.

    `batches` yields the batches, `end` stops the engine and frees what it holds, `description` is one line for the log.
    """

    def __init__(self, batches: Iterator[Batch], end: Callable[[], None], steps_per_epoch: int, description: str):
        self._batches, self._end, self._description = batches, end, description
        self.steps_per_epoch = steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def describe(self) -> str:
        """Engine, decode device, threads, prefetch and data, in one line."""
        return self._description

    def close(self) -> None:
        """Stop threads and workers, free buffers; the second call does nothing."""
        end, self._end = self._end, None
        if end is not None:
            self._batches.close()
            end()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

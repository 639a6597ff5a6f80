"""What every engine is fed with and what it hands out: the work of a step, the batch made from it, the open pipeline.

`Feed.work(step)` joins the data set's index, the order of samples and the plan; `Feed.load(step)` adds the bytes; an engine
makes pixels of them, and `make_batch` makes those a `Batch`. `Pipeline` is what `open_pipeline` returns, for every engine.
"""

import atexit
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator
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
from pipelines.prefetch import Ahead
from pipelines.spares import Spares

LOG = logging.getLogger(__name__)
PLANNED = 256
"""Images that are planned at once, if a batch has fewer."""


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
    substituted: int
    """How many of the samples stand in for bad ones."""

    @property
    def views(self) -> tuple[ViewPlan, ...]:
        """The plans of the views to be made: query, key, and the third one if the mosaic takes it; for evaluation one alone."""
        return tuple(plan for plan in (self.plans.query, self.plans.key, self.plans.tile) if plan is not None)

    def rows(self) -> np.ndarray:
        """[B V 16] float32: `ViewPlan.rows` of all views of each sample."""
        return np.stack([plan.rows() for plan in self.views], 1)


class Feed:
    """The work of any step of this rank: a pure function of the step and of the samples known to be bad, so it can be asked in
    any order and any process.

    Args:
        config: resolved for this number of ranks.
        index: an object with `len()` and `sizes(ids)`; in general a `DatasetIndex`.
        rank, world_size: this process among those that share the batch.

    Raises ValueError if the data set is smaller than one batch, or the batch per rank does not fill its mosaics.
    """

    def __init__(self, config: Config, index, rank: int, world_size: int):
        self.index, self.config, self.rank, self.world_size = index, config, rank, world_size
        self.order = EpochOrder(len(index), config.optim.batch_size, config.run.seed, config.loader.shuffle_window)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.batch_size = len(self.order.rank_batch(0, rank, world_size))
        self.wants_mosaic = "multi" in config.model.heads
        self.num_views = 3 if self.wants_mosaic and config.views.tiles_from == "third" else 2
        self.bad: set[int] = set()
        """Ids of samples that cannot be used, as far as they have been met; others stand in for them."""
        queue_steps = (config.model.queue_size or 0) // config.optim.batch_size
        self._spares = Spares(self.order, world_size, queue_steps)
        self._places = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        self._reading_ahead = False
        self._planned: dict[int, Work] = {}
        self._planned_with: set[int] = set()
        if self.wants_mosaic and self.batch_size % TILES_PER_CANVAS:
            raise ValueError(
                f"a mosaic takes {TILES_PER_CANVAS} images, so batch_size must be a multiple of {TILES_PER_CANVAS} times "
                f"{world_size} rank(s). Found: {config.optim.batch_size}; set --batch-size {4 * world_size} or a multiple"
            )

    def work(self, step: int) -> Work:
        """What this rank makes at global step `step`. ShardError where nobody is left to stand in for a bad sample."""
        if step not in self._planned or self._planned_with != self.bad:
            self._plan_from(step)
        return self._planned[step]

    def plan(self, epoch: int, sample_ids: np.ndarray, sizes: np.ndarray) -> Plans:
        """What is made of some samples in an epoch; `sizes` as in `Work`."""
        plans = plan_views(self.config.run.seed, epoch, sample_ids, sizes, self.config.views)
        return plans if self.num_views == 3 else dataclasses.replace(plans, tile=None)

    def _plan_from(self, step: int) -> None:
        """Plan some steps of an epoch at once: for 256 images that costs a quarter, per image, of what it costs for 32."""
        epoch = self.order.epoch_of(step)
        stop = min(step + max(PLANNED // self.batch_size, 1), (epoch + 1) * self.steps_per_epoch)
        ids = self.order.rank_batches(range(step, stop), self.rank, self.world_size)
        substituted = []
        for of_step, place in zip(ids, range(step, stop), strict=True):
            try:
                stand_ins = self._spares.stand_ins(place, self._places, self.bad) if self.bad else {}
            except ShardError:
                if place == step:
                    raise
                break  # which is for that step to raise
            for where, sample_id in stand_ins.items():
                of_step[where - self._places.start] = sample_id
            substituted.append(len(stand_ins))
        ids = ids[: len(substituted)]
        sizes = self.index.sizes(ids.ravel())
        plans = self.plan(epoch, ids.ravel(), sizes)
        self._planned, self._planned_with = {}, set(self.bad)
        for number, stood_in in enumerate(substituted):
            own = slice(number * self.batch_size, (number + 1) * self.batch_size)
            self._planned[step + number] = Work(
                step=step + number,
                epoch=epoch,
                sample_ids=ids[number],
                sizes=sizes[own],
                plans=plans[own],
                substituted=stood_in,
            )

    def load(
        self, step: int, memory: np.ndarray | None = None, pixels: bool = False
    ) -> tuple[Work, list[np.ndarray], np.ndarray]:
        """The work of a step; the JPEG of each of its samples, compared with the checksums of the index; what they lie in.

        `memory` [n] uint8 is overwritten; where it is None or too small, other memory is taken. Samples stored as raw pixels
        come as these if `pixels` will do. A sample that cannot be read goes to `reject`: ShardError, or another one in its place.
        """
        while True:
            work = self.work(step)
            ends = np.cumsum(self.index.records(work.sample_ids)["byte_count"].astype(np.int64))
            if memory is None or len(memory) < ends[-1]:
                memory = np.empty(ends[-1] * 5 // 4, np.uint8)
            starts, jpegs = [0, *ends[:-1]], []
            try:
                for sample_id, start in zip(map(int, work.sample_ids), starts, strict=True):
                    jpegs.append(self.index.read(sample_id, memory[start:], pixels=pixels))
            except ShardError as error:
                self.reject(sample_id, error)
            else:
                return work, jpegs, memory

    def expect(self, step: int) -> None:
        """Let the system read ahead what this rank will load for a step; with a shuffle window, what all will load later."""
        runs = self.order.runs(step, starting=not self._reading_ahead)
        self._reading_ahead = True
        for run in runs:
            self.index.expect(np.asarray(run))
        if not runs:
            planned = self._planned.get(step)
            ids = planned.sample_ids if planned else self.order.rank_batch(step, self.rank, self.world_size)
            self.index.expect(ids)

    def reject(self, sample_id: int, error: ShardError) -> None:
        """Raise `error`, or, with `on_bad_sample` = substitute, say it and let others stand in for the sample from now on."""
        if self.config.loader.on_bad_sample == "fail":
            raise error
        self.bad.add(int(sample_id))
        LOG.warning("%s. Another sample stands in for it.", str(error).rstrip("."))


def open_feed(config: Config, rank: int, world_size: int, bad_samples: Iterable[int] = ()) -> Feed:
    """The feed of a data set on disk. ValueError, with the remedy, where there is none.

    `bad_samples` are ids of samples known to be bad; with `on_bad_sample` = fail they are tried again, as after a repair.
    """
    if config.loader.data is None:
        raise ValueError(
            "loader.data is not set: give the folder that data_prep/make_dali.py or make_ffcv.py wrote, --data SHARDS, or take "
            "--pipeline synthetic, which needs none"
        )
    feed = Feed(config, DatasetIndex.open(config.loader.data), rank, world_size)
    if config.loader.on_bad_sample == "substitute":
        feed.bad.update(bad_samples)
    return feed


def make_batch(
    work: Work, pixels: list[Float[Tensor, "B 3 S S"]], feed: Feed, mosaic: Float[Tensor, "M 3 C C"] | None = None
) -> Batch:
    """A `Batch` from the finished `pixels` of `work.views`, on their device; lays the mosaic unless it is given."""
    device = pixels[0].device
    if feed.wants_mosaic and mosaic is None:
        mosaic = assemble(pixels[2] if feed.num_views == 3 else pixels[0], feed.config.views.tile)
    views = [
        View(pixels=made, crop_box=to_device(plan.crop_box, device), flipped=to_device(plan.flipped, device))
        for made, plan in zip(pixels[:2], work.views[:2], strict=True)
    ]
    # Where one view is made of each sample (pipelines.evaluation), it is both.
    return Batch(query=views[0], key=views[-1], mosaic=mosaic, sample_ids=torch.from_numpy(work.sample_ids))


class Refusal(Exception):
    """A sample that cannot be used: its id, and the ShardError that says so."""


def undecodable(index: DatasetIndex, sample_id: int, reason: str, decoder: str) -> ShardError:
    """The sentence about a picture whose bytes are as they were packed and which `decoder` cannot decode."""
    return ShardError(
        f"{index.describe(sample_id)} cannot be decoded by {decoder} ({reason}): rerun {index.packer}, which leaves such "
        "pictures out"
    )


def not_its_pixels(index: DatasetIndex, sample_id: int) -> str | None:
    """Why the raw pixels of a sample are no picture of its size, or None if they are."""
    [record] = index.records([sample_id])
    height, width, byte_count = (int(record[name]) for name in ("height", "width", "byte_count"))
    return None if byte_count == 3 * height * width else f"{byte_count} bytes are not {height}x{width} px of 3 bytes"


def wrong_size(index: DatasetIndex, work: Work, first: int, decoded: np.ndarray) -> tuple[int, ShardError] | None:
    """A picture that is not of the size its boxes were drawn for, by id and in a sentence, or None.

    `decoded` [n 2]: height, width in px of pictures `first` to `first + n - 1` of `work`.
    """
    expected = work.sizes[first : first + len(decoded)]
    wrong = np.flatnonzero((decoded != expected).any(1))
    if not len(wrong):
        return None
    (height, width), (stored_height, stored_width) = decoded[wrong[0]], expected[wrong[0]]
    sample_id = int(work.sample_ids[first + wrong[0]])
    return sample_id, ShardError(
        f"{index.describe(sample_id)} decodes to {height}x{width} px (height x width) where the index says "
        f"{stored_height}x{stored_width}: copy the shards again or rerun {index.packer}"
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on `device`; the copy is queued, the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # A copy from pageable memory would wait for the device; PyTorch keeps the pinned block until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def color_on_host(config: Config, device: torch.device) -> bool:
    """Whether views leave the host finished, or as crops that `pipelines.color` finishes on `device`."""
    return config.loader.color == "host" or (config.loader.color == "auto" and device.type == "cpu")


def threads_per_rank(asked: int | None) -> int:
    """`asked`, or the cores this process may use divided by the ranks on this machine (torchrun's LOCAL_WORLD_SIZE)."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


class Pipeline:
    """Batches of one rank from `start_step` to `total_steps`, once through; a context manager that ends the engine.

    Args:
        ahead: yields the batches; closed first.
        end: stops the engine and frees what it holds.
        feed: what the engine is fed with.
        description: one line for the log.
        read: what the engine measures of itself.
    """

    def __init__(
        self,
        ahead: "Ahead | Iterator[Batch]",
        end: Callable[[], None],
        feed: Feed,
        description: str,
        read: Callable[[], dict[str, float]] = dict,
    ):
        self._ahead, self._end, self._feed, self._description, self._read = ahead, end, feed, description, read
        self.steps_per_epoch = feed.steps_per_epoch
        # For whoever leaves without closing: DALI must not meet threads that still run when the interpreter ends.
        atexit.register(self.close)

    def __iter__(self) -> Iterator[Batch]:
        return self._ahead

    def describe(self) -> str:
        """Engine, decode device, threads, prefetch, data, and the order if it is not one shuffle, in one line."""
        order = self._feed.order.describe()
        return f"{self._description}; {order}" if order else self._description

    def read(self) -> dict[str, float]:
        """Since the last reading: how ready the queues were and what each stage took, all names beginning with loader_."""
        return (self._ahead.read() if isinstance(self._ahead, Ahead) else {}) | self._read()

    def bad_samples(self) -> list[int]:
        """Ids of the samples that cannot be used, as far as this rank has met them; for the checkpoint."""
        return sorted(self._feed.bad)

    def close(self) -> None:
        """Stop threads and workers, free buffers; the second call does nothing."""
        end, self._end = self._end, None
        if end is not None:
            atexit.unregister(self.close)
            self._ahead.close()
            end()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

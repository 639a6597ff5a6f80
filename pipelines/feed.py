"""What every engine is fed with: the work of a step, its bytes, and what to do about a sample that cannot be used.

`Feed.work(step)` joins the data set's index, the order of samples and the plan; `Feed.load(step)` adds the bytes; an `Engine`
makes pixels of them, and pipelines/finish.py makes those a `Batch`.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.index import DatasetIndex, ShardError
from data_prep.store import local_copy
from inscon.config import LoaderConfig
from inscon.plan import BatchPlan, Mosaics, ViewSpec, check_views, plan_views
from inscon.sampling import EpochOrder

LOG = logging.getLogger(__name__)


class Work(NamedTuple):
    """What one rank has to make for one step."""

    step: int  # global step, counted over all epochs
    sample_ids: np.ndarray  # [B] int64
    sizes: np.ndarray  # [B 2] int64, (height, width) of each source image in px, as the index has them
    plan: BatchPlan
    substituted: int  # how many of the samples stand in for bad ones

    def rows(self) -> np.ndarray:
        """[B R ROW] float32: `ViewPlan.rows` of all views of each sample, one after the other."""
        return np.concatenate([plan.rows() for plan in self.plan.views.values()], 1)


class Feed:
    """The work of any step of this rank: a pure function of the step and of which samples are bad, so it can be asked in any order
    and any process; it may be pickled.

    Args:
        index: an object with `len()` and `sizes(ids)`; in general a `DatasetIndex`.
        views: what is made of every image.
        mosaics: which of them lies on mosaics.
        batch_size: images per step over all ranks.
        seed: of order and plan.
        rank, world_size: this process among those that share the batch.
        substitute: let other samples stand in for bad ones; else a bad one raises.
        memory: steps during which an image should not be seen again, as its key is in a queue: a stand-in that is, is told.

    Raises ValueError if the data set is smaller than one batch, or the batch per rank does not fill its mosaics.
    """

    def __init__(
        self, index, views: Sequence[ViewSpec], mosaics: Mosaics | None = None, *, batch_size: int, seed: int,
        rank: int = 0, world_size: int = 1, substitute: bool = False, memory: int = 0,
    ):  # fmt: skip
        check_views(views, mosaics)
        self.index, self.views, self.mosaics, self.seed = index, tuple(views), mosaics, seed
        self.rank, self.world_size = rank, world_size
        self.order = EpochOrder(len(index), batch_size, seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.batch_size = len(self.order.rank_batch(0, rank, world_size))  # of this rank
        self._substitute, self._memory = substitute, memory
        self._bad: set[int] = set()
        if mosaics is not None and self.batch_size % 4:
            raise ValueError(
                f"a mosaic takes 4 images, so batch_size must be a multiple of 4 times {world_size} rank(s). Found: {batch_size}; "
                f"set --batch-size {4 * world_size} or a multiple"
            )

    def work(self, step: int) -> Work:
        """What this rank makes at global step `step`. ShardError where nobody is left to stand in for a bad sample of it."""
        ids = self.order.rank_batch(step, self.rank, self.world_size)
        substituted = self._stand_in(step, ids)
        sizes = self.index.sizes(ids)
        plan = plan_views(self.seed, step // self.steps_per_epoch, ids, sizes, self.views)
        return Work(step, ids, sizes, plan, substituted)

    def _stand_in(self, step: int, sample_ids: np.ndarray) -> int:
        """Replace the bad ones of a step's samples, in place, each by the first good one of `EpochOrder.stand_ins`; how many."""
        bad = [place for place, sample_id in enumerate(sample_ids.tolist()) if sample_id in self._bad]
        for place in bad:
            candidates = self.order.stand_ins(step, self.rank * self.batch_size + place)
            other, away = next(((other, away) for other, away in candidates if other not in self._bad), (None, 0))
            if other is None:
                raise ShardError(
                    f"no sample is left to stand in for {self.index.describe(int(sample_ids[place]))}: pack the set again without "
                    "the bad ones, or set a smaller --batch-size"
                )
            if abs(away) <= self._memory:
                said = "The stand-in of step %d is seen again %d steps away, while its key is queued."
                LOG.warning(said, step, abs(away))
            sample_ids[place] = other
        return len(bad)

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
            places = zip(work.sample_ids.tolist(), [0, *ends])
            try:
                stored = [read(self.index, sample_id, memory[start:], pixels) for sample_id, start in places]
                return work, stored, memory
            except Refusal as refusal:
                self.reject(*refusal.args)

    def expect(self, step: int) -> None:
        """Let the system read ahead what this rank will load for a step."""
        self.index.expect(self.order.rank_batch(step, self.rank, self.world_size))

    def reject(self, sample_id: int, error: ShardError) -> None:
        """Raise `error`; or, where others may stand in, say it and let them do so for the sample from now on."""
        if not self._substitute:
            raise error
        self._bad = self._bad | {int(sample_id)}  # not that of a copy, which a trial has
        LOG.warning("%s. Another sample stands in for it.", str(error).rstrip("."))


class MadeUpIndex:
    """What order and plan ask of a `DatasetIndex`, for batches of noise: as long as ImageNet-1k, of typical sizes."""

    fingerprint = "synthetic"
    path = "noise"
    _SIZES = np.array([(375, 500), (333, 500), (500, 375), (500, 333), (400, 400), (768, 1024), (180, 240)])

    def __len__(self) -> int:
        return 1_281_167

    def sizes(self, sample_ids: np.ndarray) -> np.ndarray:
        return self._SIZES[np.asarray(sample_ids) % len(self._SIZES)]


def open_index(loader: LoaderConfig) -> "DatasetIndex | MadeUpIndex":
    """The data set of a run. ValueError, with the remedy, where there is none."""
    if loader.pipeline == "synthetic":
        return MadeUpIndex()
    if loader.data is None:
        raise ValueError(
            "loader.data is not set: give the folder that data_prep/make_dali.py or make_ffcv.py wrote, --data SHARDS, or take "
            "--pipeline synthetic, which needs none"
        )
    return DatasetIndex.open(local_copy(loader.data, loader.cache_dir, loader.cache_gb))


class Engine:
    """Makes the pixels of steps. `open_pipeline` makes one of a feed, settings, a range of steps, a `Finish` and a `StageClock`."""

    works_ahead = False  # whether it needs no thread that asks for its steps before they are wanted
    has_stages = True  # whether it reads, decodes and finishes, so that there is something to tell
    description: str  # engine, decode device, threads, prefetch and data, one line for the log

    def steps(self) -> Iterator[tuple[Work, tuple[dict[str, Tensor], Tensor | None]]]:
        """The work of each step, its views [B P S S 3] by name, and its mosaics [M 2S 2S 3] where they are laid already."""
        raise NotImplementedError

    def end(self) -> None:
        """Stop threads, free what is held."""

    def figures(self) -> dict[str, float]:
        """What it measures beside what it tells its `StageClock`."""
        return {}


class Refusal(Exception):
    """A sample that cannot be used: its id, and the ShardError that says so."""


def read(index: DatasetIndex, sample_id: int, memory: np.ndarray | None = None, pixels: bool = True) -> np.ndarray:
    """`index.read`; Refusal where it does not go well."""
    try:
        return index.read(sample_id, memory, pixels=pixels)
    except ShardError as error:
        raise Refusal(sample_id, error) from None


def undecodable(index: DatasetIndex, sample_id: int, reason: str, decoder: str) -> Refusal:
    """Of a picture whose bytes are as they were packed and which `decoder` cannot decode."""
    return Refusal(sample_id, ShardError(
        f"{index.describe(sample_id)} cannot be decoded by {decoder} ({reason}): rerun {index.manifest.packer}, which leaves such "
        "pictures out"
    ))  # fmt: skip


def wrong_size(index: DatasetIndex, work: Work, first: int, decoded: np.ndarray) -> None:
    """Refusal of the first picture that is not of the size its boxes were drawn for.

    `decoded` [n 2]: height, width in px of pictures `first` to `first + n - 1` of `work`.
    """
    expected = work.sizes[first : first + len(decoded)]
    for wrong in np.flatnonzero((decoded != expected).any(1)):
        (height, width), (stored_height, stored_width) = decoded[wrong], expected[wrong]
        sample_id = int(work.sample_ids[first + wrong])
        raise Refusal(sample_id, ShardError(
            f"{index.describe(sample_id)} decodes to {height}x{width} px (height x width) where the index says "
            f"{stored_height}x{stored_width}: copy the shards again or rerun {index.manifest.packer}"
        ))  # fmt: skip


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on `device`; the copy is queued, the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # A copy from pageable memory would wait for the device; PyTorch keeps the pinned block until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def color_on_host(loader: LoaderConfig, device: torch.device, views: Sequence[ViewSpec]) -> bool:
    """Whether views come colored: with RandAugment, where `loader` says so, with `auto` on a CPU, and noise, which is finished.
    Else they leave the host as crops, and `device` colors them. Whether `auto` on a GPU goes to the host is chosen before, in
    pipelines/auto.py. ValueError where RandAugment is to work on a GPU."""
    if any(spec.color.randaugment for spec in views):
        if loader.color == "device" or loader.decode == "mixed":
            raise ValueError(
                f"RandAugment works on the host. Found: color {loader.color}, decode {loader.decode}; set --color host "
                "and --decode cpu"
            )
        return True
    return loader.color == "host" or loader.pipeline == "synthetic" or (loader.color == "auto" and device.type == "cpu")


def threads_per_rank(asked: int | None) -> int:
    """`asked`, or the cores this process may use divided by the ranks on this machine (torchrun's LOCAL_WORLD_SIZE)."""
    if asked is not None:
        return asked
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)

"""Labelled views for frozen evaluation, one of each sample, from the engines that feed training: another plan, nothing else.

A center crop is a box that nothing is random about, a random crop is the query view without color; so decoding, resizing and
normalizing are those of pipelines/kernels.py and its peers, and the speed is theirs too.
"""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_prep.index import NO_LABEL, DatasetIndex
from inscon.config import LoaderConfig
from inscon.plan import NO_COLOR, BatchPlan, ViewSpec, plan_center
from pipelines import open_pipeline
from pipelines.feed import Feed, Work

Engine = Literal["auto", "dali", "ffcv", "reference"]
"""auto: ffcv for a .beton, dali for tar shards; reference where that one is not installed."""


class CenterFeed(Feed):
    """Center crops in the order of the index, once; the last sample fills up the last step."""

    def work(self, step: int) -> Work:
        ids = self._ids(step)
        sizes, [view] = self.index.sizes(ids), self.views
        plan = BatchPlan(views={view.name: plan_center(sizes, view.size)}, overlaps={})
        return Work(step=step, epoch=0, sample_ids=ids, sizes=sizes, plan=plan, substituted=0)

    def expect(self, step: int) -> None:
        self.index.expect(self._ids(step))

    def _ids(self, step: int) -> np.ndarray:
        first = (step * self.world_size + self.rank) * self.batch_size
        return np.minimum(np.arange(first, first + self.batch_size), len(self.index) - 1)


class LabelledViews:
    """A packed set with labels, to be seen one view at a time.

    Args:
        data: folder of the set.
        view_size: px, a multiple of 32.
        batch_size: over all ranks; at most the set.
        pipeline: see `Engine`.
        scale: range of a random crop's share of the image area.
        limit: how many samples `center_crops` takes at most, the first ones; packing has shuffled them.

    Raises ValueError where the set has no labels, or is smaller than a batch of random crops.
    """

    def __init__(
        self,
        data: Path,
        view_size: int,
        batch_size: int = 64,
        pipeline: Engine = "auto",
        threads: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        scale: tuple[float, float] = (0.08, 1.0),
        rank: int = 0,
        world_size: int = 1,
        labels_needed: bool = True,
        limit: int | None = None,
    ):
        self.index = DatasetIndex.open(data)
        labels = self.index.labels(range(len(self.index)))
        if labels_needed and (labels == NO_LABEL).any():
            raise ValueError(
                f"frozen evaluation needs labels. Found: none in {self.index.path}; pack a folder of class folders"
            )
        self.labels = torch.from_numpy(labels.astype(np.int64))
        """[n], of every sample."""
        self.num_classes = max(int(self.labels.max()) + 1, 0)
        self.fingerprint, self.view_size = self.index.fingerprint, view_size
        self._ranks = {"rank": rank, "world_size": world_size}
        self._device = {"device": device, "dtype": dtype}
        # Decoded on the host: trying out what is faster would take longer than many an evaluation, and beside a training.
        self._loader = LoaderConfig(
            data=Path(data), pipeline=_engine(pipeline, self.index), threads=threads, decode="cpu"
        )
        self._batch_size, self._seed = batch_size, seed
        self._count = min(limit or len(self.index), len(self.index))
        self._spec = ViewSpec(name="view", size=view_size, scale=scale, color=NO_COLOR)

    def center_crops(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels [b 3 S S] channels-last on the device, labels [b] int64 on the CPU): this rank's share of every sample, once.

        The shorter side is resized to 256/224 of S, then the center is cut, as ImageNet evaluation does.
        """
        rank, world = self._ranks["rank"], self._ranks["world_size"]
        own = max(min(self._batch_size, self._count) // world, 1)
        steps = -(-self._count // (own * world))
        with self._open(CenterFeed, own * world, 0, steps) as batches:
            for step, batch in zip(range(steps), batches):
                new = min(max(self._count - (step * world + rank) * own, 0), own)
                if new:
                    yield batch.views["view"].pixels[:new], self.labels[batch.sample_ids[:new]]

    @contextlib.contextmanager
    def random_crops(self, start_step: int, total_steps: int) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """RandomResizedCrop and flip: (pixels [B 3 S S], labels [B]) of steps `start_step` to `total_steps` - 1, whole batches."""
        with self._open(Feed, self._batch_size, start_step, total_steps) as batches:
            yield ((batch.views["view"].pixels, self.labels[batch.sample_ids]) for batch in batches)

    @property
    def steps_per_epoch(self) -> int:
        """Of random crops: what is less than a batch at an epoch's end is left out of it."""
        return len(self.index) // self._batch_size

    def _open(self, kind: type[Feed], batch_size: int, start_step: int, total_steps: int):
        feed = kind(self.index, (self._spec,), batch_size=batch_size, seed=self._seed, **self._ranks)
        return open_pipeline(feed, self._loader, start_step=start_step, total_steps=total_steps, **self._device)


def joined_classes(train: LabelledViews, val: LabelledViews) -> Tensor:
    """[labels of `val`] int64: of each the label in `train` of the class of the same name; NO_LABEL where no picture has it.

    Each set numbers its own class folders, so equal labels of two sets need not mean the same class. ValueError, with names,
    where `val` has pictures of a class that `train` has none of.
    """
    (known, wanted), (folder, own) = map(_used_classes, (train, val)), (train.index.path, val.index.path)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        kinds = ("names", "integers")
        ours, theirs = (kinds[all(name.isdecimal() for name in names_of)] for names_of in (wanted, known))
        mixed = f"; its classes are {ours}, the others {theirs}" if ours != theirs else ""
        raise ValueError(
            f"{own} has pictures of classes of which the training set {folder} has none. Found: {names}{mixed}; pack both from "
            "class folders of the same names, or with the same labels"
        )
    numbers = torch.full((max(wanted.values()) + 1,), NO_LABEL)
    for name, label in wanted.items():
        numbers[label] = known[name]
    return numbers


def _used_classes(views: LabelledViews) -> dict[str, int]:
    """Labels that occur, by name."""
    return {views.index.class_names[label]: label for label in views.labels.unique().tolist()}


def _engine(asked: Engine, index: DatasetIndex) -> str:
    """The engine that `asked` means for this set."""
    if asked != "auto":
        return asked
    name, package = ("ffcv", "ffcv") if index.manifest.container == "beton" else ("dali", "nvidia.dali")
    try:
        return name if find_spec(package) else "reference"
    except ModuleNotFoundError:  # of the parent package
        return "reference"

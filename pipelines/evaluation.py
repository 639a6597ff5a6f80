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
from data_prep.store import local_copy
from inscon.config import LoaderConfig
from inscon.plan import NO_COLOR, BatchPlan, ViewSpec, plan_center
from pipelines import open_pipeline
from pipelines.feed import Feed, Work

Engine = Literal["auto", "dali", "ffcv", "reference"]
"""auto: ffcv for a .beton, dali for tar shards; reference where that one is not installed, or with 0 threads."""


class CenterFeed(Feed):
    """Center crops of the samples `ids`, in this order, once; the last one fills up the last step."""

    ids: np.ndarray

    def work(self, step: int) -> Work:
        ids = self._of(step)
        sizes, [view] = self.index.sizes(ids), self.views
        plan = BatchPlan(views={view.name: plan_center(sizes, view.size)}, overlaps={})
        return Work(step=step, sample_ids=ids, sizes=sizes, plan=plan, substituted=0)

    def expect(self, step: int) -> None:
        self.index.expect(self._of(step))

    def _of(self, step: int) -> np.ndarray:
        return self.ids.take(range(step * self.batch_size, (step + 1) * self.batch_size), mode="clip")


class LabelledViews:
    """A packed set with labels, to be seen one view at a time.

    Args:
        data: folder of the set.
        view_size: px, a multiple of 32.
        batch_size: over all ranks; at most the set.
        scale: range of a random crop's share of the image area.
        limit: how many samples `center_crops` takes at most, the first ones; packing has shuffled them.
        like: number the classes as this set does, by their names.

    Raises ValueError where the set has no labels, or a class that `like` lacks, or where the engine needs a thread and gets none.
    """

    def __init__(
        self, data: str | Path, view_size: int, batch_size: int = 64, pipeline: Engine = "auto", threads: int | None = None,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
        scale: tuple[float, float] = (0.08, 1.0), rank: int = 0, world_size: int = 1, labels_needed: bool = True,
        limit: int | None = None, like: "LabelledViews | None" = None,
    ):  # fmt: skip
        self.index = DatasetIndex.open(local_copy(Path(data)))
        self.labels = torch.from_numpy(self.index.labels(range(len(self.index))))  # [n] int64, of every sample
        if labels_needed and (self.labels == NO_LABEL).any():
            raise ValueError(
                f"frozen evaluation needs labels. Found: none in {self.index.path}; pack a folder of class folders"
            )
        if like is not None:
            self.labels = _numbered_as(like, self)
        engine = _engine(self.index, threads) if pipeline == "auto" else pipeline
        # Decoded on the host: trying out what is faster would take longer than many an evaluation, and beside a training.
        self._loader = LoaderConfig(data=Path(data), pipeline=engine, threads=threads, decode="cpu")
        self._device = {"device": device, "dtype": dtype}
        self._ids = np.arange(len(self.index))[:limit][rank::world_size]
        self._feed = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
        self._views = (ViewSpec(name="view", size=view_size, scale=scale, color=NO_COLOR),)
        self.view_size = view_size

    def center_crops(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels [b 3 S S] channels-last on the device, labels [b] int64 on the CPU): this rank's share of every sample, once.

        The shorter side is resized to 256/224 of S, then the center is cut, as ImageNet evaluation does.
        """
        own = min(max(self._feed["batch_size"] // self._feed["world_size"], 1), len(self._ids))
        if not own:
            return
        feed, left = CenterFeed(self.index, self._views, batch_size=own, seed=0), range(len(self._ids), 0, -own)
        feed.ids = self._ids
        with open_pipeline(feed, self._loader, total_steps=len(left), **self._device) as batches:
            for new, batch in zip(left, batches):
                yield batch.views["view"].pixels[:new], self.labels[batch.sample_ids[:new]]

    @contextlib.contextmanager
    def random_crops(self, start_step: int, total_steps: int) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """RandomResizedCrop and flip: (pixels [B 3 S S], labels [B]) of steps `start_step` to `total_steps` - 1, whole batches."""
        feed = Feed(self.index, self._views, **self._feed)
        opened = open_pipeline(feed, self._loader, start_step=start_step, total_steps=total_steps, **self._device)
        with opened as batches:
            yield ((batch.views["view"].pixels, self.labels[batch.sample_ids]) for batch in batches)


def _numbered_as(train: LabelledViews, views: LabelledViews) -> Tensor:
    """Labels of `views` by the names of their classes: each set numbers its own folders, so equal labels may mean two classes."""
    known = {train.index.class_names[label]: label for label in train.labels.unique().tolist()}
    names = [views.index.class_names[label] for label in views.labels.tolist()]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(
            f"{views.index.path} has pictures of classes of which the training set {train.index.path} has none. Found: "
            f"{', '.join(unknown[:5])}; pack both from class folders of the same names, or with the same labels"
        )
    return torch.tensor([known[name] for name in names])


def _engine(index: DatasetIndex, threads: int | None) -> str:
    """What `auto` means for this set."""
    name, package = ("ffcv", "ffcv") if index.manifest.container == "beton" else ("dali", "nvidia.dali")
    with contextlib.suppress(ModuleNotFoundError):  # of the parent package
        if threads != 0 and find_spec(package):
            return name
    return "reference"

"""Batches to fine-tune on. What is drawn is decided first, from the seed and the iteration alone, and then carried out."""

import multiprocessing
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from inscon import guard
from inscon.transfer.detection.coco import CocoSet
from inscon.workers import alive, shared, worker_init

Batch = tuple[list[Tensor], list[dict]]
"""Images [3 H W] in 0..1 of any sizes, and their targets: those of `CocoSet.target`, with `short_side` in px."""
ORDER, VIEW = 0, 1
"""Streams of random numbers."""


class Draw(NamedTuple):
    """One image of a batch."""

    position: int
    """In the list of images to train on."""
    flipped: bool
    short_side: int
    """To be resized to, px."""


def decide(seed: int, iteration: int, batch_size: int, count: int, short_sides: tuple[int, ...]) -> list[Draw]:
    """The batch of an iteration out of `count` images: every epoch a new order, every image a flip and a side."""
    rng = np.random.default_rng([seed, VIEW, iteration])
    flips, sides = rng.random(batch_size) < 0.5, rng.integers(len(short_sides), size=batch_size)
    draws = []
    for place in range(batch_size):
        epoch, within = divmod(iteration * batch_size + place, count)
        draws.append(Draw(int(_order(seed, epoch, count)[within]), bool(flips[place]), short_sides[sides[place]]))
    return draws


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def flip(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Image [3 H W], boxes and masks, left to right."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - target["boxes"][:, [2, 0]]
    flipped = target | {"boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


class TrainWork(NamedTuple):
    """One batch, decided: all that a worker needs, so that nobody hands it the whole set."""

    data: CocoSet
    """The images of the batch, in its order."""
    draws: list[Draw]
    masks: bool

    def make(self) -> Batch:
        images, targets = [], []
        for place, draw in enumerate(self.draws):
            image, target = self.data.pixels(place), self.data.target(place, self.masks)
            if draw.flipped:
                image, target = flip(image, target)
            images.append(image)
            targets.append(target | {"short_side": draw.short_side})
        return images, targets


class TrainBatches:
    """Iteration -> the work of its batch."""

    def __init__(self, data: CocoSet, masks: bool, seed: int, batch_size: int, short_sides: tuple[int, ...]):
        self.data, self.masks = data, masks
        self.positions = data.trainable()
        self._asked = (batch_size, len(self.positions), short_sides)
        self._seed = seed

    def work(self, iteration: int) -> TrainWork:
        draws = decide(self._seed, iteration, *self._asked)
        return TrainWork(self.data.part([self.positions[draw.position] for draw in draws]), draws, self.masks)


class ValWork(NamedTuple):
    """One image to be judged on."""

    position: int
    data: CocoSet
    """The image alone."""

    def make(self) -> tuple[int, Tensor]:
        """Its position and pixels [3 H W]."""
        return self.position, self.data.pixels(0)


class _Makers(Dataset):
    """Work -> what it makes, or the error that a user should read."""

    def __getitem__(self, work: TrainWork | ValWork) -> tuple | Exception:
        try:
            return work.make()
        except guard.REFUSALS as error:
            # As a value, not raised: the DataLoader would bury the sentence in the worker's traceback.
            return error


def load(asked: Iterable[TrainWork | ValWork], workers: int, stall_timeout: float = 600.0) -> Iterator:
    """`work.make()` of all that is asked, in order, made by `workers` processes; 0: by this one.

    Raises what `make` raises; ChildProcessError, TimeoutError (after `stall_timeout` seconds without a batch) or MemoryError, in
    a sentence, for workers that die, hang or have no shared memory.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    loader = DataLoader(
        _Makers(), batch_size=None, sampler=asked, num_workers=workers, worker_init_fn=worker_init, collate_fn=shared,
        multiprocessing_context="forkserver" if workers else None,
    )  # fmt: skip
    for made in alive(loader, "fine-tuning", stall_timeout, "fewer --workers (0: no workers)"):
        if isinstance(made, Exception):
            raise made
        yield made


def to_device(batch: Batch, device: torch.device) -> Batch:
    images, targets = batch
    return [image.to(device) for image in images], [
        {name: value.to(device) if torch.is_tensor(value) else value for name, value in target.items()}
        for target in targets
    ]

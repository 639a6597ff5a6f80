"""Batches to fine-tune on. What is drawn is decided first, from the seed and the iteration alone, and then carried out."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from inscon.transfer.detection.coco import CocoSet

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


class TrainBatches(Dataset):
    """Iteration -> its batch."""

    def __init__(self, data: CocoSet, masks: bool, seed: int, batch_size: int, short_sides: tuple[int, ...]):
        self.data, self.masks = data, masks
        self.positions = data.trainable()
        self._asked = (batch_size, len(self.positions), short_sides)
        self._seed = seed

    def __getitem__(self, iteration: int) -> Batch:
        images, targets = [], []
        for draw in decide(self._seed, iteration, *self._asked):
            position = self.positions[draw.position]
            image, target = self.data.pixels(position), self.data.target(position, self.masks)
            if draw.flipped:
                image, target = flip(image, target)
            images.append(image)
            targets.append(target | {"short_side": draw.short_side})
        return images, targets


class ValImages(Dataset):
    """Position -> itself and the image's pixels [3 H W]."""

    def __init__(self, data: CocoSet):
        self.data = data

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        return position, self.data.pixels(position)


def load(dataset: Dataset, asked: range, workers: int) -> Iterable:
    """`dataset[k]` for every k in `asked`, in order, made by `workers` processes; 0: by this one."""
    return DataLoader(dataset, batch_size=None, sampler=asked, num_workers=workers, collate_fn=_as_it_is)


def _as_it_is(made: tuple) -> tuple:
    return made


def to_device(batch: Batch, device: torch.device) -> Batch:
    images, targets = batch
    return [image.to(device) for image in images], [
        {name: value.to(device) if torch.is_tensor(value) else value for name, value in target.items()}
        for target in targets
    ]

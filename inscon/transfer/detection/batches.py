"""Batches to fine-tune on. What is drawn is decided first, from the seed and the iteration alone, and then carried out."""

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
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


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def work_of(data: CocoSet, draws: list[Draw], masks: bool) -> Callable[[], Batch]:
    """What makes this batch, with all that a worker needs for it and no more."""
    return functools.partial(_make, data.part([draw.position for draw in draws]), draws, masks)


def _make(data: CocoSet, draws: list[Draw], masks: bool) -> Batch:
    images, targets = [], []
    for place, draw in enumerate(draws):
        image, target = data.pixels(place), data.target(place, masks)
        image, target = flip(image, target) if draw.flipped else (image, target)
        images.append(image)
        targets.append(target | {"short_side": draw.short_side})
    return images, targets


def flip(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Image [3 H W], boxes and masks, left to right."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - target["boxes"][:, [2, 0]]
    flipped = target | {"boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


class _Makers(Dataset):
    """Work -> what it makes, or the error that a user should read."""

    def __getitem__(self, work: Callable[[], object]) -> object:
        try:
            return work()
        except guard.REFUSALS as error:
            # As a value, not raised: the DataLoader would bury the sentence in the worker's traceback.
            return error


def load(asked: Iterable[Callable[[], object]], workers: int, stall_timeout: float = 600.0) -> Iterator:
    """What each of `asked` makes, in order, made by `workers` processes; 0: by this one.

    Raises what they raise; ChildProcessError, TimeoutError (after `stall_timeout` seconds without a batch) or MemoryError, in a
    sentence, for workers that die, hang or have no shared memory.
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

"""Labelled centre crops from shards, in index order: what frozen evaluation sees (PIL and torchvision, threads)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torchvision.transforms import v2

from data_prep.index import NO_LABEL, DatasetIndex
from pipelines.colour import MEAN, STD
from pipelines.reference import picture_of


def centre_crops(
    index: DatasetIndex, view_size: int, batch_size: int = 64, threads: int = 2
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels [B 3 S S] float32 channels-last, labels [B] int64), every sample once; the last batch may be smaller.

    The shorter side is resized to 256/224 of `view_size`, then the centre is cut, as ImageNet evaluation does. Raises
    ValueError if a sample has no label.
    """
    labels = torch.from_numpy(index.labels(range(len(index))))
    if (labels == NO_LABEL).any():
        raise ValueError(f"frozen evaluation needs labels. Found: none in {index.path}; pack a folder of class folders")
    transform = v2.Compose(
        [v2.Resize(view_size * 256 // 224), v2.CenterCrop(view_size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize(MEAN, STD)]
    )  # fmt: skip

    def read(sample_id: int) -> Tensor:
        return transform(picture_of(index, sample_id))

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(index), batch_size):
            ids = range(start, min(start + batch_size, len(index)))
            pixels = torch.stack(list(pool.map(read, ids)))
            yield pixels.to(memory_format=torch.channels_last), labels[start : start + len(ids)]

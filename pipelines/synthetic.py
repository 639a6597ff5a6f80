"""Ready batches on the device, no data needed: the ceiling that a loader can be measured against.

Pixels are noise, a few batches of it in turn; sample ids and boxes come from the real order and the real plan over a
made-up data set, so that overlaps, cells and losses meet realistic numbers.
"""

import numpy as np
import torch

from inscon.config import Config
from inscon.mosaic import assemble
from pipelines.feed import Feed, Pipeline, make_batch

NUM_SAMPLES = 1_281_167
"""Of the made-up data set: ImageNet-1k's, so that epochs are as long as they will be."""
SIZES = np.array([(375, 500), (333, 500), (500, 375), (500, 333), (400, 400), (768, 1024), (180, 240)])
"""(height, width), px, in turn; typical of ImageNet-1k."""
DISTINCT_BATCHES = 4


class MadeUpIndex:
    """As much of a `DatasetIndex` as the order and the plan ask for."""

    fingerprint = "synthetic"

    def __len__(self) -> int:
        return NUM_SAMPLES

    def sizes(self, sample_ids: np.ndarray) -> np.ndarray:
        return SIZES[np.asarray(sample_ids) % len(SIZES)]


def open_synthetic(
    *,
    config: Config,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    start_step: int,
    total_steps: int,
    bad_samples: tuple[int, ...] = (),
) -> Pipeline:
    """See `pipelines.open_pipeline`."""
    assert not bad_samples, "noise is never bad"
    feed = Feed(config, MadeUpIndex(), rank, world_size)
    generator = torch.Generator(device).manual_seed(config.run.seed + rank)
    ready = [_noise(feed, device, dtype, generator) for _ in range(min(DISTINCT_BATCHES, total_steps - start_step))]

    def batches():
        for step in range(start_step, total_steps):
            pixels, mosaic = ready[step % len(ready)]
            yield make_batch(feed.work(step), pixels, feed, mosaic)

    return Pipeline(batches(), ready.clear, feed, f"synthetic: {DISTINCT_BATCHES} batches of noise in turn")


def _noise(feed: Feed, device: torch.device, dtype: torch.dtype, generator: torch.Generator):
    side = feed.config.views.view_size
    shape = (feed.batch_size, side, side, 3)
    pixels = [
        torch.randn(shape, device=device, generator=generator).to(dtype).permute(0, 3, 1, 2)
        for _ in range(feed.num_views)
    ]
    mosaic = assemble(pixels[-1 if feed.num_views == 3 else 0], feed.config.views.tile) if feed.wants_mosaic else None
    return pixels, mosaic

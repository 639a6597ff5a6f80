"""Ready batches on the device, no data needed: the ceiling that a loader can be measured against.

Pixels are noise, a few batches of it in turn; sample ids and boxes come from the real order and the real plan over a
made-up data set (`pipelines.feed.MadeUpIndex`), so that overlaps, cells and losses meet realistic numbers.
"""

import torch

from inscon.config import LoaderConfig
from pipelines.feed import Feed, Pipeline
from pipelines.finish import assemble, make_batch

DISTINCT_BATCHES = 4


def open_synthetic(
    feed: Feed, loader: LoaderConfig, device: torch.device, dtype: torch.dtype, steps: range
) -> Pipeline:
    """See `pipelines.open_pipeline`."""
    generator = torch.Generator(device).manual_seed(feed.seed + feed.rank)
    ready = [_noise(feed, device, dtype, generator) for _ in range(min(DISTINCT_BATCHES, len(steps)))]

    def batches():
        for step in steps:
            pixels, mosaic = ready[step % len(ready)]
            yield make_batch(feed.work(step), pixels, feed, mosaic)

    return Pipeline(batches(), ready.clear, f"synthetic: {DISTINCT_BATCHES} batches of noise in turn")


def _noise(feed: Feed, device: torch.device, dtype: torch.dtype, generator: torch.Generator):
    pixels = {}
    for spec in feed.views:
        shape = (feed.batch_size * spec.count, spec.side, spec.side, 3)
        noise = torch.randn(shape, device=device, generator=generator)
        pixels[spec.name] = noise.to(dtype).permute(0, 3, 1, 2)
    return pixels, None if feed.mosaics is None else assemble(pixels[feed.mosaics.view], feed.mosaics)

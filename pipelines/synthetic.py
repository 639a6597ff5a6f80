"""Ready batches on the device, no data needed: the ceiling that a loader can be measured against.

Pixels are noise, a few batches of it in turn; sample ids and boxes come from the real order and the real plan over a
made-up data set (`pipelines.feed.MadeUpIndex`), so that overlaps, cells and losses meet realistic numbers.
"""

import torch

from inscon.config import LoaderConfig
from pipelines.feed import Engine, Feed
from pipelines.finish import Finish, assemble
from pipelines.prefetch import StageClock

DISTINCT_BATCHES = 4


class SyntheticEngine(Engine):
    """Batches of noise in turn."""

    has_stages = False
    description = f"synthetic: {DISTINCT_BATCHES} batches of noise in turn"

    def __init__(self, feed: Feed, loader: LoaderConfig, steps: range, finish: Finish, clock: StageClock):
        self._feed, self._steps, self._finish = feed, steps, finish
        generator = torch.Generator(finish.device).manual_seed(feed.seed + feed.rank)
        self._ready = [self._noise(generator) for _ in range(min(DISTINCT_BATCHES, len(steps)))]

    def steps(self):
        for step in self._steps:
            yield self._feed.work(step), self._ready[step % len(self._ready)]

    def _noise(self, generator: torch.Generator):
        feed, device, views = self._feed, self._finish.device, {}
        for spec in feed.views:
            shape = (feed.batch_size, spec.count, spec.side, spec.side, 3)
            views[spec.name] = torch.randn(shape, device=device, generator=generator).to(self._finish.dtype)
        if feed.mosaics is None:
            return views, None
        tiles = views[feed.mosaics.view].flatten(0, 1).permute(0, 3, 1, 2)
        return views, assemble(tiles, feed.mosaics).permute(0, 2, 3, 1)

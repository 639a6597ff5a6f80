"""What a run must know of its data before a pipeline is opened: how long an epoch is, and which data set it is."""

from dataclasses import dataclass

from inscon.config import Config
from pipelines.feed import Feed, open_feed
from pipelines.synthetic import MadeUpIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """Of the data set and batch size of one configuration."""

    steps_per_epoch: int
    fingerprint: str
    """Changes with any sample, size or order of the shards; a checkpoint remembers it."""
    left_out: int = 0
    """Pictures that were left out when the set was packed."""


def data_facts(config: Config) -> DataFacts:
    """Opens the index only. Raises ValueError for data that are missing, damaged or smaller than one batch."""
    synthetic = config.loader.pipeline == "synthetic"
    feed = Feed(config, MadeUpIndex(), 0, 1) if synthetic else open_feed(config, 0, 1)
    left_out = 0 if synthetic else sum(feed.index.manifest.rejected.values())
    return DataFacts(steps_per_epoch=feed.steps_per_epoch, fingerprint=feed.index.fingerprint, left_out=left_out)

"""Packed sets of given samples, for tests that need one without packing pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.index import JPEG, STATE_NAME, DatasetIndex
from data_prep.joining import SetFacts, join
from data_prep.shards import BetonPart, ReportBuilder, TarShard


class Sample(NamedTuple):
    content: bytes
    height: int = 10
    width: int = 20
    label: int = 0
    name: str = "a/picture.jpg"
    encoding: int = JPEG


def write_set(
    folder: Path,
    samples: Sequence[Sample],
    *,
    per_shard: int = 3,
    container: str = "tar",
    class_names: Sequence[str] = ("a", "b"),
    seed: int = 5,
    left_out: Sequence[tuple[str, str, str]] = (),
) -> DatasetIndex:
    """A set of these samples in this order; `left_out` are (name, kind, reason) of the first shard."""
    state = folder / STATE_NAME
    state.mkdir(parents=True)
    shards = [samples[start : start + per_shard] for start in range(0, len(samples), per_shard)]
    for number, members in enumerate(shards):
        shard = (TarShard if container == "tar" else BetonPart)(folder, number)
        builder = ReportBuilder(number)
        for entry in left_out if number == 0 else ():
            builder.reject(*entry)
        for sample in members:
            offset = shard.add(sample.content, sample.label)
            builder.add(**sample._asdict(), offset=offset)
        builder.report(shard.finish()).save(state)
    facts = SetFacts(container=container, class_names=class_names, shuffle_seed=seed, settings={"shard_mb": 1})
    index = join(folder, len(shards), facts)
    for path in state.iterdir():
        path.unlink()
    state.rmdir()
    return index

"""Packed sets of given samples, for tests that need one without packing pictures."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.beton import BetonFile, report_path, shard_path
from data_prep.index import JPEG, STATE_NAME, DatasetIndex
from data_prep.pack import Report, Samples, join
from data_prep.pictures import Prepared
from inscon.guard import whole_file


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
    (folder / STATE_NAME).mkdir(parents=True)
    shards = [samples[start : start + per_shard] for start in range(0, len(samples), per_shard)]
    for number, members in enumerate(shards):
        path = shard_path(folder, number)
        with whole_file(path) as file:
            written = Samples(file, number)
            for entry in left_out if number == 0 else ():
                written.report.rejected.append(dict(zip(("name", "kind", "reason"), entry)))
            for sample in members:
                picture = Prepared(sample.content, sample.encoding, sample.height, sample.width, changes=())
                written.add(picture, sample.label, sample.name)
            written.finish(path.name)
        written.report.save(report_path(folder, number))
    facts = {
        "container": container,
        "class_names": tuple(class_names),
        "shuffle_seed": seed,
        "settings": {"shard_mb": 1},
    }
    if container == "tar":
        index = join(folder, len(shards), facts, None)
    else:
        listed = len(samples) + len(left_out)
        beton = BetonFile(folder, len(shards), listed, lambda part: Report.load(report_path(folder, part)))
        beton.lay()
        index = join(folder, len(shards), facts, beton)
        beton.close()
    shutil.rmtree(folder / STATE_NAME)
    return index

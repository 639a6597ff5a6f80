"""Pack pictures into shards: tar files that any WebDataset tool reads, and an index.

    python data_prep/make_dali.py --data ~/imagenet/train --out ~/shards/train
    python data_prep/make_dali.py --data ~/ILSVRC2012_img_train.tar --out ~/shards/train
    torchrun --nnodes 4 data_prep/make_dali.py --data /nfs/train --out /nfs/shards

Sound RGB and gray JPEGs are stored byte for byte; what not every decoder reads (CMYK, PNG under a JPEG's name, EXIF
orientation, 16 bit) is encoded once as a plain JPEG. Each picture is decoded once, so that no broken one meets the
training; what is broken is left out and listed in rejected.jsonl. After a stop of any kind the same command goes on.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import DatasetIndex
from data_prep.pack import PackConfig, pack, run


@dataclass(frozen=True, kw_only=True)
class DaliConfig(PackConfig):
    """Pack pictures into tar shards and an index, for --pipeline dali and any WebDataset tool."""

    container, writer = "tar", "data_prep/make_dali.py"

    shard_mb: int = 256  # Megabytes (of 1,000,000 bytes) of source pictures per shard, on average.


def pack_folder(data: str | os.PathLike[str], out: str | os.PathLike[str], **settings) -> DatasetIndex:
    """Pack `data` into tar shards in `out` and open them; `settings` as in `DaliConfig`. ValueError with the remedy."""
    return pack(DaliConfig(data=Path(data), out=Path(out), **settings))


if __name__ == "__main__":
    run("make_dali.py", DaliConfig)

"""Pack pictures into one .beton, FFCV's format, with the same samples, order and index as make_dali.py.

    python data_prep/make_ffcv.py --data ~/imagenet/train --out ~/beton/train
    python data_prep/make_ffcv.py --data ~/shards/train --out ~/beton/train       # from a packed set: nothing is decoded
    python data_prep/make_ffcv.py --data ~/imagenet/train --out ~/beton/train400 --write-mode raw --max-resolution 400

Writes OUT/samples.beton and beside it index, names, lists and manifest. `jpg` stores sound JPEGs byte for byte, where
FFCV's own writer encodes each anew; `raw` stores pixels, about five times as many bytes at ImageNet's sizes, for
training without decoding. FFCV need not be installed.
After a stop of any kind the same command goes on.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import DatasetIndex
from data_prep.pack import PackConfig, pack, run


@dataclass(frozen=True, kw_only=True)
class BetonConfig(PackConfig):
    """Pack pictures into one .beton and an index, for --pipeline ffcv and FFCV's own Loader."""

    container, writer = "beton", "data_prep/make_ffcv.py"
    shard_mb = 128  # of pictures, that one process takes at a time; it doesn't change a byte of the beton

    write_mode: Literal["jpg", "raw"] = "jpg"  # Store JPEG files, or RGB pixels.


def pack_beton(data: str | os.PathLike[str], out: str | os.PathLike[str], **settings) -> DatasetIndex:
    """Pack `data` into a beton in `out` and open it; `settings` as in `BetonConfig`. ValueError with the remedy."""
    return pack(BetonConfig(data=Path(data), out=Path(out), **settings))


if __name__ == "__main__":
    run("make_ffcv.py", BetonConfig)

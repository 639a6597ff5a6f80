"""k nearest neighbors on the frozen features of a run, beside the same network before training.

python scripts/knn.py --run RUN_DIR --train SHARDS --val SHARDS
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.progress import track

from inscon import distributed, guard
from inscon.nn.backbones import Backbone, check_side
from inscon.precision import Precision, choose_precision
from inscon.transfer import knn
from inscon.transfer.export import any_backbone
from pipelines.evaluation import Engine, LabelledViews


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """What any evaluation of a frozen backbone has to be told."""

    checkpoint: Annotated[Path, tyro.conf.arg(aliases=("--run",))]
    """A run folder (its newest checkpoint), a checkpoint, or a file of scripts/export.py. torchrun takes --run for its own."""
    train: Path  # Labelled shards to learn from.
    val: Path  # Labelled shards to be tested on.
    view_size: int | None = None  # Side of the crops, px. None: as the run was trained.
    pipeline: Engine = "auto"  # Engine that reads the shards.
    threads: int | None = None  # Of the loader, per rank. None: its share of the cores.
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # Of the backbone; what learns on top is float32.


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FrozenConfig):
    """Frozen evaluation by nearest neighbors."""

    k: int = 200  # Neighbors that vote; at most the pictures of --train.
    batch_size: int = 64  # Pictures at once.


def open_frozen(
    config: FrozenConfig, device: torch.device, untrained: bool, seed: int = 0
) -> tuple[Backbone, dict, Precision, tuple[LabelledViews, LabelledViews]]:
    """The backbone and what is known of it, its precision, and the sets to learn from and to be tested on. ValueError where they do
    not fit each other, or the network takes no pictures of this size."""
    guard.check_ranges(config, batch_size=1, view_size=1)
    backbone, facts = any_backbone(config.checkpoint, untrained)
    side = config.view_size or facts["config"]["views"]["view_size"]
    check_side(facts["config"]["model"]["backbone"], side)
    precision = choose_precision(config.precision, device)
    settings = {
        "view_size": side, "batch_size": config.batch_size, "pipeline": config.pipeline, "threads": config.threads,
        "device": device, "dtype": precision.pixel_dtype, "seed": seed, "rank": distributed.rank(),
        "world_size": distributed.world_size(),
    }  # fmt: skip
    train = LabelledViews(config.train, **settings)
    return backbone, facts, precision, (train, LabelledViews(config.val, **settings, like=train))


def main(config: KnnConfig) -> dict[str, float]:
    """Shares of the validation pictures, 0..1, by "untrained" and "trained"."""
    device, scores = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    for name in ("untrained", "trained"):
        backbone, _, precision, sets = open_frozen(config, device, name == "untrained")
        guard.check_ranges(config, k=(1, len(sets[0].index)))
        rows = []
        for which, views in zip(("train", "val"), sets, strict=True):
            steps = -(-len(views.index) // config.batch_size)
            crops = track(views.center_crops(), f"{name}-{which}", steps, transient=True)
            rows.append(knn.features(backbone, crops, device, precision.autocast_dtype))
        scores[name] = knn.accuracy(rows[1], rows[0], config.k, device)
        print(f"kNN (k={config.k}) {name}: {100 * scores[name]:.1f} % of {len(sets[1].index)} pictures")
    return scores


if __name__ == "__main__":
    guard.run_script("knn.py", lambda: main(tyro.cli(KnnConfig, description=__doc__)))

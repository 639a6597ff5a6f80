"""k nearest neighbors on the frozen features of a run, beside the same network before training.

python scripts/knn.py --run RUN_DIR --train SHARDS --val SHARDS
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.progress import Progress

from inscon import guard
from inscon.nn.backbones import check_side
from inscon.precision import choose_precision
from inscon.transfer import knn
from inscon.transfer.export import any_backbone
from pipelines.evaluation import Engine, LabelledViews, joined_classes


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Frozen evaluation by nearest neighbors."""

    run: Path
    """A run folder, whose newest checkpoint is taken, a checkpoint, or a file of scripts/export.py."""
    train: Path
    """Labelled shards that make the bank."""
    val: Path
    """Labelled shards to classify."""
    k: int = 200
    """Neighbors that vote; at most the bank."""
    temperature: float = 0.1
    """Of the vote's weights exp(similarity / temperature)."""
    view_size: int | None = None
    """Side of the center crop, px. None: as the run was trained."""
    untrained: bool = True
    """Classify with the untrained network too."""
    batch_size: int = 64
    """Pictures at once."""
    pipeline: Engine = "auto"
    """Engine that reads the shards."""
    threads: int | None = None
    """Of the loader. None: the cores."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the backbone."""


def main(config: KnnConfig) -> dict[str, float]:
    """Shares of the validation pictures, 0..1, by "untrained" and "trained"."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(config.precision, device)
    scores, sets = {}, None
    for name in ("untrained", "trained") if config.untrained else ("trained",):
        backbone, facts = any_backbone(config.run, untrained=name == "untrained")
        side = config.view_size or facts["config"]["views"]["view_size"]
        check_side(facts["config"]["model"]["backbone"], side)
        sets = sets or [
            LabelledViews(
                data, side, config.batch_size, config.pipeline, threads=config.threads, device=device,
                dtype=precision.pixel_dtype,
            )
            for data in (config.train, config.val)
        ]  # fmt: skip
        joined = joined_classes(*sets)
        (bank, bank_labels), (queries, labels) = (
            features_of(backbone, views, f"{name}-{which}", device, precision.autocast_dtype)
            for which, views in zip(("train", "val"), sets, strict=True)
        )
        labels = joined[labels]
        scores[name] = knn.accuracy(queries, labels, bank, bank_labels, config.k, config.temperature, device=device)
        print(f"kNN (k={config.k}) {name}: {100 * scores[name]:.1f} % of {len(labels)} pictures")
    return scores


def features_of(backbone, views: LabelledViews, name: str, device, amp_dtype):
    """Unit features and labels of a set, with a bar."""
    with Progress(transient=True) as progress:
        bar = progress.add_task(name, total=len(views.index))
        told = (progress.advance(bar, len(labels)) or (pixels, labels) for pixels, labels in views.center_crops())
        return knn.features(backbone, told, device, amp_dtype)


if __name__ == "__main__":
    guard.run_script("knn.py", lambda: main(tyro.cli(KnnConfig, description=__doc__)))

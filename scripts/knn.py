"""k nearest neighbours on the frozen features of a run, beside the same network before training.

python scripts/knn.py --run RUN_DIR --train SHARDS --val SHARDS
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data_prep.index import DatasetIndex
from inscon.transfer import knn
from inscon.transfer.trunk import load_trunk, untrained_trunk
from pipelines.evaluation import centre_crops


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Frozen evaluation by nearest neighbours."""

    run: Path
    """A run folder, whose newest checkpoint is taken, or a checkpoint file."""
    train: Path
    """Labelled shards that make the bank."""
    val: Path
    """Labelled shards to classify."""
    k: int = 200
    """Neighbours that vote; at most the bank."""
    temperature: float = 0.1
    """Of the vote's weights exp(similarity / temperature)."""
    view_size: int | None = None
    """Side of the centre crop, px. None: as the run was trained."""


def main(config: KnnConfig) -> dict[str, float]:
    trained, settings = load_trunk(config.run)
    side = config.view_size or settings["views"]["view_size"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    indices = DatasetIndex.open(config.train), DatasetIndex.open(config.val)
    scores = {}
    for name, trunk in (("untrained", untrained_trunk(settings)), ("trained", trained)):
        (bank, bank_labels), (queries, labels) = (knn.features(trunk, centre_crops(i, side), device) for i in indices)
        scores[name] = knn.accuracy(queries, labels, bank, bank_labels, config.k, config.temperature)
        print(f"kNN (k={config.k}) {name}: {100 * scores[name]:.1f} % of {len(labels)} pictures")
    return scores


if __name__ == "__main__":
    try:
        main(tyro.cli(KnnConfig, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"knn.py: {error}") from None

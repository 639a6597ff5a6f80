"""DenseCL (Wang et al., arXiv 2011.09157): MoCo v2, and the same loss for every place of the last map.

Which place of the key's map belongs to which of the query's is looked up among the backbone's features. Written from the paper's
equations; the official code is GPL-3.0 and was not looked at.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inscon.batch import Batch
from inscon.config import Config
from inscon.guard import check_ranges
from inscon.methods import moco
from inscon.methods.method import Keys, Losses, Piece, add_up
from inscon.nn.backbones import Backbone
from inscon.nn.heads import map_head
from inscon.nn.loss import full_precision, unit
from inscon.nn.pooling import places


@dataclass(frozen=True, kw_only=True)
class Settings(moco.Settings):
    """DenseCL with the paper's weights."""

    dense_weight: float = 0.5
    """lambda of the dense loss; the instance loss has 1 - lambda."""
    dense_from_step: int = 1000
    """lambda is 0 before this step: until then the features match at random."""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, dense_weight=(0, 1), dense_from_step=0)

    def build(self, config: Config, rank_batch_size: int) -> "DenseCL":
        return DenseCL(config, rank_batch_size)


class Encoder(moco.Encoder):
    """Backbone, instance head and dense head."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__(backbone, settings)
        self.dense = map_head(backbone.channels[backbone.last], settings.embedding_dim, settings.mlp)

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> dict[str, Tensor]:
        """Unit vectors: `single [B D]`, of each place `dense [B hw D]` and `features [B hw F]`, and `mean [B D]` of the dense."""
        maps = self.backbone(pixels)
        features, dense = maps[self.backbone.last], self.dense(maps[self.backbone.last])
        return {
            "single": unit(self.head(self.backbone.pooled(maps))),
            "dense": unit(places(dense)),
            "mean": unit(places(dense).mean(1)),
            "features": unit(places(features.detach())),
        }


class DenseCL(moco.MoCo):
    encoder = Encoder

    def __init__(self, config: Config, rank_batch_size: int):
        super().__init__(config, rank_batch_size)
        self.add_queue("dense", self.settings.queue_size, self.settings.embedding_dim, config.optim.batch_size)
        self.register_buffer("dense_weight", torch.zeros(()), persistent=False)

    def schedule(self, step: int, total_steps: int) -> None:
        self.dense_weight.fill_(self.settings.dense_weight if step >= self.settings.dense_from_step else 0.0)

    def queued(self, keys: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"single": keys["single"][:, None], "dense": keys["mean"][:, None]}

    def pieces(self, batch: Batch, prepared: Keys) -> list[Piece]:
        return [Piece("query", lambda: self._losses(batch, prepared.own))]

    def _losses(self, batch: Batch, keys: dict[str, Tensor]) -> Losses:
        query = self.query_encoder(batch.views["query"].pixels)
        matches = best_matches(query["features"], keys["features"])
        positives = keys["dense"].take_along_dim(matches[..., None], 1)
        terms = {
            "single": self.contrast(query["single"], keys["single"], "single"),
            "dense": self.contrast(query["dense"].flatten(0, 1), positives.flatten(0, 1), "dense"),
        }
        return add_up(terms, {"single": 1 - self.dense_weight, "dense": self.dense_weight})


@torch.no_grad()
def best_matches(query: Float[Tensor, "B s F"], key: Float[Tensor, "B t F"]) -> Int[Tensor, "B s"]:
    """The key place whose features, unit vectors, are most like those of each query place of the same image; in full precision."""
    with full_precision(query.device):
        return (query @ key.transpose(1, 2)).argmax(-1)

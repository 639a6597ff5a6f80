"""DetCo (Xie et al., arXiv 2102.04803): whole views and jigsaw patches, compared at four levels of the backbone.

Written from the paper, whose code was never released; what was taken from memory of it is marked unchecked.
"""

import dataclasses
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.guard import check_ranges
from inscon.methods import moco
from inscon.methods.method import JigsawSettings, KeyMethod, Keys, Losses, Piece, add_up, need_strides
from inscon.nn.backbones import Backbone
from inscon.nn.heads import instance_head, jigsaw_head
from inscon.nn.loss import unit
from inscon.plan import NO_COLOR, ViewSpec

LEVELS = (4, 8, 16, 32)  # Strides of the maps that are compared, px: res2 to res5.


@dataclass(frozen=True, kw_only=True)
class Settings(JigsawSettings, moco.Settings):
    """DetCo without RandAugment. That patches are cut as InfoMin's, and lie row by row, is unchecked."""

    level_weights: tuple[float, float, float, float] = (0.1, 0.4, 0.7, 1.0)
    """Of the three losses of each level, res2 to res5. Unchecked."""
    patch_colors: bool = True
    """Whether patches get the colors of whole views. Unchecked."""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, level_weights=0)

    def resolved(self, config: Config) -> "Settings":
        need_strides(config.model.backbone, LEVELS)
        return super().resolved(config)

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        color = dataclasses.replace(views.color(), randaugment=0) if self.patch_colors else NO_COLOR
        patches = (self.patches(views, name, color) for name in ("query_patches", "key_patches"))
        return *super().view_specs(views), *patches

    def build(self, config: Config, rank_batch_size: int) -> "DetCo":
        return DetCo(config, rank_batch_size)


class Encoder(nn.Module):
    """Backbone and, for each level, a head for whole views and one that joins nine patches (as InfoMin's; unchecked)."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__()
        self.backbone, self.heads, s = backbone, nn.ModuleDict(), settings
        for stride in LEVELS:
            features = backbone.channels[stride]
            self.heads[f"global_{stride}"] = instance_head(features, s.embedding_dim, s.mlp)
            self.heads[f"local_{stride}"] = jigsaw_head(features, s.embedding_dim, s.mlp, s.patch_count)

    def forward(self, pixels: Tensor, patches: Tensor) -> dict[str, Tensor]:
        return self.embed("global", pixels) | self.embed("local", patches)

    def embed(self, kind: str, pixels: Float[Tensor, "B *P 3 S S"]) -> dict[str, Float[Tensor, "B D"]]:
        """Unit vectors by level: "global" of whole views, "local" of patches."""
        maps, lead = self.backbone(pixels.flatten(0, -4)), pixels.shape[:-3]
        pooled = {f"{kind}_{stride}": self.backbone.pooled(maps, stride).unflatten(0, lead) for stride in LEVELS}
        return {name: unit(self.heads[name](features)) for name, features in pooled.items()}


class DetCo(KeyMethod):
    encoder = Encoder

    def __init__(self, config: Config, rank_batch_size: int):
        super().__init__(config, rank_batch_size)
        for name in self.key_encoder.heads:
            self.add_queue(name, self.settings.queue_size, self.settings.embedding_dim, config.optim.batch_size)

    def key_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.views["key"].pixels, batch.views["key_patches"].pixels

    def pieces(self, batch: Batch, prepared: Keys) -> list[Piece]:
        views, keys = batch.views, prepared.own
        return [
            Piece("query", lambda: self._losses(views["query"].pixels, keys, "global", ("global",))),
            Piece("patches", lambda: self._losses(views["query_patches"].pixels, keys, "local", ("local", "global"))),
        ]

    def _losses(self, pixels: Tensor, keys: dict[str, Tensor], kind: str, kinds_of_keys: tuple[str, ...]) -> Losses:
        """Embeddings of one kind against keys of one or two, at every level."""
        queries, terms, weights = self.query_encoder.embed(kind, pixels), {}, {}
        for stride, weight in zip(LEVELS, self.settings.level_weights, strict=True):
            for other in kinds_of_keys:
                name, key = f"{kind if other == kind else 'across'}_{stride}", f"{other}_{stride}"
                terms[name], weights[name] = self.contrast(queries[f"{kind}_{stride}"], keys[key], key), weight
        return add_up(terms, weights)

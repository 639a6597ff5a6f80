"""InfoMin (Tian et al., arXiv 2005.10243): MoCo v2 with stronger colors, and patches that must find the same key (PIRL)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.guard import check_ranges
from inscon.methods import moco
from inscon.methods.method import JigsawSettings, Keys, Piece, add_up
from inscon.nn.backbones import Backbone
from inscon.nn.heads import jigsaw_head
from inscon.nn.loss import unit
from inscon.plan import NO_COLOR, ViewSpec


@dataclass(frozen=True, kw_only=True)
class Settings(JigsawSettings, moco.Settings):
    """InfoMin; its colors are the recipe's."""

    temperature: float = 0.15
    """Of both losses."""
    jigsaw_weight: float = 0.5
    """b of the patches' loss; the instance loss has 1 - b."""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, jigsaw_weight=(0, 1))

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        return *super().view_specs(views), self.patches(views, "patches", NO_COLOR, shuffled=True)

    def build(self, config: Config, rank_batch_size: int) -> "InfoMin":
        return InfoMin(config, rank_batch_size)


class Encoder(moco.Encoder):
    """Backbone, instance head and jigsaw head."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__(backbone, settings)
        features = backbone.channels[backbone.last]
        self.jigsaw = jigsaw_head(features, settings.embedding_dim, settings.mlp, settings.patch_count)

    def forward_patches(self, patches: Float[Tensor, "B P 3 s s"]) -> Float[Tensor, "B D"]:
        """One unit vector for the patches of each image."""
        pooled = self.backbone.pooled(self.backbone(patches.flatten(0, 1)))
        return unit(self.jigsaw(pooled.unflatten(0, patches.shape[:2])))


class InfoMin(moco.MoCo):
    """Keys are of whole views alone, and both losses look for them among the same queue."""

    encoder = Encoder

    def build_key_encoder(self) -> Encoder:
        twin = super().build_key_encoder()
        del twin.jigsaw
        return twin

    def pieces(self, batch: Batch, prepared: Keys) -> list[Piece]:
        weight = self.settings.jigsaw_weight
        return [
            Piece("query", lambda: add_up({"single": self.single(batch, prepared)}, {"single": 1 - weight})),
            Piece("patches", lambda: add_up({"jigsaw": self.jigsaw(batch, prepared)}, {"jigsaw": weight})),
        ]

    def jigsaw(self, batch: Batch, prepared: Keys) -> tuple[Tensor, Tensor]:
        """The patches' loss and its top-1 share."""
        query = self.query_encoder.forward_patches(batch.views["patches"].pixels)
        return self.contrast(query, prepared.own["single"], "single")

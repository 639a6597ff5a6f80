"""A method in one file, as anybody may write one: two views of two sizes must agree (like SimSiam, Chen and He, CVPR 2021)."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.methods.method import Losses, Method, MethodSettings, Piece
from inscon.nn.backbones import build_backbone
from inscon.nn.heads import instance_head
from inscon.nn.loss import unit
from inscon.plan import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """Two views and a predictor."""

    embedding_dim: int = 32
    """D of projection and prediction."""

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        small = dataclasses.replace(views.spec("small", views.overlap("large")), size=views.view_size // 2)
        return views.spec("large"), small

    def build(self, config: Config, rank_batch_size: int) -> "Toy":
        return Toy(config)


class Toy(Method):
    """A backbone, a projection, a predictor."""

    def __init__(self, config: Config):
        super().__init__()
        self.backbone = build_backbone(config.model.backbone)
        dim = config.method.embedding_dim
        self.projection = instance_head(self.backbone.channels[self.backbone.last], dim, mlp=True)
        self.predictor = nn.Linear(dim, dim)

    def pieces(self, batch: Batch, prepared: None) -> list[Piece]:
        return [Piece("views", lambda: self._losses(batch))]

    def _losses(self, batch: Batch) -> Losses:
        large, small = (self._projected(batch.views[name].pixels) for name in ("large", "small"))
        total = (self._apart(large, small) + self._apart(small, large)) / 2
        return Losses(total=total, logged={"loss_agree": total.detach()})

    def _projected(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projection(self.backbone.pooled(self.backbone(pixels)))

    def _apart(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Minus the cosine, from -1 to 1; no gradient reaches `other`."""
        return -(unit(self.predictor(one)) * unit(other.detach())).sum(1).mean()

"""BYOL (Grill et al., arXiv 2006.07733): from each view an online network predicts what a slow target makes of the other one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.guard import check_ranges
from inscon.methods.method import Follower, Losses, Method, MethodSettings, Piece, slow_copy
from inscon.nn.backbones import Backbone, build_backbone
from inscon.nn.heads import normed_head
from inscon.nn.loss import unit
from inscon.plan import ViewSpec

OTHER = {"first": "second", "second": "first"}  # view -> the one whose target it predicts


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """BYOL: two views that are colored differently, a predictor, a slow target, no negatives."""

    norm_of_all = True

    embedding_dim: int = 256
    """D of projection and prediction."""
    hidden_dim: int = 4096
    """Between the two layers of projector and predictor."""
    target_momentum: float = 0.99
    """m of target = m*target + (1-m)*online at first; a cosine takes it to 1. 0.99 up to 300 epochs, 0.996 for 1000; unchecked."""
    second_blur_probability: float = 0.1
    """Of the second view; --blur-probability is the first one's."""
    second_solarize_probability: float = 0.2
    """Of the second view; --solarize-probability is the first one's."""

    def __post_init__(self):
        check_ranges(self, embedding_dim=1, hidden_dim=1, target_momentum=(0, 1))
        check_ranges(self, second_blur_probability=(0, 1), second_solarize_probability=(0, 1))

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        blur, solarize = self.second_blur_probability, self.second_solarize_probability
        return views.spec("first"), views.spec("second", blur_probability=blur, solarize_probability=solarize)

    def build(self, config: Config, rank_batch_size: int) -> "BYOL":
        return BYOL(config)


class Encoder(nn.Module):
    """Backbone and projector."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__()
        self.backbone = backbone
        self.projector = normed_head(backbone.channels[backbone.last], settings.hidden_dim, settings.embedding_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B D], of any length."""
        return self.projector(self.backbone.pooled(self.backbone(pixels)))


class BYOL(Method):
    """Each view is a piece of the step: a pass through the online network, against the target of the other view."""

    encoder = Encoder

    def __init__(self, config: Config):
        super().__init__()
        self.settings = config.method
        self.online = self.encoder(build_backbone(config.model.backbone), self.settings)
        self.target = slow_copy(self.online)
        self.predictor = self.build_predictor()
        self.followers = (Follower(self.target, self.online, self.settings.target_momentum),)

    def build_predictor(self) -> nn.Module:
        return normed_head(self.settings.embedding_dim, self.settings.hidden_dim, self.settings.embedding_dim)

    @property
    def backbone(self) -> Backbone:
        return self.online.backbone

    def schedule(self, step: int, total_steps: int) -> None:
        share = (math.cos(math.pi * step / total_steps) + 1) / 2
        self.followers[0].schedule(1 - (1 - self.settings.target_momentum) * share)

    @torch.no_grad()
    def prepare(self, batch: Batch):
        """What the target makes of each view."""
        return {name: self.target(view.pixels) for name, view in batch.views.items()}

    def pieces(self, batch: Batch, prepared) -> list[Piece]:
        return [Piece(name, lambda name=name: self.losses(name, batch, prepared)) for name in batch.views]

    def losses(self, name: str, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        """2 - 2 cos, the mean over the images: from 0 to 4 for each view."""
        predicted, target = self.predictor(self.online(batch.views[name].pixels)), unit(targets[OTHER[name]])
        loss = 2 - 2 * (unit(predicted) * target).sum(1).mean()
        return Losses(total=loss, logged={f"loss_{name}": loss.detach(), f"length_{name}": target.mean(0).norm()})

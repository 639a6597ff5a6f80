"""SimCLR v1 (Chen et al., arXiv 2002.05709): of all views in the batch of all ranks, each must find the other one of its image."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from inscon import distributed
from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.guard import check_ranges
from inscon.methods.method import Losses, Method, MethodSettings, Piece
from inscon.nn.backbones import build_backbone
from inscon.nn.heads import instance_head
from inscon.nn.loss import full_precision, unit
from inscon.plan import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """SimCLR: two views, no queue and no slow copy."""

    norm_of_all = True

    embedding_dim: int = 128
    """D of the head, which has two layers and no BatchNorm; unchecked against the paper."""
    temperature: float = 0.1
    """Of the loss; unchecked against the paper."""

    def __post_init__(self):
        check_ranges(self, embedding_dim=1, temperature=1e-3)

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        return views.spec("first"), views.spec("second")

    def build(self, config: Config, rank_batch_size: int) -> "SimCLR":
        return SimCLR(config)


class SimCLR(Method):
    def __init__(self, config: Config):
        super().__init__()
        self.settings: Settings = config.method
        self.backbone = build_backbone(config.model.backbone)
        self.head = instance_head(self.backbone.channels[self.backbone.last], self.settings.embedding_dim, mlp=True)

    def pieces(self, batch: Batch, prepared: None) -> list[Piece]:
        return [Piece("views", lambda: self._losses(batch))]

    def _losses(self, batch: Batch) -> Losses:
        pixels = torch.cat([view.pixels for view in batch.views.values()])  # normalized among each other
        own = unit(self.head(self.backbone.pooled(self.backbone(pixels))))
        logits, twins = twin_logits(own, self.settings.temperature)
        loss, top1 = cross_entropy(logits, twins), (logits.detach().argmax(1) == twins).float().mean()
        length = own.detach().mean(0).norm()
        return Losses(total=loss, logged={"loss_twin": loss.detach(), "top1_twin": top1, "length_twin": length})


def twin_logits(own: Float[Tensor, "N D"], temperature: float) -> tuple[Float[Tensor, "N A"], Tensor]:
    """Of this rank's N = 2B views, B first ones and then B second ones: their similarities over temperature to the A = 2B * ranks
    views of all ranks, minus infinity to themselves; and where in its row each one's twin stands."""
    count, before = len(own), len(own) * distributed.rank()
    with full_precision(own.device):
        logits = own @ distributed.gather_with_gradient(own).T / temperature
    place = torch.arange(count, device=own.device)
    itself = torch.arange(logits.shape[1], device=own.device) == place[:, None] + before
    return logits.masked_fill(itself, -torch.inf), before + (place + count // 2) % count

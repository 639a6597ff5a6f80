"""PixPro (Xie et al., arXiv 2011.10043): where two views show the same place of the source, their features must agree."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from inscon.batch import Batch
from inscon.config import Config
from inscon.geometry import cell_centers
from inscon.guard import check_ranges
from inscon.methods import byol
from inscon.methods.byol import OTHER
from inscon.methods.method import Losses
from inscon.nn.backbones import Backbone
from inscon.nn.heads import normed_map_head
from inscon.nn.loss import full_precision, unit
from inscon.nn.pooling import places


@dataclass(frozen=True, kw_only=True)
class Settings(byol.Settings):
    """PixPro: BYOL on maps, with a pixel propagation in place of the predictor."""

    pair_distance: float = 0.7
    """Cells of two views are a pair if their centers are nearer than this, in diagonals of the larger view's cells."""
    sharpness: float = 2.0
    """Exponent of the similarities by which features are propagated."""
    instance: bool = False
    """Add BYOL's loss, with heads of its own. Off: the base model, whose weights were published and which the paper's tables
    compare with; with it detectors gain up to 0.5 AP (COCO FPN 1x 41.3 for 40.8)."""
    instance_weight: float = 1.0
    """Of that loss."""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, pair_distance=0, sharpness=0, instance_weight=0)

    def build(self, config: Config, rank_batch_size: int) -> "PixPro":
        return PixPro(config)


class Encoder(nn.Module):
    """Backbone and projectors of the last map."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__()
        self.backbone, sizes = backbone, (settings.hidden_dim, settings.embedding_dim)
        self.projectors = nn.ModuleDict({"pixel": normed_map_head(backbone.channels[backbone.last], *sizes)})
        if settings.instance:
            self.projectors["instance"] = normed_map_head(backbone.channels[backbone.last], *sizes)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B D h w] of each projector."""
        last = self.backbone(pixels)[self.backbone.last]
        return {name: projector(last) for name, projector in self.projectors.items()}


class PixPro(byol.BYOL):
    encoder = Encoder

    def build_predictor(self) -> nn.ModuleDict:
        dim = self.settings.embedding_dim
        predictors = nn.ModuleDict({"pixel": nn.Conv2d(dim, dim, 1)})
        if self.settings.instance:
            predictors["instance"] = normed_map_head(dim, self.settings.hidden_dim, dim)
        return predictors

    def losses(self, name: str, batch: Batch, targets: dict[str, dict[str, Tensor]]) -> Losses:
        """From -2 to 2 for each view, and 0 to 4 of its images as wholes."""
        made, target = self.online(batch.views[name].pixels), targets[OTHER[name]]
        near = self.pairs(name, batch, made["pixel"].shape[-1])
        targeted = unit(places(target["pixel"]))
        total = loss = pair_loss(self.propagated(made["pixel"]), targeted, near)
        logged = {f"loss_{name}": loss.detach(), f"length_{name}": targeted.mean((0, 1)).norm()}
        if self.settings.instance:
            predicted = self.predictor["instance"](made["instance"])
            one, other = (unit(places(maps).mean(1)) for maps in (predicted, target["instance"]))
            of_images = 2 - 2 * (one * other).sum(1).mean()
            logged[f"loss_{name}_instance"] = of_images.detach()
            total = loss + self.settings.instance_weight * of_images
        return Losses(total=total, logged=logged)

    def pairs(self, name: str, batch: Batch, cells: int) -> Bool[Tensor, "B c d"]:
        """Which cells of the view and of the other one show nearly the same place of the source."""
        views = batch.views[name], batch.views[OTHER[name]]
        here, there = (cell_centers(view.crop_box, view.flipped, cells) for view in views)
        sides = [(view.crop_box[:, 2:] - view.crop_box[:, :2]) / cells for view in views]
        larger = torch.stack([side.norm(dim=1) for side in sides]).amax(0)
        apart = (here[:, :, None] - there[:, None]).norm(dim=-1)
        return apart < self.settings.pair_distance * larger[:, None, None]

    def propagated(self, maps: Float[Tensor, "B D h w"]) -> Float[Tensor, "B c D"]:
        """y_i = sum_j max(cos(x_i, x_j), 0)^sharpness g(x_j), of unit length; g(x_j) has it too."""
        x, g = unit(places(maps)), unit(places(self.predictor["pixel"](maps)))
        with full_precision(x.device):
            return unit((x @ x.mT).clamp(min=0).pow(self.settings.sharpness) @ g)


def pair_loss(
    ours: Float[Tensor, "B c D"], theirs: Float[Tensor, "B d D"], near: Bool[Tensor, "B c d"]
) -> Float[Tensor, ""]:
    """-2 times the mean cosine of an image's pairs, 0 where it has none; the mean over the images."""
    with full_precision(ours.device):
        cosines = (ours @ theirs.mT) * near
    return -2 * (cosines.sum((1, 2)) / (near.sum((1, 2)).to(cosines.dtype) + 1e-6)).mean()

"""The encoder: a torchvision ResNet without its classifier, and the heads on top of its maps."""

from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Bool, Float
from torch import Tensor, nn

from inscon.clock import HEADS, part
from inscon.config import ModelConfig
from inscon.heads import cell_head, instance_head
from inscon.mosaic import tile_features
from inscon.norm import SplitBatchNorm2d, frozen_statistics
from inscon.pooling import precise_roi_pool


class Trunk(nn.Module):
    """A ResNet up to res5, with torchvision's parameter names, so that its state dict loads into torchvision as it is."""

    def __init__(self, arch: str, num_groups: int = 1):
        super().__init__()
        resnet = torchvision.models.get_model(
            arch, weights=None, norm_layer=partial(SplitBatchNorm2d, num_groups=num_groups)
        )
        self.channels = {"res4": resnet.layer4[0].conv1.in_channels, "res5": resnet.fc.in_features}
        for name, child in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, child)

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> dict[str, Tensor]:
        """Maps by stage: `res4` at stride 16 and `res5` at stride 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        res4 = self.layer3(self.layer2(self.layer1(x)))
        return {"res4": res4, "res5": self.layer4(res4)}


class Encoder(nn.Module):
    """Trunk and heads. `heads` says which exist; all outputs are L2-normalized float32 (float64 in a float64 model)."""

    def __init__(self, config: ModelConfig, heads: tuple[str, ...], num_groups: int = 1):
        super().__init__()
        self.config, self.num_groups = config, num_groups
        self.trunk = Trunk(config.arch, num_groups)
        features = self.trunk.channels["res5"]
        make = {
            "single": lambda: instance_head(features, config.embedding_dim, config.mlp),
            "multi": lambda: instance_head(features, config.embedding_dim, config.mlp),
            "cell": lambda: cell_head(self.trunk.channels[config.cell_stage], config.cell_dim, config.mlp),
        }
        self.heads = nn.ModuleDict({name: make[name]() for name in heads})
        if {"single", "multi"} <= set(heads) and config.multi_head_init == "copy":
            self.heads["multi"].load_state_dict(self.heads["single"].state_dict())

    def forward(
        self, pixels: Float[Tensor, "B 3 S S"], overlap_box: Float[Tensor, "B 4"], flipped: Bool[Tensor, "B"]
    ) -> dict[str, Tensor]:
        """Single views: `single [B D]` and `cell [B G*G D]`, as far as those heads exist.

        `overlap_box` is in px of the view as it is seen here, after its flip. The grid of a flipped view is turned back, so
        that cell c of a query and cell c of its key show the same part of the source (METHOD 7).
        """
        maps, out = self.trunk(pixels), {}
        with part(HEADS):
            if "single" in self.heads:
                # Over rows of a channels-last map, so that the gradient goes back channels last too.
                pooled = maps["res5"].permute(0, 2, 3, 1).flatten(1, 2).mean(1)
                out["single"] = _unit(self.heads["single"](pooled))
            if "cell" in self.heads:
                out["cell"] = self._cells(maps[self.config.cell_stage], overlap_box, flipped)
        return out

    def _cells(self, feature_map: Tensor, overlap_box: Tensor, flipped: Tensor) -> Tensor:
        c = self.config
        cells = precise_roi_pool(
            feature_map, overlap_box, c.cell_grid, 1 / c.cell_stride, offset=c.roi_offset, border=c.roi_border
        )
        cells = torch.where(flipped[:, None, None, None], cells.flip(-1), cells)
        return _unit(self.heads["cell"](cells).flatten(2).transpose(1, 2))

    def forward_mosaic(self, mosaic: Float[Tensor, "M 3 C C"]) -> Float[Tensor, "M 4 D"]:
        """Mosaics: one embedding per tile, UL UR LL LR, by the multi head."""
        if self.config.mosaic_updates_norm:
            feature_map = self.trunk(mosaic)["res5"]
        else:
            with frozen_statistics(self.trunk):
                feature_map = self.trunk(mosaic)["res5"]
        with part(HEADS):
            return _unit(self.heads["multi"](tile_features(feature_map)))


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

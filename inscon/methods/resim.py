"""ReSim-FPN (Xiao et al., arXiv 2103.12902): MoCo v2, and windows of the query view against the same regions of the key view.

Windows lie on a fixed grid and are compared on two levels of a feature pyramid. Written from the paper's description; the official
code is CC-BY-NC 4.0 and was not looked at. Here colors and blur come after the crop, and there before it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from inscon import distributed
from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.geometry import from_view, into_view
from inscon.guard import check_ranges
from inscon.methods import moco
from inscon.methods.method import Keys, Losses, Piece, add_up, need_strides
from inscon.nn.backbones import Backbone
from inscon.nn.loss import row_logits, separate_terms, unit
from inscon.nn.pooling import places, pool_windows
from inscon.plan import ViewSpec


class Windows(NamedTuple):
    """A grid on a view of 224 px; on another one in proportion, so that it covers the same share of the view."""

    per_side: int
    side: int  # px
    step: int  # px between the corners of neighbors
    of_all_ranks: bool  # Negatives are of all ranks' images; else of the own rank's or its BatchNorm groups'.

    def boxes(self, view_size: int) -> Float[Tensor, "n 4"]:
        """Row by row, px of the view."""
        start = torch.arange(self.per_side) * float(self.step)
        corners = torch.stack(torch.meshgrid(start, start, indexing="xy"), -1).flatten(0, 1)
        return torch.cat([corners, corners + self.side], 1) * (view_size / 224)


GRIDS: Mapping[int, Windows] = {16: Windows(6, 48, 32, of_all_ranks=True), 8: Windows(8, 32, 24, of_all_ranks=False)}
"""By the stride of the map that they are pooled from, px. That they begin in the view's corner is unchecked."""
PYRAMID = (8, 16, 32)  # Strides of the maps that the pyramid is built of, px.
POOLED = 3  # Places per side of the key's map that are averaged into one negative.
TOLERANCE = 1e-3  # px that a window may reach past the key view, so that none is lost to rounding.


@dataclass(frozen=True, kw_only=True)
class Settings(moco.Settings):
    """ReSim-FPN; three losses with one temperature and, unchecked, of equal weight."""

    pyramid_dim: int = 256
    """Channels of the feature pyramid, and length of a window's vector."""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, pyramid_dim=1)

    def resolved(self, config: Config) -> "Settings":
        need_strides(config.model.backbone, PYRAMID)
        views = config.views
        if views.randaugment:
            raise ValueError(f"RandAugment moves what boxes tell. Found: {views.randaugment}; set --randaugment 0")
        if views.view_size // max(GRIDS) < POOLED:
            needed = f"the map of stride {max(GRIDS)} px must hold {POOLED}x{POOLED} places"
            raise ValueError(f"{needed}. Found: view_size {views.view_size}; set --view-size 64 or more")
        return super().resolved(config)

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        query, key = super().view_specs(views)
        return query, dataclasses.replace(key, flip=query.name)

    def build(self, config: Config, rank_batch_size: int) -> "ReSim":
        return ReSim(config, rank_batch_size)


class Encoder(moco.Encoder):
    """Backbone, instance head and feature pyramid; of the pyramid's deepest level only the way down is used."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__(backbone, settings)
        self.pyramid = FeaturePyramidNetwork([backbone.channels[stride] for stride in PYRAMID], settings.pyramid_dim)
        self.pyramid.layer_blocks[-1] = nn.Identity()

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> dict[str, Tensor]:
        """`single [B D]`, unit vectors, and `map_16`, `map_8` [B F h w]."""
        maps = self.backbone(pixels)
        levels = self.pyramid({f"map_{stride}": maps[stride] for stride in PYRAMID})
        single = unit(self.head(self.backbone.pooled(maps)))
        return {"single": single} | {f"map_{stride}": levels[f"map_{stride}"] for stride in GRIDS}


class ReSim(moco.MoCo):
    encoder = Encoder

    def __init__(self, config: Config, rank_batch_size: int):
        super().__init__(config, rank_batch_size)
        self.view_size = config.views.view_size
        self.norm_groups = rank_batch_size // (config.model.split_size or rank_batch_size)
        for stride, grid in GRIDS.items():
            self.register_buffer(f"windows_{stride}", grid.boxes(self.view_size), persistent=False)

    def pieces(self, batch: Batch, prepared: Keys) -> list[Piece]:
        return [Piece("query", lambda: self._losses(batch, prepared.own))]

    def _losses(self, batch: Batch, keys: dict[str, Tensor]) -> Losses:
        query = self.query_encoder(batch.views["query"].pixels)
        terms = {"single": self.contrast(query["single"], keys["single"], "single")}
        for stride in GRIDS:
            name = f"map_{stride}"
            terms[f"region_{stride}"] = self._regions(query[name], keys[name], batch, stride)
        return add_up(terms)

    def _regions(self, query_map: Tensor, key_map: Tensor, batch: Batch, stride: int) -> tuple[Tensor, Tensor]:
        """Mean InfoNCE of the used windows of all ranks, and the share that finds its region. No gradient reaches the key's map."""
        windows, regions, used = self.windows_in_both(batch, stride)
        queries = unit(pool_windows(query_map, windows, 1 / stride)).flatten(0, 1)
        positives = unit(pool_windows(key_map, regions, 1 / stride)).flatten(0, 1)
        negatives = unit(places(F.avg_pool2d(key_map, POOLED, stride=1)).flatten(0, 1))
        everywhere = GRIDS[stride].of_all_ranks
        rows = queries, positives, distributed.gather(negatives) if everywhere else negatives
        groups = zip(*(tensor.chunk(1 if everywhere else self.norm_groups) for tensor in rows))
        logits = [row_logits(*group, self.settings.temperature) for group in groups]
        terms = torch.cat([separate_terms(own) for own in logits])
        found = torch.cat([own.positive.detach() > own.hardest_negative for own in logits])
        weights = used.flatten() * distributed.world_size() / distributed.gather(used.sum()[None]).sum().clamp(min=1)
        return (terms * weights).sum(), (found * weights).sum()

    def windows_in_both(self, batch: Batch, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Windows, px of the query view [B n 4]; the same regions, px of the key view [B n 4]; 1 where the latter lies within its
        view, 0 where not [B n]."""
        query, key, size = batch.views["query"], batch.views["key"], self.view_size
        windows = self.get_buffer(f"windows_{stride}").expand(len(query.flipped), -1, -1)
        source = from_view(windows, query.crop_box[:, None], query.flipped[:, None], size)
        regions = into_view(source, key.crop_box[:, None], key.flipped[:, None], size)
        used = ((regions >= -TOLERANCE) & (regions <= size + TOLERANCE)).all(-1)
        return windows, regions, used.to(regions.dtype)

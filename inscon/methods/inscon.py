"""InsCon (Yang et al., arXiv 2203.07688): single views, 2x2 mosaics and 3x3 cells of the shared region, two queues, three losses
(paper section 3, figure 1). "METHOD n" is row n of the table of readings in docs/method.md."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.guard import check_ranges
from inscon.methods import moco
from inscon.methods.method import KeyMethod, Keys, Losses, Piece, add_up, need_strides, queue_size, suited_queue
from inscon.nn.backbones import Backbone
from inscon.nn.heads import instance_head, map_head
from inscon.nn.loss import group_terms, row_logits, unit
from inscon.nn.norm import frozen_statistics
from inscon.nn.pooling import precise_roi_pool
from inscon.plan import Mosaics, ViewSpec

HEADS = ("single", "multi", "cell")
STRIDES = {"res4": 16, "res5": 32}  # Of the maps that can feed the cell head, px.


@dataclass(frozen=True, kw_only=True)
class Settings(moco.Settings):
    """InsCon as the paper trains it (Table 1)."""

    heads: tuple[Literal["single", "multi", "cell"], ...] = HEADS
    """Which losses are trained; `single` alone is MoCo (METHOD 16)."""
    cell_dim: int = 256
    """D of the cell head."""
    cell_grid: int = 3
    """G, cells per side of the overlap."""
    cell_stage: Literal["res4", "res5"] = "res5"
    """Which map the cells are pooled from: that of stride 16 or of stride 32 (METHOD 15)."""
    roi_offset: float = 0.0
    """Where feature j sits, in cells: at j + roi_offset. 0 fits a ResNet, 0.5 a patchify backbone (METHOD 8)."""
    roi_border: Literal["zero", "normalize"] = "zero"
    """zero: features are 0 outside the map, as the published op. normalize: divide by the covered weight (METHOD 8)."""
    cell_temperature: float = 0.2
    """Of the cell loss; Table 8 varies it."""
    aggregate: Literal["mean", "literal"] = "mean"
    """Several positives: the mean of separate terms, or one sum inside the log as printed (METHOD 4)."""
    cell_queue_size: int | None = None
    """Keys in queue 2. None: 65536 rounded down to whole global batches of cells: 64512 at batch 256 (METHOD 10, 11)."""
    multi_head_init: Literal["copy", "independent"] = "copy"
    """copy: the multi head starts as the single head, so that both losses start equal (METHOD 12)."""
    tile: Literal["full", "half"] = "full"
    """full: B/4 canvases of 2S from whole views. half: B canvases of S from halved views (METHOD 1)."""
    tiles_from: Literal["query", "third"] = "query"
    """Which views lie on the mosaic: the query views, or a third independent one (METHOD 2)."""
    mosaic_updates_norm: bool = False
    """Whether the mosaic pass updates BatchNorm's running statistics; linear evaluation reads them (METHOD 14)."""

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.heads if name not in HEADS]
        if unknown or not self.heads or len(set(self.heads)) != len(self.heads):
            found = " ".join(self.heads)
            raise ValueError(f"heads must be a choice of {' '.join(HEADS)}, each at most once. Found: {found}")
        check_ranges(self, cell_dim=1, cell_grid=1, cell_temperature=1e-3)

    @property
    def cells(self) -> int:
        """G*G, cells per image."""
        return self.cell_grid**2

    @property
    def stride(self) -> int:
        """Of the map that cells are pooled from, px."""
        return STRIDES[self.cell_stage]

    def resolved(self, config: Config) -> "Settings":
        batch, size = config.optim.batch_size, config.views.view_size
        if "cell" in self.heads:
            if size < 2 * self.stride:
                remedy = f"set --view-size {2 * self.stride} or more"
                raise ValueError(f"the cell head needs a map of at least 2x2 features. Found: {size} px; {remedy}")
            other = "set --cell-stage to the other one, or another --backbone"
            need_strides(config.model.backbone, [self.stride], other)
        cells = queue_size("cell_queue_size", self.cell_queue_size, batch * self.cells)
        return dataclasses.replace(super().resolved(config), cell_queue_size=cells)

    def suited(self, images: int, batch_size: int, steps: int) -> dict[str, tuple[object, str]]:
        own, cells = super().suited(images, batch_size, steps), suited_queue(images, batch_size, steps, self.cells)
        temperature = min(self.cell_temperature, own["temperature"][0]), own["temperature"][1]
        queue = cells, f"cells of as many pictures, {self.cells} each; 65536 at most"
        return own | {"cell_queue_size": queue, "cell_temperature": temperature}

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        specs = views.spec("query"), views.spec("key", views.overlap("query"))
        third = "multi" in self.heads and self.tiles_from == "third"
        return (*specs, views.spec("tile")) if third else specs

    def mosaics(self) -> Mosaics | None:
        if "multi" not in self.heads:
            return None
        return Mosaics(view="tile" if self.tiles_from == "third" else "query", tile=self.tile)

    def build(self, config: Config, rank_batch_size: int) -> "InsCon":
        return InsCon(config, rank_batch_size)


class Encoder(nn.Module):
    """Backbone and heads; all outputs are unit vectors."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__()
        self.backbone, self.settings, self.heads = backbone, settings, nn.ModuleDict()
        pooled, s = backbone.channels[backbone.last], settings
        for name in s.heads:
            if name == "cell":
                self.heads[name] = map_head(backbone.channels[s.stride], s.cell_dim, s.mlp)
            else:
                self.heads[name] = instance_head(pooled, s.embedding_dim, s.mlp)
        if {"single", "multi"} <= set(s.heads) and s.multi_head_init == "copy":
            self.heads["multi"].load_state_dict(self.heads["single"].state_dict())

    def forward(
        self, pixels: Float[Tensor, "B 3 S S"], overlap_box: Float[Tensor, "B 4"], flipped: Bool[Tensor, "B"]
    ) -> dict[str, Tensor]:
        """Single views: `single [B D]` and `cell [B G*G D]`, as far as those heads exist. `overlap_box` is in px of the view as it
        is seen here. The grid of a flipped view is turned back: cell c of query and key show one part of the source (METHOD 7)."""
        maps, out = self.backbone(pixels), {}
        if "single" in self.heads:
            out["single"] = unit(self.heads["single"](self.backbone.pooled(maps)))
        if "cell" in self.heads:
            out["cell"] = self._cells(maps[self.settings.stride], overlap_box, flipped)
        return out

    def _cells(self, feature_map: Tensor, overlap_box: Tensor, flipped: Tensor) -> Tensor:
        s = self.settings
        cells = precise_roi_pool(feature_map, overlap_box, s.cell_grid, 1 / s.stride, s.roi_offset, s.roi_border)
        cells = torch.where(flipped[:, None, None, None], cells.flip(-1), cells)
        return unit(self.heads["cell"](cells).flatten(2).transpose(1, 2))

    def forward_mosaic(self, mosaic: Float[Tensor, "M 3 C C"]) -> Float[Tensor, "M 4 D"]:
        """Mosaics: one embedding per tile, UL UR LL LR, by the multi head on the adaptive average pool 2x2 of paper section 3.2; on
        an even map its windows meet exactly at the seams."""
        updates = self.settings.mosaic_updates_norm
        with contextlib.nullcontext() if updates else frozen_statistics(self.backbone):
            feature_map = self.backbone(mosaic)[self.backbone.last]
        tiles = nn.functional.adaptive_avg_pool2d(feature_map, 2).flatten(2).transpose(1, 2)
        return unit(self.heads["multi"](tiles))


class InsCon(KeyMethod):
    """The method. `single` alone or with others; keys of tiles come from the single head's follower, or the multi head's."""

    encoder = Encoder

    def __init__(self, config: Config, rank_batch_size: int):
        super().__init__(config, rank_batch_size)
        s: Settings = self.settings
        batch_size = config.optim.batch_size
        if "single" in self.key_encoder.heads:
            self.add_queue("single", s.queue_size, s.embedding_dim, batch_size)
        if "cell" in self.key_encoder.heads:
            self.add_queue("cell", s.cell_queue_size, s.cell_dim, batch_size * s.cells)
        mosaics = s.mosaics()
        order = None if mosaics is None else torch.from_numpy(mosaics.order(rank_batch_size))
        self.register_buffer("tile_order", order, persistent=False)

    def build_key_encoder(self) -> Encoder:
        """The query encoder's twin: its instance head and its cell head (METHOD 3)."""
        twin = super().build_key_encoder()
        if "multi" in twin.heads:
            multi = twin.heads.pop("multi")
            if "single" not in twin.heads:
                twin.heads["single"] = multi
        return twin

    def renamed(self, name: str) -> str:
        return name if "single" in self.settings.heads else name.replace("heads.single.", "heads.multi.")

    def key_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        key = batch.views["key"]
        return key.pixels, batch.overlaps["query", "key"].second_box, key.flipped

    def pieces(self, batch: Batch, prepared: Keys) -> list[Piece]:
        heads, pieces = set(self.settings.heads), []
        if heads & {"single", "cell"}:
            pieces.append(Piece("query", lambda: self._single_views(batch, prepared.own)))
        if "multi" in heads:
            pieces.append(Piece("mosaic", lambda: self._mosaics(batch, prepared.own)))
        return pieces

    def _single_views(self, batch: Batch, keys: dict[str, Tensor]) -> Losses:
        s, view, overlap = self.settings, batch.views["query"], batch.overlaps["query", "key"]
        query, terms = self.query_encoder(view.pixels, overlap.first_box, view.flipped), {}
        if "single" in query:
            terms["single"] = self.contrast(query["single"], keys["single"], "single")
        if "cell" in query:
            cells = query["cell"].flatten(0, 1), keys["cell"].flatten(0, 1)
            logits = row_logits(*cells, self.queues["cell"].keys, s.cell_temperature)
            # Over all images, also those without an overlap, so that ranks agree.
            terms["cell"] = (group_terms(logits, s.cells, s.aggregate) * overlap.weight).mean(), logits.top1
        return add_up(terms)

    def _mosaics(self, batch: Batch, keys: dict[str, Tensor]) -> Losses:
        s, query = self.settings, self.query_encoder.forward_mosaic(batch.mosaic)
        positives = keys["single"][self.tile_order.flatten()]
        logits = row_logits(query.flatten(0, 1), positives, self.queues["single"].keys, s.temperature)
        return add_up({"multi": (group_terms(logits, 4, s.aggregate).mean(), logits.top1)})

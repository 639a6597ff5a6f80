"""MoCo v1 (He et al., arXiv 1911.05722) and v2 (Chen et al., arXiv 2003.04297): one instance loss against a queue of keys."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.guard import check_ranges
from inscon.methods.method import KeyMethod, Keys, MethodSettings, Piece, add_up, queue_size, suited_queue
from inscon.nn.backbones import Backbone
from inscon.nn.heads import instance_head
from inscon.nn.loss import unit
from inscon.plan import ViewSpec

FEW_KEYS = 16_384  # In a queue; a run with no more takes a lower temperature.


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """MoCo: two views, a query encoder, a slow key encoder, a queue."""

    mlp: bool = True
    """Two-layer head (v2); false: one linear layer (v1)."""
    embedding_dim: int = 128
    """D of the head."""
    temperature: float = 0.2
    """Of the loss; v1 has 0.07."""
    queue_size: int | None = None
    """Keys in the queue. None: 65536 rounded down to whole global batches."""
    key_momentum: float = 0.999
    """m of key = m*key + (1-m)*query."""

    def __post_init__(self):
        check_ranges(self, embedding_dim=1, temperature=1e-3, key_momentum=(0, 1))

    def resolved(self, config: Config) -> "Settings":
        size = queue_size("queue_size", self.queue_size, config.optim.batch_size)
        return dataclasses.replace(self, queue_size=size)

    def suited(self, images: int, batch_size: int, steps: int) -> dict[str, tuple[object, str]]:
        queue = suited_queue(images, batch_size, steps)
        momentum = round(min(max(1 - 2 / steps, 0.99), self.key_momentum), 3)
        temperature = self.temperature if queue > FEW_KEYS else min(self.temperature, 0.1)
        outdated = "of a quarter of the set, or a 256th of the steps, for keys are soon outdated; 65536 at most"
        follow = f"1 - 2/steps, for keys must follow within the {steps} steps; {self.key_momentum} at most"
        few = f"0.1 with {FEW_KEYS} keys or fewer, which are easily told apart"
        return {"queue_size": (queue, outdated), "key_momentum": (momentum, follow), "temperature": (temperature, few)}

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        return views.spec("query"), views.spec("key")

    def memory(self, batch_size: int) -> int:
        return (self.queue_size or 65536) // batch_size

    def build(self, config: Config, rank_batch_size: int) -> "MoCo":
        return MoCo(config, rank_batch_size)


class Encoder(nn.Module):
    """Backbone and instance head."""

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__()
        self.backbone = backbone
        self.head = instance_head(backbone.channels[backbone.last], settings.embedding_dim, settings.mlp)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """{"single": [B D]}, unit vectors."""
        return {"single": unit(self.head(self.backbone.pooled(self.backbone(pixels))))}


class MoCo(KeyMethod):
    encoder = Encoder

    def __init__(self, config: Config, rank_batch_size: int):
        super().__init__(config, rank_batch_size)
        self.add_queue("single", self.settings.queue_size, self.settings.embedding_dim, config.optim.batch_size)

    def pieces(self, batch: Batch, prepared: Keys) -> list[Piece]:
        return [Piece("query", lambda: add_up({"single": self.single(batch, prepared)}))]

    def single(self, batch: Batch, prepared: Keys) -> tuple[Tensor, Tensor]:
        """The instance loss and its top-1 share."""
        query = self.query_encoder(batch.views["query"].pixels)["single"]
        return self.contrast(query, prepared.own["single"], "single")

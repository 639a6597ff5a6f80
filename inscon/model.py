"""InsCon: a query encoder that learns, a key encoder that follows, two queues, three losses (paper section 3, figure 1)."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inscon import distributed
from inscon.batch import Batch, View
from inscon.config import ModelConfig, ViewConfig
from inscon.encoder import Encoder
from inscon.geometry import Overlap, find_overlap
from inscon.key_queue import KeyQueue
from inscon.loss import aggregate_groups, row_logits, separate_terms
from inscon.mosaic import image_order
from inscon.norm import shuffle_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Of this rank's images, each 0-d on the device; None where a head is not trained."""

    single: Float[Tensor, ""] | None
    multi: Float[Tensor, ""] | None
    cell: Float[Tensor, ""] | None
    total: Float[Tensor, ""]
    """Their sum, 1:1:1 (equation 4)."""
    top1: dict[str, Float[Tensor, ""]]
    """By head: share of queries whose positive beats every negative. Above 99 % says that BatchNorm leaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKeys:
    """This rank's keys of one step, without gradient; they join the queues after the backward pass."""

    single: Float[Tensor, "B D"] | None
    cell: Float[Tensor, "B cells E"] | None


class InsCon(nn.Module):
    """The method. One step, in order:

        losses, new_keys = model(batch)
        losses.total.backward()
        model.enqueue(new_keys)           # after the backward pass, which still needs the old queue
        optimizer.step()
        model.update_key_encoder()        # once per optimizer step, before the next key pass

    Args:
        config: resolved (`inscon.config.resolve`), so that no size is None.
        views: the settings that say what a valid overlap is and how mosaics lie.
        rank_batch_size: images per rank and step.
    """

    def __init__(self, config: ModelConfig, views: ViewConfig, rank_batch_size: int):
        super().__init__()
        self.config, self.views = config, views
        num_groups = rank_batch_size // config.split_size if config.norm == "split" else 1
        self.query_encoder = Encoder(config, config.heads, num_groups)
        self.key_encoder = self._copy_as_key_encoder()
        if "single" in self.key_encoder.heads:
            self.key_queue = KeyQueue(config.queue_size, config.embedding_dim)
        if "cell" in self.key_encoder.heads:
            self.cell_queue = KeyQueue(config.cell_queue_size, config.cell_dim)
        self._followers = self._match_by_name()
        self._assign_keys_to_groups(rank_batch_size)

    def forward(self, batch: Batch) -> tuple[Losses, NewKeys]:
        """The three passes and the losses of one batch."""
        overlap = self._find_overlap(batch)
        query = self.query_encoder(batch.query.pixels, overlap.query_box, batch.query.flipped)
        if "multi" in self.config.heads:
            query["multi"] = self.query_encoder.forward_mosaic(batch.mosaic)
        keys = self.encode_keys(batch.key, overlap)
        with torch.autocast(batch.query.pixels.device.type, enabled=False):
            losses = self._losses(query, keys, overlap.weight)
        return losses, NewKeys(single=keys.get("single"), cell=keys.get("cell"))

    @torch.no_grad()
    def encode_keys(self, key: View, overlap: Overlap) -> dict[str, Tensor]:
        """Keys of the key views in the order of the batch, normalised among other images than their queries were."""
        inputs = (key.pixels, overlap.key_box, key.flipped)
        if self.key_order is None or not self.training:
            return self.key_encoder(*inputs)
        if self.config.norm == "split":
            keys = self.key_encoder(*(tensor[self.key_order] for tensor in inputs))
            return {name: value[self.key_order_back] for name, value in keys.items()}
        return self._encode_keys_over_ranks(inputs)

    def _encode_keys_over_ranks(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Every rank encodes other ranks' images and gets its own keys back (MoCo's shuffling BN)."""
        per_rank, rank = inputs[0].shape[0], distributed.rank()
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        keys = self.key_encoder(*(distributed.gather(tensor)[self.key_order[mine]] for tensor in inputs))
        return {name: distributed.gather(value)[self.key_order_back[mine]] for name, value in keys.items()}

    def _losses(self, query: dict[str, Tensor], keys: dict[str, Tensor], weight: Tensor) -> Losses:
        c, parts, top1 = self.config, {}, {}
        if "single" in query:
            logits = row_logits(query["single"], keys["single"], self.key_queue.keys, c.temperature)
            parts["single"], top1["single"] = separate_terms(logits).mean(), logits.top1
        if "multi" in query:
            order = image_order(len(weight), self.views.tile, device=weight.device).flatten()
            logits = row_logits(query["multi"].flatten(0, 1), keys["single"][order], self.key_queue.keys, c.temperature)
            parts["multi"], top1["multi"] = aggregate_groups(logits, 4, c.aggregate, None), logits.top1
        if "cell" in query:
            cells = query["cell"].flatten(0, 1), keys["cell"].flatten(0, 1)
            logits = row_logits(*cells, self.cell_queue.keys, c.cell_temperature)
            parts["cell"], top1["cell"] = aggregate_groups(logits, c.cells, c.aggregate, weight), logits.top1
        total = torch.stack(list(parts.values())).sum()
        return Losses(**{name: parts.get(name) for name in ("single", "multi", "cell")}, total=total, top1=top1)

    def _find_overlap(self, batch: Batch) -> Overlap:
        query, key, v = batch.query, batch.key, self.views
        boxes = query.crop_box, query.flipped, key.crop_box, key.flipped
        return find_overlap(*boxes, v.view_size, v.overlap_min_side, v.overlap_min_iou)

    @torch.no_grad()
    def enqueue(self, new_keys: NewKeys) -> None:
        """The keys of every rank join the queues: images in batch order, all cells of an image in a row."""
        if new_keys.single is not None:
            self.key_queue.enqueue(distributed.gather(new_keys.single))
        if new_keys.cell is not None:
            self.cell_queue.enqueue(distributed.gather(new_keys.cell).flatten(0, 1))

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """key = m*key + (1-m)*query for every parameter, matched by name, in the weights' own float32."""
        keys, queries = self._followers
        torch._foreach_mul_(keys, self.config.key_momentum)
        torch._foreach_add_(keys, queries, alpha=1 - self.config.key_momentum)

    def _copy_as_key_encoder(self) -> Encoder:
        """The query encoder's twin without gradient: its instance head and its cell head (METHOD 3)."""
        twin = copy.deepcopy(self.query_encoder)
        if "multi" in twin.heads:
            multi = twin.heads.pop("multi")
            if "single" not in twin.heads:  # keys of tiles then come from the multi head's own follower
                twin.heads["single"] = multi
        return twin.requires_grad_(False)

    def _assign_keys_to_groups(self, rank_batch_size: int) -> None:
        """`key_order`: which image each slot of the key pass takes; on the device from the start, so no step copies it."""
        order = None
        if self.config.norm == "split":
            order = shuffle_order(rank_batch_size, self.config.split_size)
        elif self.config.norm == "shuffle":
            order = shuffle_order(rank_batch_size * distributed.world_size(), rank_batch_size)
        self.register_buffer("key_order", order, persistent=False)
        self.register_buffer("key_order_back", None if order is None else order.argsort(), persistent=False)

    def _match_by_name(self) -> tuple[list[Tensor], list[Tensor]]:
        queries = dict(self.query_encoder.named_parameters())
        source = "heads.single." if "single" in self.query_encoder.heads else "heads.multi."
        pairs = [(p, queries[n.replace("heads.single.", source)]) for n, p in self.key_encoder.named_parameters()]
        return [key for key, _ in pairs], [query for _, query in pairs]

"""InsCon: a query encoder that learns, a key encoder that follows, two queues, three losses (paper section 3, figure 1)."""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inscon import distributed
from inscon.batch import Batch, View
from inscon.clock import EMA, HEADS, KEY, MOSAIC, QUERY, WIRE, part
from inscon.config import ModelConfig, ViewConfig
from inscon.encoder import Encoder
from inscon.geometry import Overlap, find_overlap
from inscon.key_queue import KeyQueue
from inscon.loss import aggregate_groups, row_logits, separate_terms
from inscon.mosaic import image_order
from inscon.norm import exchange_order, shuffle_order, take_groups_one_by_one


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

    def __add__(self, other: "Losses") -> "Losses":
        """Of two pieces of a step together."""

        def both(one, another):
            return one if another is None else another if one is None else one + another

        top1 = {name: both(self.top1.get(name), other.top1.get(name)) for name in [*self.top1, *other.top1]}
        return Losses(
            **{name: both(getattr(self, name), getattr(other, name)) for name in ("single", "multi", "cell", "total")},
            top1=top1,
        )

    def detach(self) -> "Losses":
        """The same without gradient, so that no graph is kept."""
        values = {name: getattr(self, name) for name in ("single", "multi", "cell", "total")}
        return Losses(
            **{name: None if value is None else value.detach() for name, value in values.items()}, top1=self.top1
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKeys:
    """This rank's keys of one step, without gradient; they join the queues after the backward pass."""

    single: Float[Tensor, "B D"] | None
    cell: Float[Tensor, "B cells E"] | None
    arriving: distributed.Gathering | None = None
    """Those of all ranks, on their way, [world*B, D + cells*E]; None: they have not been sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What every piece of a step needs, none of it with gradient."""

    overlap: Overlap
    keys: NewKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a step with a graph of its own. The losses of a step's pieces sum to the step's, and so do the gradients."""

    query: bool = True
    """Whether the single views are encoded, for the single and the cell loss."""
    mosaic: bool = True
    """Whether the mosaics are, for the multi loss."""
    group: int | None = None
    """Which BatchNorm group of either; None: all of them."""


WHOLE = Piece()
"""Everything in one graph."""


def cut_step(cut: str, heads: tuple[str, ...], num_groups: int) -> tuple[Piece, ...]:
    """The pieces of a step, see `InsCon`."""
    passes = [
        Piece(query=query, mosaic=not query)
        for query in (True, False)
        if ({"single", "cell"} if query else {"multi"}) & set(heads)
    ]
    if cut == "joint" or len(passes) * num_groups == 1:
        return (WHOLE,)
    if cut == "passes" or num_groups == 1:
        return tuple(passes)
    return tuple(dataclasses.replace(piece, group=group) for piece in passes for group in range(num_groups))


class InsCon(nn.Module):
    """The method. One step, in order:

        losses, new_keys = model(batch)
        losses.total.backward()
        model.enqueue(new_keys)           # after the backward pass, which still needs the old queue
        optimizer.step()
        model.update_key_encoder()        # once per optimizer step, before the next key pass

    or, with the activations of one piece alive at a time:

        prepared = model.prepare(batch)
        for piece in model.pieces:
            model(batch, prepared, piece)[0].total.backward()
        model.enqueue(prepared.keys)      # and so on

    Args:
        config: resolved (`inscon.config.resolve`), so that no size is None.
        views: the settings that say what a valid overlap is and how mosaics lie.
        rank_batch_size: images per rank and step.
        cut: into which pieces: "joint", all losses in one graph; "passes", single views and then mosaics; "groups", each
            BatchNorm group of either by itself, with norm = split.
    """

    def __init__(self, config: ModelConfig, views: ViewConfig, rank_batch_size: int, cut: str = "joint"):
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
        self.pieces = cut_step(cut, config.heads, num_groups)
        """Of a step, in order."""
        self._by_group = self.pieces[0].group is not None
        if self._by_group:
            take_groups_one_by_one(self)

    def forward(self, batch: Batch, prepared: Prepared | None = None, piece: Piece = WHOLE) -> tuple[Losses, NewKeys]:
        """The losses of one batch, or of one piece of it; and its new keys."""
        prepared = prepared or self.prepare(batch)
        query, overlap, taken = {}, prepared.overlap, self._images(piece, len(batch.sample_ids))
        if piece.query and {"single", "cell"} & set(self.config.heads):
            inputs = batch.query.pixels, overlap.query_box, batch.query.flipped
            with part(QUERY):
                query = self.query_encoder(*(tensor[taken] for tensor in inputs))
        if piece.mosaic and "multi" in self.config.heads:
            canvases = self._images(piece, len(batch.mosaic))
            with part(MOSAIC):
                query["multi"] = self.query_encoder.forward_mosaic(batch.mosaic[canvases])
        keys = {name: made for name in ("single", "cell") if (made := getattr(prepared.keys, name)) is not None}
        with part(HEADS), torch.autocast(batch.query.pixels.device.type, enabled=False):
            losses = self._losses(query, keys, overlap.weight, taken)
        return losses, prepared.keys

    def prepare(self, batch: Batch) -> Prepared:
        """Boxes and keys of a batch; the keys set out for the other ranks, to arrive while the backward pass runs."""
        overlap = self._find_overlap(batch)
        with part(KEY), torch.inference_mode():
            keys = self.encode_keys(batch.key, overlap)
        # Copies, because autograd refuses to keep what inference mode made.
        single, cell = (keys[name].clone() if name in keys else None for name in ("single", "cell"))
        packed = torch.cat([part.flatten(1) for part in (single, cell) if part is not None], 1)
        return Prepared(
            overlap=overlap, keys=NewKeys(single=single, cell=cell, arriving=distributed.start_gather(packed))
        )

    @torch.no_grad()
    def encode_keys(self, key: View, overlap: Overlap) -> dict[str, Tensor]:
        """Keys of the key views in the order of the batch, normalized among other images than their queries were."""
        inputs = (key.pixels, overlap.key_box, key.flipped)
        if self.key_order is None or not self.training:
            return self.key_encoder(*inputs)
        if self.config.norm == "split":
            size = len(key.flipped) if not self._by_group else self.config.split_size
            made = [self.key_encoder(*(tensor[order] for tensor in inputs)) for order in self.key_order.split(size)]
            return {name: torch.cat([part[name] for part in made])[self.key_order_back] for name in made[0]}
        return self._encode_keys_over_ranks(inputs)

    def _images(self, piece: Piece, count: int) -> slice:
        """Which of `count` images, or mosaics, are of a piece."""
        if piece.group is None:
            return slice(0, count)
        each = count // self.query_encoder.num_groups
        return slice(piece.group * each, (piece.group + 1) * each)

    def _encode_keys_over_ranks(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Every rank encodes other ranks' images and sends their keys back (MoCo's shuffling BN); none gets more than its share."""
        pixels, boxes, flipped = inputs
        with part(WIRE):
            # As they lie in memory: channels last.
            pixels = distributed.exchange(pixels.permute(0, 2, 3, 1)[self.key_order], *self._key_counts)
            facts = torch.cat([boxes, flipped[:, None].to(boxes.dtype)], 1)
            facts = distributed.exchange(facts[self.key_order], *self._key_counts)
        keys = self.key_encoder(pixels.permute(0, 3, 1, 2), facts[:, :4], facts[:, 4] > 0)
        with part(WIRE):
            sent = torch.cat([made.flatten(1) for made in keys.values()], 1)
            back = distributed.exchange(sent, *reversed(self._key_counts))[self.key_order_back]
        back = back.split([made[0].numel() for made in keys.values()], 1)
        return {name: own.unflatten(1, made.shape[1:]) for own, (name, made) in zip(back, keys.items())}

    def _losses(self, query: dict[str, Tensor], keys: dict[str, Tensor], weight: Tensor, taken: slice) -> Losses:
        c, parts, top1 = self.config, {}, {}
        if "single" in query:
            logits = row_logits(query["single"], keys["single"][taken], self.key_queue.keys, c.temperature)
            parts["single"], top1["single"] = separate_terms(logits).mean(), logits.top1
        if "multi" in query:
            order = image_order(len(weight), self.views.tile, device=weight.device)
            each = len(order) * (taken.stop - taken.start) // len(weight)
            order = order[taken.start * len(order) // len(weight) :][:each].flatten()
            logits = row_logits(query["multi"].flatten(0, 1), keys["single"][order], self.key_queue.keys, c.temperature)
            parts["multi"], top1["multi"] = aggregate_groups(logits, 4, c.aggregate, None), logits.top1
        if "cell" in query:
            cells = query["cell"].flatten(0, 1), keys["cell"][taken].flatten(0, 1)
            logits = row_logits(*cells, self.cell_queue.keys, c.cell_temperature)
            parts["cell"], top1["cell"] = aggregate_groups(logits, c.cells, c.aggregate, weight[taken]), logits.top1
        share = (taken.stop - taken.start) / len(weight)
        if share != 1:
            parts, top1 = ({name: value * share for name, value in of.items()} for of in (parts, top1))
        total = torch.stack(list(parts.values())).sum()
        if distributed.world_size() > 1 and torch.is_grad_enabled():
            total = total + self._touch(query)
        return Losses(**{name: parts.get(name) for name in ("single", "multi", "cell")}, total=total, top1=top1)

    def _touch(self, query: dict[str, Tensor]) -> Tensor:
        """0, from every parameter that a piece leaves out: DDP waits for the gradients of all of them."""
        left_out = [
            p.sum() for name, head in self.query_encoder.heads.items() if name not in query for p in head.parameters()
        ]
        return 0 * torch.stack(left_out).sum() if left_out else 0

    def _find_overlap(self, batch: Batch) -> Overlap:
        query, key, v = batch.query, batch.key, self.views
        boxes = query.crop_box, query.flipped, key.crop_box, key.flipped
        return find_overlap(*boxes, v.view_size, v.overlap_min_side, v.overlap_min_iou)

    @torch.no_grad()
    def enqueue(self, new_keys: NewKeys) -> None:
        """The keys of every rank join the queues: images in batch order, all cells of an image in a row."""
        single, cell = new_keys.single, new_keys.cell
        if new_keys.arriving is not None:
            with part(WIRE):
                arrived = new_keys.arriving.wait()
            if single is not None:
                single, arrived = arrived.split((single.shape[1], arrived.shape[1] - single.shape[1]), 1)
            cell = None if cell is None else arrived.unflatten(1, cell.shape[1:])
        if single is not None:
            self.key_queue.enqueue(single)
        if cell is not None:
            self.cell_queue.enqueue(cell.flatten(0, 1))

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """key = m*key + (1-m)*query for every parameter, matched by name, in the weights' own float32."""
        keys, queries = self._followers
        with part(EMA):
            torch._foreach_lerp_(keys, queries, 1 - self.config.key_momentum)

    def _copy_as_key_encoder(self) -> Encoder:
        """The query encoder's twin without gradient: its instance head and its cell head (METHOD 3)."""
        twin = copy.deepcopy(self.query_encoder)
        if "multi" in twin.heads:
            multi = twin.heads.pop("multi")
            if "single" not in twin.heads:  # keys of tiles then come from the multi head's own follower
                twin.heads["single"] = multi
        return twin.requires_grad_(False)

    def _assign_keys_to_groups(self, rank_batch_size: int) -> None:
        """`key_order`: with norm = split, which image each slot of the key pass takes; with norm = shuffle, this rank's images by
        the rank that encodes their keys. On the device from the start, so no step copies it."""
        order = None
        if self.config.norm == "split":
            order = shuffle_order(rank_batch_size, self.config.split_size)
        elif self.config.norm == "shuffle":
            order, self._key_counts = exchange_order(rank_batch_size, distributed.world_size(), distributed.rank())
        self.register_buffer("key_order", order, persistent=False)
        self.register_buffer("key_order_back", None if order is None else order.argsort(), persistent=False)

    def _match_by_name(self) -> tuple[list[Tensor], list[Tensor]]:
        queries = dict(self.query_encoder.named_parameters())
        source = "heads.single." if "single" in self.query_encoder.heads else "heads.multi."
        pairs = [(p, queries[n.replace("heads.single.", source)]) for n, p in self.key_encoder.named_parameters()]
        return [key for key, _ in pairs], [query for _, query in pairs]

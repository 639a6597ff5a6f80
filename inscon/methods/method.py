"""What trainer, report, export and command line know of a method, and what methods share.

One step, in order:

    method.schedule(step, total)
    prepared = method.prepare(batch)                       # keys, targets: without gradient
    for piece in method.pieces(batch, prepared):           # each a graph of its own; losses and gradients add up
        piece.losses().total.backward()
    method.after_backward(prepared)                        # keys join the queues, which the backward pass still read
    optimizer.step()
    method.after_update()                                  # slow copies move
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inscon import distributed
from inscon.batch import Batch
from inscon.config import Config, ViewConfig
from inscon.nn.backbones import Backbone, build_backbone, check_side, facts_of
from inscon.nn.loss import row_logits, separate_terms
from inscon.nn.norm import KeyShuffle
from inscon.nn.queue import KeyQueue
from inscon.plan import ColorSpec, Grid, Mosaics, ViewSpec

NORM_GROUP = 32  # Images normalized together: a GPU's share of the paper's batch of 256 on 8.


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Of this rank's images, on the device."""

    total: Float[Tensor, ""]  # What is minimized.
    logged: dict[str, Float[Tensor, ""]]
    """Means over the images. "loss_NAME": a part of the total, before its weight. "top1_NAME": share of queries whose positive
    beats every negative, 0..1. "length_NAME": of a batch's mean embedding, 0..1; near 1 all images look alike."""


def add_up(terms: dict[str, tuple[Tensor, Tensor]], weights: Mapping[str, float | Tensor] | None = None) -> Losses:
    """Losses by name, each with its top-1 share, times their weights; all alike without `weights` (equation 4)."""
    weights = weights or dict.fromkeys(terms, 1.0)
    logged = {f"loss_{name}": loss.detach() for name, (loss, _) in terms.items()}
    logged |= {f"top1_{name}": share for name, (_, share) in terms.items()}
    return Losses(total=torch.stack([weights[name] * loss for name, (loss, _) in terms.items()]).sum(), logged=logged)


class Piece(NamedTuple):
    """A part of a step with a graph of its own."""

    name: str
    losses: Callable[[], Losses]


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Base of a method's own settings: a frozen dataclass, its fields flags with reasons."""

    norm_of_all: ClassVar[bool] = False
    """Whether BatchNorm is to see the whole batch (norm=auto is sync), as there are no keys that it could give away."""

    def resolved(self, config: Config) -> "MethodSettings":
        """The same with every None that depends on the batch filled in. ValueError for what does not go together."""
        return self

    def view_specs(self, views: ViewConfig) -> tuple[ViewSpec, ...]:
        """What is made of every image."""
        raise NotImplementedError

    def mosaics(self) -> Mosaics | None:
        """Which of the views lies on mosaics."""
        return None

    def memory(self, batch_size: int) -> int:
        """Steps that an image's key stays in a queue."""
        return 0

    def suited(self, images: int, batch_size: int, steps: int) -> dict[str, tuple[object, str]]:
        """What a set of so many images, four batches at least, and a run of so many steps want: fields, each with its reason."""
        return {}

    def build(self, config: Config, rank_batch_size: int) -> "Method":
        """The method, for a resolved `config` that holds these settings."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class JigsawSettings(MethodSettings):
    """Of methods with patches: a crop of their own, cut into 3x3 fields, and from each field a patch at a random place (PIRL)."""

    jigsaw_size: int = 255
    """Side that the crop is resized to before it is cut, px."""
    patch_size: int = 64
    """Side of a patch, px: a multiple of 16, at most a third of jigsaw_size."""
    jigsaw_scale: tuple[float, float] = (0.6, 1.0)
    """Range of the crop's share of the image area."""

    @property
    def patch_count(self) -> int:
        """P, of an image."""
        return Grid.cells**2

    def patches(self, views: ViewConfig, name: str, color: ColorSpec, shuffled: bool = False) -> ViewSpec:
        """The view `name`; `shuffled`: an image's patches come in a random order."""
        grid = Grid(patch=self.patch_size, shuffled=shuffled)
        return dataclasses.replace(
            views.spec(name), size=self.jigsaw_size, scale=self.jigsaw_scale, color=color, grid=grid
        )


class Method(nn.Module):
    """A method of pre-training. Submodules and buffers are what a checkpoint holds."""

    backbone: Backbone  # What is trained for others: exports, kNN, probe, attention maps, detectors.
    followers: "tuple[Follower, ...]" = ()  # Slow copies that move after every update.
    queues: dict[str, KeyQueue]  # Of keys, by the name of the loss that reads them; there may be none.

    def __init__(self):
        super().__init__()
        self.queues = {}

    def schedule(self, step: int, total_steps: int) -> None:
        """Before step `step` of `total_steps`, on the host: what changes over a run (momentum, loss weights).

        On a GPU the rest of a step is one CUDA graph, in which a Python number stays what it was when the graph was captured. So
        what changes is a 0-d buffer, `self.register_buffer("weight", torch.ones(()))`, and filled here: `self.weight.fill_(0.5)`.
        """

    def param_groups(self) -> list[dict]:
        """What the optimizer is given."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def prepare(self, batch: Batch):
        """What every piece needs and no gradient reaches."""
        return None

    def pieces(self, batch: Batch, prepared) -> list[Piece]:
        """Of a step, in order."""
        raise NotImplementedError

    def after_backward(self, prepared) -> None:
        """When all gradients are there."""

    def after_update(self) -> None:
        """When the weights have moved."""
        for follower in self.followers:
            follower.move()


class Follower:
    """A slow copy's weights: slow = m*slow + (1-m)*fast for every parameter, matched by name, in the weights' own precision. m is
    `momentum`, or what `schedule` has set last."""

    def __init__(self, slow: nn.Module, fast: nn.Module, momentum: float, renamed: Callable[[str], str] = str):
        by_name = dict(fast.named_parameters())
        self.slow = [parameter for _, parameter in slow.named_parameters()]
        self.fast = [by_name[renamed(name)] for name, _ in slow.named_parameters()]
        self.momentum = momentum
        self._share: Float[Tensor, ""] | None = None

    def schedule(self, momentum: float) -> None:
        """Of the next move; on the device, so that a captured one reads it."""
        self.momentum = momentum
        if self._share is None or self._share.device != self.slow[0].device:
            self._share = torch.empty((), dtype=self.slow[0].dtype, device=self.slow[0].device)
        self._share.fill_(1 - momentum)

    @torch.no_grad()
    def move(self) -> None:
        if self._share is None:
            torch._foreach_lerp_(self.slow, self.fast, 1 - self.momentum)
        else:
            apart = torch._foreach_sub(self.fast, self.slow)
            torch._foreach_mul_(apart, self._share)
            torch._foreach_add_(self.slow, apart)

    @property
    def fading(self) -> bool:
        """Whether a schedule has come so close to 1 that weights in float32 need not move any more."""
        return self._share is not None and self.momentum > 1 - 1e-5


def slow_copy(module: nn.Module) -> nn.Module:
    """A twin without gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """This rank's keys of one step, without gradient."""

    own: dict[str, Tensor]  # By name, each beginning with [B].
    queued: dict[str, Tensor]  # Those that join a queue, [B n D].
    arriving: Callable[[], Tensor] | None  # Those of all ranks, on their way; None on one process.


class KeyMethod(Method):
    """What MoCo and its kin share: a query encoder, a key encoder that follows, shuffled BatchNorm, queues of keys. A subclass
    names its encoder, adds queues, and says what its key encoder takes; both encoders return tensors by name."""

    encoder: Callable[[Backbone, MethodSettings], nn.Module]
    """Made of a backbone, which it keeps under that name, and the method's settings."""

    def __init__(self, config: Config, rank_batch_size: int):
        super().__init__()
        self.settings, model = config.method, config.model
        self.shuffle = KeyShuffle(model.norm, rank_batch_size, model.split_size)
        groups = rank_batch_size // model.split_size if model.norm == "split" else 1
        self.query_encoder = self.encoder(build_backbone(model.backbone, groups), self.settings)
        self.key_encoder = self.build_key_encoder()
        momentum = self.settings.key_momentum
        self.followers = (Follower(self.key_encoder, self.query_encoder, momentum, self.renamed),)

    def build_key_encoder(self) -> nn.Module:
        """The query encoder's twin, or those parts of it that keys need."""
        return slow_copy(self.query_encoder)

    def renamed(self, name: str) -> str:
        """Which parameter of the query encoder one of the key encoder follows."""
        return name

    @property
    def backbone(self) -> Backbone:
        return self.query_encoder.backbone

    def add_queue(self, name: str, size: int, embedding_dim: int, per_step: int) -> None:
        queue = self.queues[name] = KeyQueue(size, embedding_dim, per_step)
        self.add_module(f"queue_{name}", queue)

    def contrast(self, queries: Tensor, keys: Tensor, queue: str) -> tuple[Tensor, Tensor]:
        """Of rows [N D]: mean InfoNCE against their keys and a queue, and the share whose key beats every negative."""
        logits = row_logits(queries, keys, self.queues[queue].keys, self.settings.temperature)
        return separate_terms(logits).mean(), logits.top1

    def key_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the key encoder takes, each beginning with [B]."""
        return (batch.views["key"].pixels,)

    def queued(self, keys: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of the keys joins which queue, [B n D] each."""
        return {name: keys[name] if keys[name].ndim == 3 else keys[name][:, None] for name in self.queues}

    def encode_keys(self, batch: Batch) -> dict[str, Tensor]:
        """Keys in the order of the batch, normalized among other images than their queries are."""
        inputs = self.key_inputs(batch)
        return self.shuffle(self.key_encoder, *inputs) if self.training else self.key_encoder(*inputs)

    def prepare(self, batch: Batch) -> Keys:
        """The keys of a batch; they set out for the other ranks, to arrive while the backward pass runs."""
        with torch.inference_mode():
            keys = self.encode_keys(batch)
        keys = {name: made.clone() for name, made in keys.items()}  # autograd refuses to keep what inference mode made
        queued = self.queued(keys)
        packed = torch.cat([made.flatten(1) for made in queued.values()], 1)
        return Keys(own=keys, queued=queued, arriving=distributed.start_gather(packed))

    @torch.no_grad()
    def after_backward(self, prepared: Keys) -> None:
        """The keys of every rank join the queues: images in batch order, all keys of an image in a row."""
        queued = prepared.queued
        if prepared.arriving is not None:
            parts = prepared.arriving().split([made[0].numel() for made in queued.values()], 1)
            pairs = zip(parts, queued.items(), strict=True)
            queued = {name: part.unflatten(1, made.shape[1:]) for part, (name, made) in pairs}
        for name, keys in queued.items():
            self.queues[name].enqueue(keys.flatten(0, 1))


def need_strides(backbone: str, strides: Iterable[int], remedy: str = "set --backbone resnet50, say") -> None:
    """ValueError unless the network has maps of these strides, px."""
    found = facts_of(backbone).channels
    if not set(strides) <= set(found):
        needed, others = (", ".join(map(str, those)) for those in (strides, found))
        raise ValueError(f"maps of strides {needed} px are needed: {backbone} has others. Found: {others}; {remedy}")


def queue_size(name: str, asked: int | None, per_step: int) -> int:
    """`asked`, or 65536, in whole global batches, so that a step's keys always lie in one piece (METHOD 11)."""
    if asked is None:
        return max(65536 // per_step, 1) * per_step
    if asked < per_step or asked % per_step:
        remedy = f"set --{name.replace('_', '-')} {max(round(asked / per_step), 1) * per_step}"
        raise ValueError(f"{name} must be a multiple of the {per_step} keys of one step. Found: {asked}; {remedy}")
    return asked


def suited_queue(images: int, batch_size: int, steps: int, per_image: int = 1) -> int:
    """Keys of a quarter of the set, of a 256th of the run's steps, or 65536, in whole batches."""
    per_step = batch_size * per_image
    return max(min(images // 4 // batch_size, steps // 256, 65536 // per_step), 1) * per_step


def resolve(config: Config, world_size: int) -> Config:
    """Fill in every None that depends on the batch and the number of ranks, and check what only shows together: ValueError with the
    value found and what to set instead."""
    batch, model, of_four = config.optim.batch_size, config.model, config.method.mosaics() is not None
    unit = (4 if of_four else 1) * world_size
    if batch % unit:
        raise ValueError(
            f"batch_size must be a multiple of {'4 images (one mosaic) times ' if of_four else ''}{world_size} rank(s). Found: "
            f"{batch}; set --batch-size {max(batch // unit, 1) * unit}"
        )
    per_rank = batch // world_size
    norm = _norm(config, per_rank, world_size)
    if norm == "shuffle" and world_size == 1:
        raise ValueError("norm=shuffle is over ranks and needs at least 2. Found: 1 rank; set --norm split")
    if norm == "shuffle" and per_rank == 1:  # whose keys would be normalized as their queries, alone
        raise ValueError(f"norm=shuffle needs 2 images per rank. Found: 1; set --batch-size {2 * world_size} or more")
    split_size = _split_size(model.split_size, per_rank) if norm == "split" else None
    config = dataclasses.replace(config, model=dataclasses.replace(model, norm=norm, split_size=split_size))
    config = dataclasses.replace(config, method=config.method.resolved(config))
    mosaics, specs = config.method.mosaics(), config.method.view_specs(config.views)
    canvases = {2 * spec.side for spec in specs if mosaics and mosaics.tile == "full" and spec.name == mosaics.view}
    for side in sorted({spec.side for spec in specs} | canvases):
        check_side(model.backbone, side)
    return config


def _norm(config: Config, per_rank: int, world_size: int) -> str:
    asked = config.model.norm
    if config.method.norm_of_all:
        if asked in ("split", "shuffle"):
            raise ValueError(f"norm={asked} parts keys from their queries, and this method has none; set --norm sync")
        return "sync" if asked == "auto" else asked
    if not facts_of(config.model.backbone).has_batch_norm:
        return "none"
    if asked == "auto":
        alone = world_size == 1 or (per_rank >= 4 * NORM_GROUP and per_rank % NORM_GROUP == 0)
        return "split" if alone else "shuffle"
    return asked


def _split_size(asked: int | None, per_rank: int) -> int:
    if asked is None:
        groups = max(per_rank // NORM_GROUP, min(4, per_rank // 4))
        while groups > 1 and per_rank % (4 * groups):
            groups -= 1
        asked = per_rank // groups if groups > 1 else 4
    if asked % 4 or per_rank % asked or per_rank // asked < 2:
        raise ValueError(
            f"norm=split parts the {per_rank} images of a rank into at least 2 BatchNorm groups, each a multiple of 4. Found: "
            f"groups of {asked}; set --split-size 4, and --batch-size to at least 8 images per rank, a multiple of 4"
        )
    return asked

"""BatchNorm of groups of images, with the addition of a residual and the ReLU after it, in few passes over memory (Triton).

A step of a ResNet is bound by memory: plain kernels read and write each map for the statistics, the normalization, the addition
and the ReLU, and BatchNorm in groups adds a copy. Here a map, channels last, is the matrix [groups, rows, channels] as it lies in
memory; it is read once for the statistics and once to be normalized, added to and cut off. Products of both passes are summed
in float32 whatever the map's type. Statistics are taken of slices of rows, shifted by a slice's first row, and combined as Chan,
Golub and LeVeque do (The American Statistician 37, 1983), so that a large mean costs no digits.
"""

import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inscon import distributed, guard
from inscon.nn.norm import SplitBatchNorm2d

TILE, WIDE, WARPS = 4096, 128, 4
"""Elements of a tile, its columns at most, and its warps: the fastest of those tried on an H200."""
REDUCED, NARROW, REDUCING = 1024, 64, 4
"""Likewise of a tile in a reduction."""
PROGRAMS = 1056
"""Of a reduction, about: a group's rows are cut into as many slices as keep a card with 132 multiprocessors busy."""
COMBINED = 4096
"""Figures of a tile in which slices are combined."""
kernel = triton.jit(do_not_specialize=("rows", "slices", "rounds", "length", "tiles", "of_all"))
"""Of these numbers no kernel is compiled anew: a start would take far longer."""


@triton.jit
def _tile(group, row, column, rows, channels):
    """(places, which of them exist) of a tile of rows of a group."""
    there = (row < rows)[:, None] & (column < channels)[None, :]
    return (group * rows + row).to(tl.int64)[:, None] * channels + column[None, :], there


@kernel
def _of_slices(
    x, partial, rows, channels, slices, rounds, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of a slice of a group's rows, `rounds` tiles: partial [2, groups, slices, channels]."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group, piece = tl.program_id(0) // slices, tl.program_id(0) % slices
    first = piece * rounds * ROWS
    count = tl.minimum(rows - first, rounds * ROWS)
    start = (group * rows + first).to(tl.int64) * channels
    shift = tl.load(x + start + column, mask=column < channels, other=0.0).to(tl.float32)
    totals = tl.zeros([ROWS, COLUMNS], tl.float32)  # added up at the end: threads need not meet in every round
    squared = tl.zeros([ROWS, COLUMNS], tl.float32)
    number = 0
    while number < rounds:
        places, there = _tile(group, first + number * ROWS + tl.arange(0, ROWS), column, rows, channels)
        apart = tl.where(there, tl.load(x + places, mask=there, other=0.0).to(tl.float32) - shift[None, :], 0.0)
        totals += apart
        squared += apart * apart
        number += 1
    total, squares = tl.sum(totals, 0), tl.sum(squared, 0)
    mean = total / count
    place = tl.program_id(0) * channels + column
    tl.store(partial + place, shift + mean, mask=column < channels)
    second = partial + tl.num_programs(0) * channels
    tl.store(second + place, squares - total * mean, mask=column < channels)


@kernel
def _of_group(partial, mean, variance, rows, channels, slices, length, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and variance [groups, channels] of all slices of a group, `length` rows each but the last."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    piece = tl.arange(0, PIECES)
    places, there = _tile(tl.program_id(0), piece, column, slices, channels)
    second = partial + tl.num_programs(0) * slices * channels
    means = tl.load(partial + places, mask=there, other=0.0)
    squares = tl.load(second + places, mask=there, other=0.0)
    counts = tl.maximum(tl.minimum(rows - piece * length, length), 0).to(tl.float32)[:, None]
    of_all = tl.sum(means * counts, 0) / rows
    apart = tl.where(there, means - of_all[None, :], 0.0)
    place = tl.program_id(0) * channels + column
    tl.store(mean + place, of_all, mask=column < channels)
    tl.store(variance + place, tl.sum(squares + counts * apart * apart, 0) / rows, mask=column < channels)


@triton.jit
def _follow(
    running_mean, running_var, tracked, mean, variance, channels, momentum, unbiased,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Running statistics, moved by each group in order, and the number of batches."""
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + 1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    slow_mean = tl.load(running_mean + column, mask=inside)
    slow_var = tl.load(running_var + column, mask=inside)
    for group in range(GROUPS):
        slow_mean += momentum * (tl.load(mean + group * channels + column, mask=inside) - slow_mean)
        slow_var += momentum * (tl.load(variance + group * channels + column, mask=inside) * unbiased - slow_var)
    tl.store(running_mean + column, slow_mean, mask=inside)
    tl.store(running_var + column, slow_var, mask=inside)


@triton.jit
def _of_channels(mean, variance, weight, bias, group, column, channels, eps):
    """(mean, 1 / standard deviation, weight, bias) of a tile's columns, each [1, COLUMNS], in float32."""
    inside = column < channels
    center = tl.load(mean + group * channels + column, mask=inside, other=0.0)
    scale = 1.0 / tl.sqrt(tl.load(variance + group * channels + column, mask=inside, other=1.0) + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return center[None, :], scale[None, :], factor[None, :], shift[None, :]


@triton.jit
def _hat(x, places, there, center, scale):
    """x-hat of a tile, in float32."""
    return (tl.load(x + places, mask=there, other=0.0).to(tl.float32) - center) * scale


@kernel
def _forward(
    x, residual, y, mean, variance, weight, bias, rows, channels, tiles, eps,
    ADD: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group, row = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    places, there = _tile(group, row, column, rows, channels)
    center, scale, factor, shift = _of_channels(mean, variance, weight, bias, group, column, channels, eps)
    made = _hat(x, places, there, center, scale) * factor + shift
    if ADD:
        made += tl.load(residual + places, mask=there, other=0.0).to(tl.float32)
    if RELU:
        made = tl.where(made < 0, 0.0, made)  # which NaN passes, as it does PyTorch's
    tl.store(y + places, made, mask=there)


@triton.jit
def _gradient(y, made, gradient, places, there, ADD: tl.constexpr, RELU: tl.constexpr):
    """Of what is before the ReLU. Without a residual its sign is known from x, and y need not be read."""
    arrived = tl.load(gradient + places, mask=there, other=0.0).to(tl.float32)
    if RELU:
        if ADD:
            made = tl.load(y + places, mask=there, other=0.0).to(tl.float32)
        arrived = tl.where(made > 0, arrived, 0.0)
    return arrived


@kernel
def _backward_of_slices(
    x, y, gradient, partial, mean, variance, weight, bias, rows, channels, slices, rounds, eps,
    ADD: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of the gradient times x-hat, over a slice: partial [2, groups, slices, channels]."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group, first = tl.program_id(0) // slices, (tl.program_id(0) % slices) * rounds * ROWS
    center, scale, factor, shift = _of_channels(mean, variance, weight, bias, group, column, channels, eps)
    totals = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    number = 0
    while number < rounds:
        places, there = _tile(group, first + number * ROWS + tl.arange(0, ROWS), column, rows, channels)
        hat = _hat(x, places, there, center, scale)
        arrived = _gradient(y, hat * factor + shift, gradient, places, there, ADD, RELU)
        totals += arrived
        products += arrived * hat
        number += 1
    place = tl.program_id(0) * channels + column
    tl.store(partial + place, tl.sum(totals, 0), mask=column < channels)
    tl.store(partial + tl.num_programs(0) * channels + place, tl.sum(products, 0), mask=column < channels)


@kernel
def _backward(
    x, y, gradient, of_x, of_residual, sums, mean, variance, weight, bias, rows, channels, tiles, eps, of_all,
    ADD: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of the residual; `sums` [2, groups, channels] over the `of_all` rows that were normalized together."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group, row = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    places, there = _tile(group, row, column, rows, channels)
    center, scale, factor, shift = _of_channels(mean, variance, weight, bias, group, column, channels, eps)
    hat = _hat(x, places, there, center, scale)
    arrived = _gradient(y, hat * factor + shift, gradient, places, there, ADD, RELU)
    if ADD:
        tl.store(of_residual + places, arrived, mask=there)
    place = group * channels + column
    products = sums + (tl.num_programs(0) // tiles) * channels
    level = tl.load(sums + place, mask=column < channels, other=0.0) / of_all
    slope = tl.load(products + place, mask=column < channels, other=0.0) / of_all
    tl.store(of_x + places, factor * scale * (arrived - level[None, :] - hat * slope[None, :]), mask=there)


@kernel
def _summed(
    partial, sums, of_bias, of_weight, channels, slices, GROUPS: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """`partial` [2, groups, slices, channels] added up to sums [2, groups, channels], and those to both parameters' gradients."""
    column, half = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    total = tl.zeros([COLUMNS], tl.float32)
    for group in range(GROUPS):
        places, there = _tile(half * GROUPS + group, tl.arange(0, PIECES), column, slices, channels)
        found = tl.sum(tl.load(partial + places, mask=there, other=0.0), 0)
        tl.store(sums + (half * GROUPS + group) * channels + column, found, mask=column < channels)
        total += found
    tl.store((of_weight if half else of_bias) + column, total, mask=column < channels)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, groups, eps, relu, synced):
        shape = _Shape(x, groups)
        mean, variance = shape.statistics(x)
        if synced:
            mean, variance = _of_all_ranks(mean, variance)
        y, add = torch.empty_like(x), residual is not None
        _forward[shape.tiled](
            x, residual if add else x, y, mean, variance, weight, bias, shape.rows, shape.channels, shape.tiles, eps,
            ADD=add, RELU=relu, **shape.tile,
        )  # fmt: skip
        ctx.save_for_backward(x, y if add and relu else None, weight, bias, mean, variance)
        ctx.settings = groups, eps, relu, synced, add
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _mean, _variance):
        (x, y, *others), (groups, eps, relu, synced, add) = ctx.saved_tensors, ctx.settings
        weight, bias, mean, variance = others
        shape, gradient = _Shape(x, groups), channels_last(gradient)
        y, kind = x if y is None else y, {"ADD": add, "RELU": relu}
        known = mean, variance, weight, bias, shape.rows, shape.channels
        partial = x.new_empty(2, groups, shape.slices, shape.channels, dtype=torch.float32)
        _backward_of_slices[shape.sliced](
            x, y, gradient, partial, *known, shape.slices, shape.rounds, eps, **kind, **shape.reduced
        )  # fmt: skip
        sums, (of_bias, of_weight) = partial.new_empty(2, groups, shape.channels), partial.new_empty(2, shape.channels)
        _summed[(triton.cdiv(shape.channels, shape.combined), 2)](
            partial, sums, of_bias, of_weight, shape.channels, shape.slices,
            GROUPS=groups, PIECES=shape.pieces, COLUMNS=shape.combined,
        )  # fmt: skip
        ranks = distributed.world_size() if synced else 1
        if synced:
            sums = distributed.gather(sums[None]).sum(0)
        of_x, of_residual = torch.empty_like(x), torch.empty_like(x) if add else None
        _backward[shape.tiled](
            x, y, gradient, of_x, of_residual if add else of_x, sums, *known, shape.tiles, eps, ranks * shape.rows,
            **kind, **shape.tile,
        )  # fmt: skip
        return of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype), of_residual, None, None, None, None


class _Shape:
    """A map as groups of rows of channels, and how kernels go through it."""

    def __init__(self, x: Tensor, groups: int):
        self.groups, self.channels = groups, x.shape[1]
        self.rows = x.numel() // (groups * self.channels)
        self.tile, columns, self.tiles = self._tiles(TILE, WIDE, WARPS)
        self.reduced, reduced_columns, tiles = self._tiles(REDUCED, NARROW, REDUCING)
        self.rounds = triton.cdiv(tiles, max(PROGRAMS // (groups * reduced_columns), 1))
        self.slices = triton.cdiv(tiles, self.rounds)
        self.tiled, self.sliced = (groups * self.tiles, columns), (groups * self.slices, reduced_columns)
        self.pieces = triton.next_power_of_2(self.slices)
        self.combined = min(NARROW, max(COMBINED // self.pieces, 1))

    def _tiles(self, size: int, widest: int, warps: int) -> tuple[dict[str, int], int, int]:
        """What a kernel gets for its tiles, and how many of them there are across and down."""
        columns = min(triton.next_power_of_2(self.channels), widest)
        found = {"ROWS": size // columns, "COLUMNS": columns, "num_warps": warps}
        return found, triton.cdiv(self.channels, columns), triton.cdiv(self.rows, found["ROWS"])

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [groups, channels], float32."""
        partial = x.new_empty(2, self.groups, self.slices, self.channels, dtype=torch.float32)
        mean, variance = partial.new_empty(2, self.groups, self.channels)
        _of_slices[self.sliced](
            x, partial, self.rows, self.channels, self.slices, self.rounds, **self.reduced
        )  # fmt: skip
        _of_group[(self.groups, triton.cdiv(self.channels, self.combined))](
            partial, mean, variance, self.rows, self.channels, self.slices, self.rounds * self.reduced["ROWS"],
            PIECES=self.pieces, COLUMNS=self.combined,
        )  # fmt: skip
        return mean, variance


def _of_all_ranks(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Of as many rows on every rank."""
    means, variances = distributed.gather(torch.stack([mean, variance])[None]).unbind(1)
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def batch_norm(
    x: Float[Tensor, "N F h w"],
    weight: Float[Tensor, "F"],
    bias: Float[Tensor, "F"],
    running: tuple[Tensor, Tensor, Tensor],
    *,
    groups: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Float[Tensor, "N F h w"] | None = None,
    relu: bool = False,
    synced: bool = False,
) -> Float[Tensor, "N F h w"]:
    """relu(BatchNorm(x) + residual), of each of `groups` equal, contiguous parts of the batch, in training.

    Args:
        x: float16, bfloat16 or float32; channels last in memory, or copied to be so. The result has its type.
        running: mean and variance [F], float32, moved by every group in order with `momentum`; the number of batches, int64.
        synced: statistics are those of all ranks, each of which has as many images.
    """
    residual = None if residual is None else channels_last(residual).to(x.dtype)
    of_all = x.numel() // (groups * x.shape[1]) * (distributed.world_size() if synced else 1)
    with torch.cuda.device_of(x):
        y, mean, variance = _BatchNorm.apply(channels_last(x), weight, bias, residual, groups, eps, relu, synced)
        _follow[(triton.cdiv(x.shape[1], WIDE),)](
            *running, mean, variance, x.shape[1], momentum, of_all / max(of_all - 1, 1), GROUPS=groups, COLUMNS=WIDE
        )
    return y


NORMS = (nn.BatchNorm2d, SplitBatchNorm2d)


class FusedBatchNorm2d(SplitBatchNorm2d):
    """`SplitBatchNorm2d` with the addition of a residual and the ReLU after it; in eval mode as PyTorch does them."""

    relu = False
    synced = False

    def forward(self, x: Float[Tensor, "N F h w"], residual: Tensor | None = None) -> Float[Tensor, "N F h w"]:
        if not self.training:
            made = super().forward(x)
            made = made if residual is None else made + residual
            return F.relu(made) if self.relu else made
        self.check_divides(x)
        running = self.running_mean, self.running_var, self.num_batches_tracked
        return batch_norm(
            x, self.weight, self.bias, running, groups=self.num_groups, momentum=self.momentum_of_group, eps=self.eps,
            residual=residual, relu=self.relu, synced=self.synced,
        )  # fmt: skip


def _basic_block(self, x: Tensor) -> Tensor:
    identity = x if self.downsample is None else self.downsample(x)
    return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


def _bottleneck(self, x: Tensor) -> Tensor:
    identity = x if self.downsample is None else self.downsample(x)
    return self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))), identity)


@functools.cache
def _fused_class(kind: type) -> type:
    return type(f"Fused{kind.__name__}", (kind,), {"forward": _bottleneck if kind.expansion == 4 else _basic_block})


def _is(module: nn.Module, *names: str) -> bool:
    """Whether it is what torchvision's or timm's ResNets call so."""
    return (
        type(module).__module__ in ("torchvision.models.resnet", "timm.models.resnet")
        and type(module).__name__ in names
    )


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is convolutions, BatchNorm, ReLU and an addition, and nothing else; its shortcut may average."""
    known = (nn.Conv2d, nn.ReLU, nn.Identity, *NORMS)
    return all(
        type(part) in known or (type(part) in (nn.Sequential, nn.AvgPool2d) and name.startswith("downsample"))
        for name, part in list(block.named_modules())[1:]
    )


def fuse(network: nn.Module, synced: bool = False) -> int:
    """Have the blocks of a ResNet of torchvision's or timm's normalize, add and cut off at once; how many there were.

    Names and tensors stay as they are. BatchNorm elsewhere is fused by itself, with the ReLU of the stem.
    """
    blocks = [module for module in network.modules() if _is(module, "BasicBlock", "Bottleneck") and _is_plain(module)]
    for block in blocks:
        block.__class__ = _fused_class(type(block))
        for norm in (block.bn1, block.bn2, getattr(block, "bn3", None)):
            if norm is not None:
                _fuse_norm(norm).relu = True
    for stem in (module for module in network.modules() if _is(module, "ResNet")):
        name = "relu" if hasattr(stem, "relu") else "act1"
        if type(stem.bn1) in NORMS and type(getattr(stem, name)) is nn.ReLU:
            _fuse_norm(stem.bn1).relu = True
            setattr(stem, name, nn.Identity())
    for module in network.modules():
        if type(module) in NORMS:
            _fuse_norm(module)
        if isinstance(module, FusedBatchNorm2d):
            module.synced = synced
    return len(blocks)


def _fuse_norm(norm: nn.BatchNorm2d) -> FusedBatchNorm2d:
    norm.num_groups = getattr(norm, "num_groups", 1)
    norm.__class__ = FusedBatchNorm2d
    return norm


CHECKED = (8, 80, 72, 64)
"""Of the map that is tried at the start: slices of several rounds, and channels that do not fill their last tile."""
DIGITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""By which results may differ from PyTorch's in float32, in the largest one."""


@functools.cache
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not serve on `device`, in a few words; None where they make of a map of `dtype` what PyTorch makes of it
    in float32, with and without a residual: values, gradients and running statistics."""
    try:
        apart = max(_apart(device, dtype, add) for add in (True, False))
        return None if apart < DIGITS[dtype] else f"their results are {apart:.1g} away from PyTorch's"
    except Exception as error:
        return guard.kind_and_first_line(error)


def _apart(device: torch.device, dtype: torch.dtype, add: bool) -> float:
    """The largest difference from PyTorch's in its tensor's largest value; inf where there is a value that is none."""
    maps = [torch.randn(CHECKED, device=device).to(dtype) for _ in range(1 + add)]
    given = [channels_last(x) for x in maps] + [torch.randn(CHECKED[1], device=device) for _ in range(2)]
    found = []
    for wide in (False, True):
        *maps, weight, bias = leaves = [(x.float() if wide else x).clone().requires_grad_() for x in given]
        running = torch.zeros_like(bias), torch.ones_like(bias), torch.zeros((), dtype=torch.int64, device=device)
        x, residual = maps if add else (*maps, None)
        if wide:
            settings = {"weight": weight, "bias": bias, "training": True}
            y = torch.cat([F.batch_norm(part, *running[:2], **settings) for part in x.chunk(2)])
            y = (y + residual if add else y).relu()
        else:
            y = batch_norm(x, weight, bias, running, groups=2, residual=residual, relu=True)
        # The output is its own gradient, which is 0 where ReLU's begins.
        found.append([y, *running[:2], *torch.autograd.grad(y, leaves, y.detach())])
    apart = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*found)]).max().item()
    return apart if math.isfinite(apart) else math.inf

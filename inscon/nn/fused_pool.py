"""The max pooling of a ResNet's stem, 3x3 with a stride of 2, in one pass over memory each way (Triton).

PyTorch keeps the map and 8 bytes per window for the backward pass, 7 % of all that a ResNet-50 keeps; here it is one byte, the
place in the window. A pixel's gradient is gathered from the windows that it is in, always in the same order.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inscon import guard
from inscon.nn.fused_norm import channels_last

TILE, WIDE = 2048, 128
"""Elements of a tile, its columns at most."""
FORWARD, BACKWARD = 8, 4
"""Warps of a tile. Threads with 8 and 16 elements take the fewest instructions for each, as compiled for an H200; not timed."""
kernel = triton.jit(do_not_specialize=("of_height", "of_width", "height", "width", "pixels"))


@triton.jit
def _pixels(height, width, pixels, ROWS: tl.constexpr):
    """This program's pixels of maps [images, height, width]: (number, which of them exist, image, row, column)."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return pixel, pixel < pixels, pixel // (height * width), pixel // width % height, pixel % width


@triton.jit
def _places(pixel, there, channels, COLUMNS: tl.constexpr):
    """(places, which of them exist) of this program's channels of pixels."""
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return pixel.to(tl.int64)[:, None] * channels + channel[None, :], there[:, None] & (channel < channels)[None, :]


@kernel
def _max_of_windows(
    x, y, chosen, of_height, of_width, height, width, pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The largest of each window, NaN where there is one, and its place in the window, 0 to 8: the first of equal ones, any of
    a window with NaN."""
    pixel, there, image, row, column = _pixels(height, width, pixels, ROWS)
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    where = tl.zeros([ROWS, COLUMNS], tl.int32)
    for place in tl.static_range(9):
        down, right = 2 * row + place // 3 - 1, 2 * column + place % 3 - 1
        inside = there & (down >= 0) & (down < of_height) & (right >= 0) & (right < of_width)
        places, found = _places((image * of_height + down) * of_width + right, inside, channels, COLUMNS)
        value = tl.load(x + places, mask=found, other=float("-inf")).to(tl.float32)
        where = tl.where(value > best, place, where)
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    places, found = _places(pixel, there, channels, COLUMNS)
    tl.store(y + places, best, mask=found)
    tl.store(chosen + places, where, mask=found)


@kernel
def _gradient_of_windows(
    gradient, chosen, of_x, of_height, of_width, height, width, pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Of each pixel, from the windows that it is in, four at most."""
    pixel, there, image, row, column = _pixels(height, width, pixels, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for number in tl.static_range(4):
        down, right = row // 2 + number // 2, column // 2 + number % 2
        at_row, at_column = row + 1 - 2 * down, column + 1 - 2 * right  # in that window; -1: not in it
        inside = there & (down < of_height) & (right < of_width) & (at_row >= 0) & (at_column >= 0)
        places, found = _places((image * of_height + down) * of_width + right, inside, channels, COLUMNS)
        mine = tl.load(chosen + places, mask=found, other=9) == (3 * at_row + at_column)[:, None]
        # Not loaded by that mask, which would make a load of each element.
        total += tl.where(mine, tl.load(gradient + places, mask=found, other=0.0).to(tl.float32), 0.0)
    places, found = _places(pixel, there, channels, COLUMNS)
    tl.store(of_x + places, total, mask=found)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape, sides = x.shape, ((side + 1) // 2 for side in x.shape[2:])
        y = torch.empty(*x.shape[:2], *sides, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        chosen = torch.empty_like(y, dtype=torch.uint8)
        _each_pixel(y, _max_of_windows, FORWARD, x, y, chosen, *x.shape[2:])
        ctx.save_for_backward(chosen)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (chosen,), gradient = ctx.saved_tensors, channels_last(gradient)
        of_x = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last)
        _each_pixel(of_x, _gradient_of_windows, BACKWARD, gradient, chosen, of_x, *gradient.shape[2:])
        return of_x


def _each_pixel(made: Tensor, work: triton.JITFunction, warps: int, *given: object) -> None:
    """Have `work` make each pixel of `made`."""
    images, channels, height, width = made.shape
    columns = min(triton.next_power_of_2(channels), WIDE)
    rows, pixels = TILE // columns, images * height * width
    with torch.cuda.device_of(made):
        work[(triton.cdiv(pixels, rows), triton.cdiv(channels, columns))](
            *given, height, width, pixels, channels, ROWS=rows, COLUMNS=columns, num_warps=warps
        )  # fmt: skip


class FusedMaxPool2d(nn.MaxPool2d):
    """3x3 with a stride of 2 and a padding of 1; in eval mode as PyTorch does it. The result is channels last."""

    def forward(self, x: Float[Tensor, "N F h w"]) -> Float[Tensor, "N F p q"]:
        return _MaxPool.apply(channels_last(x)) if self.training else super().forward(x)


def fuse(network: nn.Module) -> None:
    """Have all such poolings done by these kernels; any others stay as they are."""
    of_stem = nn.MaxPool2d(3, 2, 1).extra_repr()
    for pool in network.modules():
        if type(pool) is nn.MaxPool2d and pool.extra_repr() == of_stem and not pool.return_indices:
            pool.__class__ = FusedMaxPool2d


@functools.cache
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not serve on `device`, in a few words; None where they make of distinct values of `dtype` what PyTorch
    makes, and count for each in how many windows it was the largest. With the channels of a ResNet's stem, so that nothing is
    compiled for this alone."""
    try:
        order = torch.rand(3, 64, 16 * 15, device=device).argsort()
        values = order.view(3, 64, 16, 15).to(dtype)  # exact in any
        x, twin = (values.clone().requires_grad_() for _ in range(2))
        made, expected = FusedMaxPool2d(3, 2, 1)(x), F.max_pool2d(twin, 3, 2, 1)
        made.sum().backward(), expected.sum().backward()
        same = torch.equal(made, expected) and torch.equal(x.grad, twin.grad)
        return None if same else "their results are not PyTorch's"
    except Exception as error:
        return guard.kind_and_first_line(error)

"""The device tail: jitter, gray, blur and normalization of a batch, each sample by its own row of the plan.

The levels follow PIL's operation by operation (truncated after each blend, 8-bit hue and saturation, the three box blurs
of its GaussianBlur), as pipelines/kernels.py does for CPUs; see docs/parity.md. Whatever depends on the plan is worked
out on the host beforehand and copied without waiting, so nothing here makes the host wait for the device. Batches stay
[B S S 3] throughout, which is channels-last already.
"""

import functools

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from inscon.plan import BRIGHTNESS, CONTRAST, GRAY, HUE, NEVER, SATURATION, ViewPlan
from pipelines.feed import to_device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
LUMA = (19595.0, 38470.0, 7471.0)
"""Rec. 601 weights in 1/65536, as PIL's conversion to L."""
LEVEL = float(np.float32(1 / 255))
"""By which a level becomes a share; in float32, as PyTorch multiplies by a number."""
BLUR_PASSES = 3  # PIL's GaussianBlur is this many box blurs along each axis
BLUR_BITS = 24  # fixed point of their weights


def normalize(
    views: UInt8[Tensor, "B S S 3"] | Float[Tensor, "B S S 3"], dtype: torch.dtype
) -> Float[Tensor, "B 3 S S"]:
    """Levels 0..255 to zero mean and unit variance by ImageNet's figures; the result is channels-last in memory."""
    count, side = views.shape[:2]
    subtract, multiply = (to_device(row, views.device) for row in normalization(side))
    # Whole rows of S*3: an innermost dimension of 3 would leave nothing to vectorize. Subtracted first, so that there is
    # no product and sum to be fused on one machine and not on the next: the same bits as the compiled tail's, anywhere.
    rows = views.reshape(count, side, side * 3).to(torch.float32)
    rows = torch.sub(rows, subtract).mul_(multiply).to(dtype)
    return rows.view(count, side, side, 3).permute(0, 3, 1, 2)


@functools.cache
def normalization(side: int) -> tuple[np.ndarray, np.ndarray]:
    """What to subtract from a row of `side` px, and by what to multiply the rest: [3 side] float32 each."""
    return tuple(
        np.tile(np.array(row, np.float32), side) for row in ([255 * m for m in MEAN], [1 / (255 * s) for s in STD])
    )


def color_views(views: UInt8[Tensor, "B S S 3"], plan: ViewPlan, dtype: torch.dtype) -> Float[Tensor, "B 3 S S"]:
    """Execute `plan`'s color operations, blur and solarize on crops that are already flipped, and normalize them."""
    levels = blur(jitter(views.to(torch.float32), plan), plan.blur_sigma)
    return normalize(solarize(levels, plan.solarize), dtype)


def solarize(levels: Float[Tensor, "B S S 3"], threshold: np.ndarray) -> Float[Tensor, "B S S 3"]:
    """Invert levels from `threshold [B]` on, as PIL's ImageOps.solarize."""
    if (threshold >= NEVER).all():
        return levels
    return torch.where(levels < to_device(threshold, levels.device).view(-1, 1, 1, 1), levels, 255 - levels)


def jitter(levels: Float[Tensor, "B S S 3"], plan: ViewPlan) -> Float[Tensor, "B S S 3"]:
    """The color operations of `plan`, slot by slot; `levels` are whole numbers 0..255, before and after."""
    for operations in plan.color_ops.T:
        if np.isin(operations, (BRIGHTNESS, CONTRAST, SATURATION, GRAY)).any():
            levels = _blend(levels, operations, plan.factors)
        turned = np.flatnonzero(operations == HUE)
        if len(turned):
            which = to_device(turned, levels.device)
            turns = np.trunc(plan.factors[turned, HUE - 1].astype(np.float64) * 255).astype(np.float32)
            shift = to_device(turns, levels.device)
            levels = levels.index_copy(0, which, shift_hue(levels[which], shift.view(-1, 1, 1)))
    return levels


def _blend(levels: Tensor, operations: np.ndarray, factors: np.ndarray) -> Tensor:
    """base + factor * (levels - base), where base is 0, the mean gray of the view, or the gray of each pixel."""
    known = {BRIGHTNESS: factors[:, 0], CONTRAST: factors[:, 1], SATURATION: factors[:, 2], GRAY: 0}
    factor = np.select([operations == operation for operation in known], list(known.values()), 1)
    per_pixel = (operations == SATURATION) | (operations == GRAY)
    weights = np.stack([factor, operations == CONTRAST, per_pixel]).astype(np.float32)
    factor, by_mean, by_pixel = to_device(weights, levels.device).view(3, -1, 1, 1, 1)
    gray = gray_levels(levels)
    # In float64: in float32 a mean near one half would round to the other whole level now and then. Not by mean(), which on a
    # GPU multiplies by a reciprocal.
    total = gray.sum((1, 2, 3), keepdim=True, dtype=torch.float64)
    mean = torch.floor(total / torch.full_like(total, gray[0].numel()) + 0.5).float()
    base = by_mean * mean + by_pixel * gray
    return (levels - base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def gray_levels(levels: Float[Tensor, "B S S 3"]) -> Float[Tensor, "B S S 1"]:
    """PIL's L of RGB levels; all sums are whole numbers below 2**24, exact in float32."""
    red, green, blue = (levels[..., c : c + 1] * weight for c, weight in enumerate(LUMA))
    return torch.floor((red + green + blue + 32768) / 65536)


def shift_hue(levels: Float[Tensor, "n S S 3"], shift: Float[Tensor, "n 1 1"]) -> Float[Tensor, "n S S 3"]:
    """Turn the hue by `shift` 255ths of the circle through PIL's 8-bit HSV.

    In float32 alone and without a table, as `pipelines.kernels.shift_hue`, whose docstring tells how: no level of any
    color differs from PIL's.
    """
    red, green, blue = levels.unbind(-1)
    value = levels.amax(-1)
    span = value - levels.amin(-1)
    reds, greens, blues = value - red, value - green, value - blue
    red_leads, green_leads = reds == 0, greens == 0
    before = torch.where(red_leads, blues, torch.where(green_leads, reds, greens))
    after = torch.where(red_leads, greens, torch.where(green_leads, blues, reds))
    base = torch.where(red_leads, 0.0, torch.where(green_leads, 2.0, 4.0))
    quotient, colored = torch.minimum(before, after) / span.clamp(min=1), span.clamp(max=1)
    turn = torch.where(before >= after, (base + colored) - quotient, (base - colored) + quotient)
    turn = turn / turn.new_full((), 6)  # by a tensor: on a GPU a number would be multiplied by as its reciprocal
    turn = torch.where(turn < 0, turn + 1, turn)
    hue = torch.remainder(torch.floor(turn * 255) + shift, 256) * 6
    saturation = torch.floor(span / value.clamp(min=1) * 255) * LEVEL
    from_red = (510 - (hue - 765).abs()).clamp(0, 255) * LEVEL
    from_green, from_blue = (((hue - center).abs() - 255).clamp(0, 255) * LEVEL for center in (510, 1020))
    channels = (torch.floor(value * (1 - saturation * w) + 0.5) for w in (from_red, from_green, from_blue))
    return torch.stack(tuple(channels), -1)


def blur(levels: Float[Tensor, "B S S 3"], sigma: np.ndarray) -> Float[Tensor, "B S S 3"]:
    """PIL's GaussianBlur(radius=sigma) of each sample whose `sigma [B]`, px, is not 0; borders repeat the last pixel.

    Three box blurs along each axis, each rounded to whole levels.
    """
    blurred = np.flatnonzero(sigma > 0)
    if not len(blurred):
        return levels
    which = to_device(blurred, levels.device)
    taps = to_device(box_taps(sigma[blurred]), levels.device)
    made = levels[which].to(torch.int32)
    for axis in (2, 1):
        for _ in range(BLUR_PASSES):
            made = _box(made, taps, axis)
    return levels.index_copy(0, which, made.to(levels.dtype))


def _box(levels: Int[Tensor, "n S S 3"], taps: Int[Tensor, "n T"], axis: int) -> Int[Tensor, "n S S 3"]:
    """A weighted sum of shifted copies, rounded. No convolution: cuDNN would round to TF32 and search for algorithms.

    Sums reach 2**32 and wrap, as PIL's do not in unsigned integers; bits 24 to 31 come out the same.
    """
    reach, side = taps.shape[1] // 2, levels.shape[axis]
    spread = torch.arange(-reach, side + reach, device=levels.device).clamp(0, side - 1)
    padded = levels.index_select(axis, spread)
    weights = taps.view(len(taps), -1, 1, 1, 1).unbind(1)
    total = weights[reach] * padded.narrow(axis, reach, side)
    for distance in range(1, reach + 1):  # the same weight on either side
        pair = padded.narrow(axis, reach - distance, side) + padded.narrow(axis, reach + distance, side)
        total.addcmul_(pair, weights[reach + distance])
    return total.add_(1 << (BLUR_BITS - 1)).bitwise_right_shift_(BLUR_BITS).bitwise_and_(255)


def box_taps(sigma: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n T"]:
    """The extended box of each sigma, px: int32 weights in 1/2**24."""
    inner, outer, radius = (array[:, None] for array in box_weights(sigma.astype(np.float32)))
    distance = np.abs(np.arange(-radius.max() - 1, radius.max() + 2))
    return np.where(distance <= radius, inner, np.where(distance == radius + 1, outer, 0)).astype(np.int32)


def box_weights(sigma):
    """PIL's extended box, three of which stand for a Gaussian: weight of whole px, of the px beyond, radius; of a float32, as
    pipelines/kernels.py compiles it, or of an array.

    float32 step by step, as PIL, so that every weight is PIL's. Gwosdek et al., "Theoretical foundations of Gaussian
    convolution by extended box filtering", SSVM 2011.
    """
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    variance = sigma * sigma / np.float32(BLUR_PASSES)
    length = np.float32(np.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.floor((length - one) / two)
    after = whole + one
    reach = whole + (two * whole + one) * (whole * after - three * variance) / (six * (variance - after * after))
    inner = np.int64(np.float32(1 << BLUR_BITS) / (reach * two + one))
    radius = np.int64(reach)
    return inner, ((1 << BLUR_BITS) - (radius * 2 + 1) * inner) // 2, radius

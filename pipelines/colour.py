"""The device tail: jitter, grey, blur and normalisation of a batch, each sample by its own row of the plan.

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

from inscon.plan import BRIGHTNESS, CONTRAST, GREY, HUE, SATURATION, ViewPlan
from pipelines.feed import to_device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in 0..1."""
LUMA = (19595.0, 38470.0, 7471.0)
"""Rec. 601 weights in 1/65536, as PIL's conversion to L."""
BLUR_PASSES = 3
"""PIL's GaussianBlur is this many box blurs along each axis."""
BLUR_BITS = 24
"""Fixed point of their weights."""


def normalise(
    views: UInt8[Tensor, "B S S 3"] | Float[Tensor, "B S S 3"], dtype: torch.dtype
) -> Float[Tensor, "B 3 S S"]:
    """Levels 0..255 to zero mean and unit variance by ImageNet's figures; the result is channels-last in memory."""
    count, side = views.shape[:2]
    subtract, multiply = (to_device(row, views.device) for row in normalisation(side))
    # Whole rows of S*3: an innermost dimension of 3 would leave nothing to vectorise. Subtracted first, so that there is
    # no product and sum to be fused on one machine and not on the next: the same bits as the compiled tail's, anywhere.
    rows = views.reshape(count, side, side * 3).to(torch.float32)
    rows = torch.sub(rows, subtract).mul_(multiply).to(dtype)
    return rows.view(count, side, side, 3).permute(0, 3, 1, 2)


@functools.cache
def normalisation(side: int) -> tuple[np.ndarray, np.ndarray]:
    """What to subtract from a row of `side` px, and by what to multiply the rest: [3 side] float32 each."""
    return tuple(
        np.tile(np.array(row, np.float32), side) for row in ([255 * m for m in MEAN], [1 / (255 * s) for s in STD])
    )


def colour_views(views: UInt8[Tensor, "B S S 3"], plan: ViewPlan, dtype: torch.dtype) -> Float[Tensor, "B 3 S S"]:
    """Execute `plan`'s colour operations and blur on crops that are already flipped, and normalise them."""
    levels = jitter(views.to(torch.float32), plan)
    return normalise(blur(levels, plan.blur_sigma), dtype)


def jitter(levels: Float[Tensor, "B S S 3"], plan: ViewPlan) -> Float[Tensor, "B S S 3"]:
    """The colour operations of `plan`, slot by slot; `levels` are whole numbers 0..255, before and after."""
    for operations in plan.colour_ops.T:
        if np.isin(operations, (BRIGHTNESS, CONTRAST, SATURATION, GREY)).any():
            levels = _blend(levels, operations, plan.factors)
        turned = np.flatnonzero(operations == HUE)
        if len(turned):
            which = to_device(turned, levels.device)
            shift = to_device(np.trunc(plan.factors[turned, HUE - 1].astype(np.float64) * 255), levels.device)
            levels = levels.index_copy(0, which, shift_hue(levels[which], shift.view(-1, 1, 1)))
    return levels


def _blend(levels: Tensor, operations: np.ndarray, factors: np.ndarray) -> Tensor:
    """base + factor * (levels - base), where base is 0, the mean grey of the view, or the grey of each pixel."""
    factor = np.ones(len(operations), np.float32)
    for operation in (BRIGHTNESS, CONTRAST, SATURATION):
        chosen = operations == operation
        factor[chosen] = factors[chosen, operation - 1]
    factor[operations == GREY] = 0
    per_pixel = (operations == SATURATION) | (operations == GREY)
    weights = np.stack([factor, operations == CONTRAST, per_pixel]).astype(np.float32)
    factor, by_mean, by_pixel = to_device(weights, levels.device).view(3, -1, 1, 1, 1)
    grey = grey_levels(levels)
    # Summed in float64: in float32 a mean near one half would round to the other whole level now and then.
    mean = torch.floor(grey.mean((1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).float()
    base = by_mean * mean + by_pixel * grey
    return torch.floor((base + factor * (levels - base)).clamp(0, 255))


def grey_levels(levels: Float[Tensor, "B S S 3"]) -> Float[Tensor, "B S S 1"]:
    """PIL's L of RGB levels; all sums are whole numbers below 2**24, exact in float32."""
    red, green, blue = (levels[..., c : c + 1] * weight for c, weight in enumerate(LUMA))
    return torch.floor((red + green + blue + 32768) / 65536)


def shift_hue(levels: Float[Tensor, "n S S 3"], shift: Float[Tensor, "n 1 1"]) -> Float[Tensor, "n S S 3"]:
    """Turn the hue by `shift` 255ths of the circle through PIL's 8-bit HSV.

    float64 where PIL has it: quotients sit on whole levels so often that float32 would fall to the other side. Only the
    samples whose turn it is come here, a fifth of a batch.
    """
    red, green, blue = levels.unbind(-1)
    value, low = levels.amax(-1), levels.amin(-1)
    span = value - low
    red_gap, green_gap, blue_gap = ((value - channel) / span.clamp(min=1) for channel in (red, green, blue))
    red_gap, green_gap, blue_gap = red_gap.double(), green_gap.double(), blue_gap.double()
    hue = torch.where(green == value, 2 + red_gap - blue_gap, 4 + green_gap - red_gap)
    hue = torch.where(red == value, blue_gap - green_gap, hue).float().double() / 6 + 1
    hue = torch.floor((hue - torch.floor(hue)).float().double() * 255)
    hue = torch.remainder(hue + shift, 256)
    saturation = (torch.floor((span / value.clamp(min=1)).double() * 255) / 255).float()
    sixth = hue * 6 / 255
    sector = torch.floor(sixth)
    rest = (sixth - sector).float()
    p = torch.floor(value.double() * (1 - saturation.double()) + 0.5)
    q = torch.floor(value.double() * (1 - (saturation * rest).double()) + 0.5)
    t = torch.floor(value.double() * (1 - saturation.double() * (1 - rest.double())) + 0.5)
    p, q, t = p.float(), q.float(), t.float()
    # Which of value, p, q, t each channel shows in the six sectors of the circle; hue 255 begins the seventh, the first again.
    sector = torch.remainder(sector, 6).long()[..., None]
    channels = [(value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q)]
    return torch.cat([torch.stack(channel, -1).gather(-1, sector) for channel in channels], -1)


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
    total = sum(taps[:, k].view(-1, 1, 1, 1) * padded.narrow(axis, k, side) for k in range(taps.shape[1]))
    return (total + (1 << (BLUR_BITS - 1))) >> BLUR_BITS & 255


def box_taps(sigma: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n T"]:
    """The extended box of each sigma, three of which stand for the Gaussian: int32 weights in 1/2**24.

    float32 step by step, as PIL, so that every weight is PIL's. Gwosdek et al., "Theoretical foundations of Gaussian
    convolution by extended box filtering", SSVM 2011.
    """
    sigma = sigma.astype(np.float32)
    one, two, three, six = np.arange(7, dtype=np.float32)[[1, 2, 3, 6]]
    variance = sigma * sigma / np.float32(BLUR_PASSES)
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    whole = np.floor((length - one) / two)
    after = whole + one
    reach = whole + (two * whole + one) * (whole * after - three * variance) / (six * (variance - after * after))
    inner = (np.float32(1 << BLUR_BITS) / (reach * two + one)).astype(np.int64)
    whole = reach.astype(np.int64)
    outer = ((1 << BLUR_BITS) - (2 * whole + 1) * inner) // 2
    distance = np.abs(np.arange(-whole.max() - 1, whole.max() + 2))
    taps = np.where(distance <= whole[:, None], inner[:, None], 0)
    return np.where(distance == whole[:, None] + 1, outer[:, None], taps).astype(np.int32)

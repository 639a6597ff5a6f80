"""pipelines/color.py and the mosaic as three Triton kernels a view, for a GPU beside few CPU cores; the same bits.

Plain PyTorch reads and writes a batch of float32 for each of some 470 small steps. Here a pixel is read when the mean gray is
needed for contrast, once for all color operations and the blur along its row, and once for the blur along its column, solarize
and normalization; between the last two it is a byte. Every float32 operation is that of pipelines/color.py, none contracted
and divisions rounded as IEEE says. What of the plan differs between samples is read by the kernels, so nothing is compiled
anew for a batch.
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from inscon.guard import kind_and_first_line
from inscon.plan import BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, ColorSpec, Mosaics, ViewPlan, ViewSpec, plan_views
from pipelines import color
from pipelines.feed import to_device

PIXELS, BYTES = 1024, 4096
"""Of a tile of rows, and of a tile of columns; at least one row, or column."""
SLOTS, AT_CONTRAST, BLURRED, SOLARIZE, STEPS = (tl.constexpr(n) for n in (5, 10, 11, 12, 13))
"""A row of `_steps`: operations, as many amounts, and then one number each."""
_HUE, _CONTRAST, _BRIGHTNESS = (tl.constexpr(float(code)) for code in (HUE, CONTRAST, BRIGHTNESS))
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in color.LUMA)
_LEVEL = tl.constexpr(color.LEVEL)
_PASSES, _BITS = tl.constexpr(color.BLUR_PASSES), tl.constexpr(color.BLUR_BITS)
_HALF = tl.constexpr(1 << (color.BLUR_BITS - 1))


@triton.jit
def _load(pixel, there):
    """Levels of red, green and blue, float32."""
    red = tl.load(pixel, mask=there, other=0).to(tl.float32)
    green = tl.load(pixel + 1, mask=there, other=0).to(tl.float32)
    return red, green, tl.load(pixel + 2, mask=there, other=0).to(tl.float32)


@triton.jit
def _gray(red, green, blue):
    """`color.gray_levels`; a product with a power of two is exact."""
    return tl.floor((red * _RED + green * _GREEN + blue * _BLUE + 32768.0) * (1.0 / 65536))


@triton.jit
def _blend(level, base, factor):
    return tl.floor(tl.clamp((level - base) * factor + base, 0.0, 255.0))


@triton.jit
def _channel(value, saturation, distance):
    """Of a hue that far from the color, in 255ths of a sixth of the circle, and 255 more."""
    return tl.floor(value * (1.0 - saturation * (tl.clamp(distance, 0.0, 255.0) * _LEVEL)) + 0.5)


@triton.jit
def _turn(red, green, blue, shift):
    """`color.shift_hue`."""
    value = tl.maximum(tl.maximum(red, green), blue)
    span = value - tl.minimum(tl.minimum(red, green), blue)
    reds, greens, blues = value - red, value - green, value - blue
    red_leads, green_leads = reds == 0, greens == 0
    before = tl.where(red_leads, blues, tl.where(green_leads, reds, greens))
    after = tl.where(red_leads, greens, tl.where(green_leads, blues, reds))
    base = tl.where(red_leads, 0.0, tl.where(green_leads, 2.0, 4.0))
    quotient, colored = tl.div_rn(tl.minimum(before, after), tl.maximum(span, 1.0)), tl.minimum(span, 1.0)
    turn = tl.where(before >= after, (base + colored) - quotient, (base - colored) + quotient)
    turn = tl.div_rn(turn, 6.0)
    turn = tl.where(turn < 0, turn + 1.0, turn)
    hue = tl.floor(turn * 255.0) + shift
    hue = (hue - tl.floor(hue * (1.0 / 256)) * 256.0) * 6.0
    saturation = tl.floor(tl.div_rn(span, tl.maximum(value, 1.0)) * 255.0) * _LEVEL
    red = _channel(value, saturation, 510.0 - tl.abs(hue - 765.0))
    green = _channel(value, saturation, tl.abs(hue - 510.0) - 255.0)
    return red, green, _channel(value, saturation, tl.abs(hue - 1020.0) - 255.0)


@triton.jit
def _colored(red, green, blue, steps, stop, mean):
    """The operations of the slots before `stop`, in order; `mean` gray for contrast."""
    for slot in range(SLOTS):
        operation, amount = tl.where(slot < stop, tl.load(steps + slot), 0.0), tl.load(steps + SLOTS + slot)
        if operation == _HUE:
            red, green, blue = _turn(red, green, blue, amount)
        elif operation > 0:
            base = _gray(red, green, blue)
            base = tl.where(operation == _CONTRAST, mean, tl.where(operation == _BRIGHTNESS, 0.0, base))
            red, green, blue = _blend(red, base, amount), _blend(green, base, amount), _blend(blue, base, amount)
    return red, green, blue


@triton.jit
def _blurred(levels, place, taps, AXIS: tl.constexpr, SIDE: tl.constexpr, REACH: tl.constexpr):
    """Three box blurs of a tile along one axis, all of which is in the tile; `place` is a level's own along it.

    Sums wrap at 2**32, and shifted by 24 leave the level.
    """
    place = tl.broadcast_to(place, levels.shape)
    for _ in range(_PASSES):
        total = levels * tl.load(taps).to(tl.uint32) + _HALF
        for distance in range(1, REACH + 1):
            weight = tl.load(taps + distance).to(tl.uint32)
            if weight != 0:
                low = tl.gather(levels, tl.maximum(place - distance, 0), AXIS)
                high = tl.gather(levels, tl.minimum(place + distance, SIDE - 1), AXIS)
                total += (low + high) * weight
        levels = total >> _BITS
    return levels


@triton.jit
def _sum_gray(views, totals, steps, SIDE: tl.constexpr, PIXELS: tl.constexpr):
    """Totals [n] of the gray levels that contrast finds, by tiles of pixels."""
    image = tl.program_id(0)
    stop = tl.load(steps + image * STEPS + AT_CONTRAST)
    if stop >= 0:
        pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
        there = pixel < SIDE * SIDE
        red, green, blue = _load(views + image.to(tl.int64) * (SIDE * SIDE * 3) + pixel * 3, there)
        red, green, blue = _colored(red, green, blue, steps + image * STEPS, stop, 0.0)
        gray = tl.where(there, _gray(red, green, blue), 0.0).to(tl.int32)
        tl.atomic_add(totals + image, tl.sum(gray, 0).to(tl.int64))


@triton.jit
def _rows(
    views, levels, totals, steps, taps,
    SIDE: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """All color operations, and the blur along x, of some rows: levels [n S S 3] uint8."""
    image = tl.program_id(0)
    steps += image * STEPS
    taps += image * (REACH + 1)
    y, x = tl.program_id(1) * TALL + tl.arange(0, TALL)[:, None], tl.arange(0, WIDE)[None, :]
    there = (y < SIDE) & (x < SIDE)
    places = image.to(tl.int64) * (SIDE * SIDE * 3) + (y * SIDE + x) * 3
    mean = ((2 * tl.load(totals + image) + SIDE * SIDE) // (2 * SIDE * SIDE)).to(tl.float32)
    red, green, blue = _load(views + places, there)
    red, green, blue = _colored(red, green, blue, steps, SLOTS, mean)
    red, green, blue = red.to(tl.uint32), green.to(tl.uint32), blue.to(tl.uint32)
    if tl.load(steps + BLURRED) > 0:
        red = _blurred(red, x, taps, 1, SIDE, REACH)
        green = _blurred(green, x, taps, 1, SIDE, REACH)
        blue = _blurred(blue, x, taps, 1, SIDE, REACH)
    tl.store(levels + places, red.to(tl.uint8), mask=there)
    tl.store(levels + places + 1, green.to(tl.uint8), mask=there)
    tl.store(levels + places + 2, blue.to(tl.uint8), mask=there)


@triton.jit
def _columns(
    levels, pixels, canvas, shares, steps, taps,
    SIDE: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr, ON_CANVAS: tl.constexpr,
):  # fmt: skip
    """Blur along y, solarize and normalization of some columns of bytes: pixels [n S S 3], and their place on a canvas."""
    image = tl.program_id(0)
    steps += image * STEPS
    y, column = tl.arange(0, TALL)[:, None], tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    there = (y < SIDE) & (column < 3 * SIDE)
    places = image.to(tl.int64) * (SIDE * SIDE * 3) + y * (3 * SIDE) + column
    level = tl.load(levels + places, mask=there, other=0).to(tl.uint32)
    if tl.load(steps + BLURRED) > 0:
        level = _blurred(level, y, taps + image * (REACH + 1), 0, SIDE, REACH)
    level = level.to(tl.int32)
    level = tl.where(level < tl.load(steps + SOLARIZE), level, 255 - level)
    made = tl.load(shares + level * 3 + column % 3, mask=there)
    tl.store(pixels + places, made, mask=there)
    if ON_CANVAS:
        corner = (image // 4 * 2 + image % 4 // 2).to(tl.int64) * (SIDE * SIDE * 6) + image % 2 * (3 * SIDE)
        tl.store(canvas + corner + y * (6 * SIDE) + column, made, mask=there)


def color_views(
    views: UInt8[Tensor, "B S S 3"], plan: ViewPlan, dtype: torch.dtype, mosaic: bool = False
) -> tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "M 3 2S 2S"] | None]:
    """`pipelines.color.color_views`, and if asked the mosaics of full tiles, as `pipelines.finish.assemble` lays them.

    Contrast may be in a plan once, as `plan_views` draws it. B is a multiple of 4 where there are mosaics.
    """
    views, (count, side) = views.contiguous(), views.shape[:2]
    assert not (mosaic and count % 4)
    given, taps = _steps(plan), _taps(plan.blur_sigma)
    steps, weights = to_device(given, views.device), to_device(taps, views.device)
    totals = torch.zeros(count, dtype=torch.int64, device=views.device)
    levels, pixels = torch.empty_like(views), torch.empty_like(views, dtype=dtype)
    canvas = pixels.new_empty(count // 4, 2 * side, 2 * side, 3) if mosaic else None
    wide, exact = triton.next_power_of_2(side), {"SIDE": side, "enable_fp_fusion": False}
    tall, narrow, reach = max(PIXELS // wide, 1), max(BYTES // wide, 1), taps.shape[1] - 1
    with torch.cuda.device_of(views):
        if (given[:, AT_CONTRAST.value] >= 0).any():
            _sum_gray[(count, triton.cdiv(side * side, PIXELS))](views, totals, steps, PIXELS=PIXELS, **exact)
        _rows[(count, triton.cdiv(side, tall))](
            views, levels, totals, steps, weights, TALL=tall, WIDE=wide, REACH=reach, **exact
        )
        _columns[(count, triton.cdiv(3 * side, narrow))](
            levels, pixels, canvas if mosaic else pixels, _shares(dtype, views.device), steps, weights,
            TALL=wide, WIDE=narrow, REACH=reach, ON_CANVAS=mosaic, num_warps=8, **exact,
        )  # fmt: skip
    return pixels.permute(0, 3, 1, 2), canvas.permute(0, 3, 1, 2) if mosaic else None


def color_batch(
    levels: Mapping[str, Tensor], plans: Mapping[str, ViewPlan], mosaics: Mosaics | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor | None]:
    """`color_views` of every view; the mosaics too, where they are of full tiles."""
    tiles = mosaics.view if mosaics is not None and mosaics.tile == "full" else None
    made = {name: color_views(view, plans[name].ravel(), dtype, name == tiles) for name, view in levels.items()}
    return {name: pixels for name, (pixels, _) in made.items()}, made[tiles][1] if tiles else None


def _steps(plan: ViewPlan) -> Float[np.ndarray, "B 13"]:
    """Operations 0:5 and an amount of each 5:10; the slot of contrast or -1, whether to blur, from where to solarize."""
    operations = plan.color_ops.astype(np.int64)
    amounts = np.ones((len(operations), GRAY + 1), np.float32)
    amounts[:, [BRIGHTNESS, CONTRAST, SATURATION]] = plan.factors[:, :3]
    amounts[:, HUE] = np.trunc(plan.factors[:, HUE - 1].astype(np.float64) * 255)
    amounts[:, GRAY] = 0
    contrast = operations == CONTRAST
    at = np.where(contrast.any(1), contrast.argmax(1), -1)
    of_each = np.take_along_axis(amounts, operations, 1)
    return np.column_stack([operations, of_each, at, plan.blur_sigma > 0, plan.solarize]).astype(np.float32)


def _taps(sigma: Float[np.ndarray, "B"]) -> np.ndarray:
    """[B R+1] int32: the halves of `color.box_taps`, center first; R in steps of 4, each of which is compiled."""
    taps = color.box_taps(sigma)
    reach = taps.shape[1] // 2
    return np.pad(taps[:, reach:], ((0, 0), (0, -reach % 4)))


@functools.cache
def _shares(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256 3"]:
    """What `color.normalize` makes of each level and channel; the one thing for which the host waits, once."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    return color.normalize(levels, dtype).permute(0, 2, 3, 1).reshape(256, 3).to(device)


@functools.cache
def refusal(device: torch.device, dtype: torch.dtype, side: int) -> str | None:
    """Why the kernels do not serve on `device`, in a few words; None where they make of views of `side` px what the CPU makes."""
    everything = ColorSpec(jitter_probability=1.0, gray_probability=0.5, blur_probability=0.8, solarize_probability=0.5)
    spec = ViewSpec(name="view", size=side, color=everything)
    plan = plan_views(0, 0, np.arange(8), np.full((8, 2), side), [spec]).views["view"]
    views = torch.randint(0, 256, (8, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        made, canvas = (part.cpu() for part in color_views(views.to(device), plan, dtype, mosaic=True))
        tiles = canvas.unflatten(3, (2, side)).unflatten(2, (2, side)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        expected = color.color_views(views, plan, dtype)
        same = torch.equal(made, expected) and torch.equal(tiles, expected)
        return None if same else "their pixels are not those of the CPU"
    except Exception as error:
        return kind_and_first_line(error)

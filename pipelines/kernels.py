"""The compiled tail for CPUs: a decoded picture and rows of the plan in, finished views out.

One call makes all views of a picture, one after the other, while its pixels are in the cache: crop, antialiased bilinear
resize, flip, color, blur, RandAugment. Every step repeats PIL's own arithmetic (fixed point for resize and blur, truncated float32
blends, 8-bit HSV), so a view equals torchvision's PIL transforms bit for bit; docs/parity.md has the figures. The
functions release the GIL and keep no state, so any number of threads may run them; DALI calls them from its own threads.

Three facts about numba shape this file. Loops are vectorized over one contiguous row, so rows are sliced first and
indexed after. Integers widen to 64 bits, so sums go through arrays, or casts, of the width that is meant. Divisions check
for zero unless `error_model="numpy"`, and the check keeps a loop from being vectorized.
"""

import functools
import inspect
import math

import numpy as np
from numba import carray, cfunc, njit

from inscon.plan import BRIGHTNESS, CONTRAST, GRAY, HUE, LATE, NEVER, NOTHING, ROTATE, ROW, SATURATION, SHARPNESS
from pipelines import color
from pipelines.color import BLUR_BITS, BLUR_PASSES, normalization
from pipelines.compiled import compiled, f32, i32, u8, u32
from pipelines.randaugment import change_levels, move, smoothed
from pipelines.vectors import RESIZE_BITS, ROWS, fence, load_block, pointer_to, stream_normalized, weigh_block

RED, GREEN, BLUE = (int(weight) for weight in color.LUMA)
SUBTRACT, MULTIPLY = normalization(1)
box_weights = compiled(inspect.unwrap(color.box_weights))  # from what checks types around it


@compiled
def render_view(image, row, out, color):
    """Make one view, or patch, of a picture.

    Args:
        image: [H W 3] uint8 RGB, C-contiguous.
        row: [ROW] float32, of `ViewPlan.rows`; its box is clamped into the picture, so a wrong one cannot read past it.
        out: [S S 3] uint8, C-contiguous, overwritten; S is a multiple of 8.
        color: bool; False stops after the flip, for when color and blur happen on the device.
    """
    crop_resize(image, row, out)
    if color:
        color_view(out, row)
        if row[14] > 0:
            blur(out, row[14])
        augment_view(out, row)
        if row[15] < NEVER:
            solarize(out, row[15])


@functools.cache
def render_at():
    """`render_views` as a C function, `.ctypes`, for code that FFCV compiles around it and numba does not keep: so it is taken from
    numba's cache as it is, where a call by name has the whole kernel optimized anew, 6 seconds each time."""
    return cfunc("void(int64, int64, int64, int64, int64, int64)", cache=True)(render_views.py_func)


@njit(nogil=True, inline="always")
def render_views(image, height, width, rows, count, places):
    """All views of one picture, one after the other, each written where it belongs in the memory of a batch: no copy is made later.

    Args, addresses:
        image: of [height width 3] uint8.
        rows: of [count ROW] float32.
        places: of [3 + 3 count] int64, a row of `pipelines.slots.Slot.places`: 1 for color; 1 if levels become normalized float32
            (sides are then multiples of 16, and addresses are of 64), 0 if they stay uint8; bytes from a row of the mosaic's
            canvas to the next; then for each row of the plan its side S, the address of its `[S S 3]` block and that of its
            tile's first pixel on the canvas, 0 for none.
    """
    picture = carray(pointer_to(image), (height, width, 3), np.uint8)
    plan = carray(pointer_to(rows), (count, ROW), np.float32)
    place = carray(pointer_to(places), 3 + 3 * count, np.int64)
    for number in range(count):
        side, block, tile = place[3 + 3 * number], place[4 + 3 * number], place[5 + 3 * number]
        if place[1]:
            made = np.empty((side, side, 3), np.uint8)
            render_view(picture, plan[number], made, place[0] != 0)
            _write_normalized(made, block, tile, place[2])
        else:
            render_view(picture, plan[number], carray(pointer_to(block), (side, side, 3), np.uint8), place[0] != 0)


@compiled
def _write_normalized(view, block, tile, canvas_row):
    """`view [S S 3]` as float32, normalized, at address `block` and, unless it is 0, `tile`."""
    side = view.shape[0]
    low, factor = np.empty(3 * side, np.float32), np.empty(3 * side, np.float32)
    for i in range(3 * side):
        low[i], factor[i] = SUBTRACT[i % 3], MULTIPLY[i % 3]
    for y in range(side):
        below = tile + canvas_row * y if tile else 0
        stream_normalized(view[y].reshape(-1), low, factor, block + 12 * side * y, below)
    fence()


@compiled
def _copy(source, out):
    # Written out: numba's `out[:] = source` takes ten times as long.
    for j in range(out.shape[0]):
        out[j] = source[j]


@compiled
def crop_resize(image, row, out):
    """Cut `row[0:4]` from `image [H W 3]`, resize it to `row[16]` px square as PIL's BILINEAR, mirror it if `row[4]`; of that,
    `out [S S 3]` is what lies from `row[17:19]` (x, y) on. S is a multiple of 8; only what shows is computed.

    Crop first, resize second: no pixel from outside of the crop bleeds in. The order of the two passes shows in the last
    bit; it follows Pillow 13, which starts with the columns where the height shrinks by more than twice what the width
    does (python-pillow/Pillow#9549). Earlier versions always start with the rows.
    """
    height, width, _ = image.shape
    x0 = min(max(int(round(row[0])), 0), width - 1)
    y0 = min(max(int(round(row[1])), 0), height - 1)
    x1 = min(max(int(round(row[2])), x0 + 1), width)
    y1 = min(max(int(round(row[3])), y0 + 1), height)
    side, size, left, top = out.shape[0], int(row[16]), int(row[17]), int(row[18])
    source, made = image.reshape(height, 3 * width), out.reshape(side, 3 * side)
    across, across_weights = resize_weights(x1 - x0, size)
    if row[4] != 0:
        across, across_weights = across[::-1].copy(), across_weights[::-1].copy()
    across, across_weights = across[left : left + side], across_weights[left : left + side]
    down, down_weights = resize_weights(y1 - y0, size)
    down, down_weights = down[top : top + side], down_weights[top : top + side]
    if y1 - y0 > size and y1 - y0 - size > 2 * (x1 - x0 - size):
        short = np.empty((side, 3 * (x1 - x0)), np.uint8)
        _resize_columns(source, y0, 3 * x0, down, down_weights, short)
        wide = _resize_rows(short, 0, side, 0, x1 - x0, across, across_weights)
        for y in range(side):
            _copy(wide[y], made[y])
    else:
        first, last = down[0], down[side - 1] + down_weights.shape[1]
        wide = _resize_rows(source, y0 + first, y0 + last, 3 * x0, x1 - x0, across, across_weights)
        _resize_columns(wide, -first, 0, down, down_weights, made)


@compiled
def resize_weights(source, target):
    """PIL's triangle filter for `source` px -> `target` px: (first [target] int64, weights [target K] int32).

    Output i is the sum over k of px[first[i] + k] * weights[i, k]. All windows are of the same length K, padded with
    weight 0 where PIL's are shorter, and lie inside the source.
    """
    scale = source / target
    support = max(scale, 1.0)
    taps = min(int(math.ceil(2 * support)), source)
    first = np.empty(target, np.int64)
    weights = np.zeros((target, taps), np.int32)
    exact = np.empty(taps, np.float64)
    for i in range(target):
        center = (i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        size = min(int(center + support + 0.5), source) - low
        total = 0.0
        for k in range(size):
            exact[k] = max(1.0 - abs((k + low - center + 0.5) * (1.0 / support)), 0.0)
            total += exact[k]
        first[i] = min(low, source - taps)
        for k in range(size):
            weights[i, low - first[i] + k] = int(0.5 + exact[k] / total * (1 << RESIZE_BITS))
    return first, weights


@compiled
def _resize_rows(source, top, bottom, left, width, first, weights):
    """`width` px from byte `left` on of rows `top` to `bottom` of `source`, by `resize_weights`.

    [bottom - top + 8, 3 side + 8]: the last 8 bytes of a row and the last 8 rows are rubbish.
    """
    side = first.shape[0]
    flat, length = source.reshape(-1), source.shape[1]
    pixels = np.empty((width, ROWS), np.uint32)  # side by side, what one vector takes
    starts = np.empty(ROWS, np.int64)
    out = np.empty((bottom - top + ROWS, 3 * side + ROWS), np.uint8)
    for y in range(top, bottom, ROWS):
        for r in range(ROWS):
            starts[r] = min(y + r, bottom - 1) * length + left
        # Of the last row, which ends last, no block may be read that leaves the picture.
        blocks = min(width // 8, max((flat.shape[0] - starts[7] - 8) // 24, 0))
        for block in range(blocks):
            load_block(flat, starts, 24 * block, pixels, 8 * block)
        for x in range(8 * blocks, width):
            for r in range(ROWS):
                at = starts[r] + 3 * x
                pixels[x, r] = flat[at] | flat[at + 1] << 8 | flat[at + 2] << 16
        made = out[y - top : y - top + ROWS]
        for x in range(0, side, 8):
            weigh_block(pixels, first, weights, x, made)
    return out


@compiled
def _resize_columns(source, top, left, first, weights, out):
    """Rows from `top` on of `source`, from byte `left` on, by `resize_weights` -> out [S n]."""
    right, taps = left + out.shape[1], weights.shape[1]
    sums = np.empty(out.shape[1], np.int32)
    for y in range(out.shape[0]):
        start, line = top + first[y], weights[y]
        if taps == 3:  # half of all crops; without sums that are written and read again
            a, b, c = source[start][left:right], source[start + 1][left:right], source[start + 2][left:right]
            _weigh_three(a, b, c, line, out[y])
            continue
        _weigh_two(source[start][left:right], source[start + min(1, taps - 1)][left:right], line, sums)
        for k in range(2, taps):
            _weigh(source[start + k][left:right], line[k], sums)
        for x in range(out.shape[1]):
            out[y, x] = sums[x] >> RESIZE_BITS


@compiled
def _weigh_three(a, b, c, weights, out):
    i, j, k, half = weights[0], weights[1], weights[2], i32(1 << (RESIZE_BITS - 1))
    for x in range(out.shape[0]):
        out[x] = i32(a[x] * i + b[x] * j + c[x] * k + half) >> RESIZE_BITS


@compiled
def _weigh_two(a, b, weights, sums):
    i, half = weights[0], i32(1 << (RESIZE_BITS - 1))
    j = weights[1] if weights.shape[0] > 1 else i32(0)
    for x in range(sums.shape[0]):
        sums[x] = a[x] * i + b[x] * j + half


@compiled
def _weigh(line, weight, sums):
    for x in range(sums.shape[0]):
        sums[x] += line[x] * weight


@compiled
def augment_view(view, row):
    """Apply RandAugment's operations, and gray behind them, `row[19:23]` with the strengths `row[23:27]`, in place."""
    for slot in range(19, 19 + LATE):
        operation, strength = int(row[slot]), row[slot + LATE]
        if operation == SHARPNESS:
            blend_views(smoothed(view), view, strength)
        elif operation >= ROTATE:
            move(view, operation, strength)
        elif operation > GRAY:
            change_levels(view, operation, strength)
        elif operation != NOTHING:
            change_colors(view, operation, strength)


@compiled
def color_view(view, row):
    """Apply the color operations `row[5:10]` with the factors `row[10:14]` to `view [S S 3]` uint8, in place."""
    for slot in range(5, 10):
        operation = int(row[slot])
        change_colors(view, operation, row[9 + operation])  # gray, the last one, needs no factor


@compiled
def change_colors(view, operation, strength):
    """Apply one of the color operations, or none, to `view [S S 3]` uint8, in place."""
    if operation == BRIGHTNESS:
        blend_with(view, 0, strength)
    elif operation == CONTRAST:
        blend_with(view, mean_gray(view), strength)
    elif operation == SATURATION:
        saturate(view, strength)
    elif operation == HUE:
        shift_hue(view, strength)
    elif operation == GRAY:
        saturate(view, f32(0.0))


@compiled
def solarize(view, threshold):
    """Invert the levels of `view [S S 3]` uint8 from `threshold` on, as PIL's ImageOps.solarize; in place."""
    flat = view.reshape(-1)
    limit = u8(threshold)
    for i in range(flat.shape[0]):
        flat[i] = flat[i] if flat[i] < limit else u8(255 - flat[i])


@compiled
def blend_with(view, level, factor):
    """`level + factor * (view - level)` in float32, clipped and truncated to uint8 as PIL's blend; in place."""
    flat = view.reshape(-1)
    base = f32(level)
    for i in range(flat.shape[0]):
        flat[i] = _blend(base, f32(flat[i]), factor)


@compiled
def blend_views(base, view, factor):
    """As `blend_with`, each level with that of `base [S S 3]`."""
    levels, flat = base.reshape(-1), view.reshape(-1)
    for i in range(flat.shape[0]):
        flat[i] = _blend(f32(levels[i]), f32(flat[i]), factor)


@njit(nogil=True, inline="always")
def _blend(base, value, factor):
    # To int32 on the way to uint8: the conversion that there is a vector instruction for.
    return u8(i32(min(max(base + factor * (value - base), f32(0.0)), f32(255.0))))


@compiled
def mean_gray(view):
    """The mean of PIL's L image of `view [S S 3]`, rounded to a whole level."""
    flat = view.reshape(-1)
    pixels = flat.shape[0] // 3
    total = 0
    for i in range(pixels):
        total += _gray(flat[3 * i], flat[3 * i + 1], flat[3 * i + 2])
    return int(total / pixels + 0.5)


@njit(nogil=True, inline="always")
def _gray(red, green, blue):
    luma = u32(u32(red) * u32(RED)) + u32(u32(green) * u32(GREEN)) + u32(u32(blue) * u32(BLUE)) + u32(0x8000)
    return i32(u32(luma) >> u32(16))


@compiled
def saturate(view, factor):
    """Blend every pixel of `view [S S 3]` with its own gray level, as PIL's Color enhancer; 0 = gray. In place."""
    flat = view.reshape(-1)
    for i in range(flat.shape[0] // 3):
        red, green, blue = flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]
        gray = f32(_gray(red, green, blue))
        flat[3 * i] = _blend(gray, f32(i32(red)), factor)
        flat[3 * i + 1] = _blend(gray, f32(i32(green)), factor)
        flat[3 * i + 2] = _blend(gray, f32(i32(blue)), factor)


@compiled
def shift_hue(view, turns):
    """Turn the hue of `view [S S 3]` by `turns` (-0.5..0.5) through PIL's 8-bit HSV, as torchvision; in place.

    Without branches, and in float32 alone, where PIL has float64 in places, so that it vectorizes. It was compared with
    arithmetic as PIL's over all 2**24 colors and all 255 shifts: no level differs. A gray pixel has saturation 0, which
    makes every channel equal to its value. Back in RGB a channel is value * (1 - saturation * w), where w is 0 within a
    sixth of the circle around its color, 1 beyond a third, and runs from 0 to 1 in between: PIL's p, q and t in one.
    """
    shift = i32(turns * 255)
    flat = view.reshape(-1)
    zero, half, one, two, four, six, full = f32(0), f32(0.5), f32(1), f32(2), f32(4), f32(6), f32(255)
    sixth, third, two_thirds, level = f32(255), f32(510), f32(1020), f32(1 / 255)
    for i in range(flat.shape[0] // 3):
        red, green, blue = f32(flat[3 * i]), f32(flat[3 * i + 1]), f32(flat[3 * i + 2])
        value = max(red, green, blue)
        span = value - min(red, green, blue)
        # Of the two channels below the value one is the lowest, so of PIL's two quotients one is 1.
        reds, greens, blues = value - red, value - green, value - blue
        before = reds if greens == zero else greens
        after = blues if greens == zero else reds
        base = two if greens == zero else four
        before = blues if reds == zero else before
        after = greens if reds == zero else after
        base = zero if reds == zero else base
        quotient, colored = min(before, after) / max(span, one), min(span, one)
        late, early = (base + colored) - quotient, (base - colored) + quotient
        turn = (late if before >= after else early) / six
        wrapped = turn + one
        turn = wrapped if turn < zero else turn
        hue = f32((i32(turn * full) + shift) & 255) * six
        saturation = f32(i32(span / max(value, one) * full)) * level
        from_red = min(max(third - abs(hue - f32(765)), zero), full) * level
        from_green = min(max(abs(hue - third) - sixth, zero), full) * level
        from_blue = min(max(abs(hue - two_thirds) - sixth, zero), full) * level
        flat[3 * i] = u8(i32(value * (one - saturation * from_red) + half))
        flat[3 * i + 1] = u8(i32(value * (one - saturation * from_green) + half))
        flat[3 * i + 2] = u8(i32(value * (one - saturation * from_blue) + half))


@compiled
def blur(view, sigma):
    """Blur `view [S S 3]` uint8 as PIL's GaussianBlur(radius=sigma) does, in place.

    Three box blurs along each row, then three along each column, each rounded to uint8; borders repeat the outermost
    pixel. `sigma` in px, float32, greater than 0.
    """
    inner, outer, radius = box_weights(sigma)
    side, margin = view.shape[0], radius + 1
    left, right = 3 * margin, 3 * (margin + side)
    # Pass by pass over the whole view, with a margin all around: a row read again right after it was written would wait for its
    # own stores. Lines lie end to end, so a pass is one long loop; what it makes of the margins is overwritten.
    padded = np.empty((2, side + 2 * margin, right + left), np.uint8)
    for y in range(side):
        _copy(view[y].reshape(-1), padded[0, margin + y][left:right])
    for turn in range(2 * BLUR_PASSES):
        lines, made = padded[turn % 2], padded[1 - turn % 2]
        along_rows = turn < BLUR_PASSES
        if along_rows:
            for y in range(margin, margin + side):
                _repeat_ends(lines[y], left)
        else:
            for y in range(margin):
                _copy(lines[margin], lines[y])
                _copy(lines[margin + side - 1], lines[margin + side + y])
        step = 3 if along_rows else right + left
        _box(lines.reshape(-1), step, u32(inner), u32(outer), radius, made.reshape(-1))
    for y in range(side):
        _copy(padded[0, margin + y][left:right], view[y].reshape(-1))


@compiled
def _repeat_ends(line, margin):
    behind = line.shape[0] - margin
    for j in range(0, margin, 3):
        for channel in range(3):
            line[j + channel], line[behind + j + channel] = line[margin + channel], line[behind - 3 + channel]


@compiled
def _box(flat, step, inner, outer, radius, out):
    """One box along values that lie `step` apart in `flat`; `out` but for its ends, `radius + 1` steps each."""
    margin = step * (radius + 1)
    size = flat.shape[0] - 2 * margin
    before, middle, after = flat[:size], flat[margin : margin + size], flat[2 * margin :]
    if radius < 2:  # what views are blurred with, sigma up to 2: the sum is a pixel, or one of three
        left, right, made = flat[margin - step :][:size], flat[margin + step :][:size], out[margin : margin + size]
        mask = u32(0xFFFFFFFF if radius else 0)
        for j in range(size):
            whole = u32(u32(middle[j]) + u32(u32(u32(left[j]) + u32(right[j])) & mask))
            made[j] = _rounded(whole, u32(u32(before[j]) + u32(after[j])), inner, outer)
        return
    for j in range(size):
        whole = u32(0)
        for k in range(step, 2 * margin, step):
            whole += u32(flat[j + k])
        out[margin + j] = _rounded(whole, u32(u32(before[j]) + u32(after[j])), inner, outer)


@njit(nogil=True, inline="always")
def _rounded(whole, beyond, inner, outer):
    half, bits = u32(1 << (BLUR_BITS - 1)), u32(BLUR_BITS)
    return u32(u32(whole * inner) + u32(beyond * outer) + half) >> bits

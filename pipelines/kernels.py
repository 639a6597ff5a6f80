"""The compiled tail for CPUs: a decoded picture and rows of the plan in, finished uint8 views out.

One call makes all views of a picture, one after the other, while its pixels are in the cache: crop, antialiased bilinear
resize, flip, color, blur. Every step repeats PIL's own arithmetic (fixed point for resize and blur, truncated float32
blends, 8-bit HSV), so a view equals torchvision's PIL transforms bit for bit; docs/parity.md has the figures. The
functions release the GIL and keep no state, so any number of threads may run them; DALI calls them from its own threads.

Three facts about numba shape this file. Loops are vectorized over one contiguous row, so rows are sliced first and
indexed after. Integers widen to 64 bits, so sums go through arrays, or casts, of the width that is meant. Divisions check
for zero unless `error_model="numpy"`, and the check keeps a loop from being vectorized.
"""

import ctypes
import functools
import math
import os
import stat
import tempfile

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from inscon.plan import BRIGHTNESS, CONTRAST, GRAY, HUE, NEVER, ROW, SATURATION

RESIZE_BITS = 22
"""Fixed point of resize weights, as PIL's for 8-bit channels."""
BLUR_BITS = 24
"""Fixed point of box blur weights, as PIL's."""
BLUR_PASSES = 3
"""PIL's GaussianBlur is this many box blurs along each axis."""
RED, GREEN, BLUE = 19595, 38470, 7471
"""Rec. 601 luma weights in 1/65536, as PIL's conversion to L: 0.299, 0.587, 0.114."""

ROWS_AT_ONCE = 8
"""Rows of a picture that are resized together, as a block of 8x8 pixels of 32 bit at a time: numba itself finds no vector
in three interleaved channels, and rows share the weights."""
WORD, BYTE = ir.IntType(32), ir.IntType(8)
PIXELS, BYTES = ir.VectorType(WORD, ROWS_AT_ONCE), ir.VectorType(BYTE, 4 * ROWS_AT_ONCE)

compiled = njit(nogil=True, cache=True, error_model="numpy")


def _folder_for_machine_code() -> str:
    """In the system's temporary folder, of this user alone: what lies in it is executed."""
    path = os.path.join(tempfile.gettempdir(), f"inscon-numba-{os.getuid()}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return tempfile.mkdtemp(prefix="inscon-numba-")
    return path


try:
    compiled(_folder_for_machine_code)  # is only looked at
except RuntimeError:  # neither beside this file nor in the home folder, as in a container run by another user
    config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = _folder_for_machine_code()  # the latter for workers


@compiled
def render_view(image, row, out, color):
    """Make one view, or patch, of a picture.

    Args:
        image: [H W 3] uint8 RGB, C-contiguous.
        row: [20] float32, of `ViewPlan.rows`; its box is clamped into the picture, so a wrong one cannot read past it.
        out: [S S 3] uint8, C-contiguous, overwritten; S is a multiple of 8.
        color: bool; False stops after the flip, for when color and blur happen on the device.
    """
    crop_resize(image, row, out)
    if color:
        color_view(out, row)
        if row[14] > 0:
            blur(out, row[14])
        if row[15] < NEVER:
            solarize(out, row[15])


@compiled
def render_into(image, rows, places, subtract, multiply):
    """All views of one picture, one after the other, each written where it belongs in the memory of a batch: no copy is made later.

    Args:
        image: as for `render_view`.
        rows: [R 20] float32.
        places: [3 + 3R] int64, a row of `pipelines.slots.Slot.places`: 1 for color; 1 if levels become normalized float32
            (sides are then multiples of 16, and addresses are of 64), 0 if they stay uint8; bytes from a row of the mosaic's
            canvas to the next; then for each row of the plan its side S, the address of its `[S S 3]` block and that of its
            tile's first pixel on the canvas, 0 for none.
        subtract, multiply: [3 W] float32, `pipelines.color.normalization` of a row of W pixels, the widest side at least.
    """
    for number in range(rows.shape[0]):
        side, block, tile = places[3 + 3 * number], places[4 + 3 * number], places[5 + 3 * number]
        if places[1]:
            made = np.empty((side, side, 3), np.uint8)
            render_view(image, rows[number], made, places[0] != 0)
            for y in range(side):
                _normalize_row(made[y].reshape(-1), subtract, multiply, block, tile)
                block += 12 * side if block else 0
                tile += places[2] if tile else 0
            _fence()
        else:
            render_view(image, rows[number], carray(pointer_to(block), (side, side, 3), np.uint8), places[0] != 0)


@functools.cache
def render_at():
    """`render_into` as a C function of addresses: (image, height, width, rows, R, places, subtract, multiply, W).

    For code that another library compiles around it: called by address it is taken from numba's cache as it is, where a call
    by name has the whole kernel optimised anew, 6 seconds each time.
    """
    compiled_at = cfunc(f"void({', '.join(['int64'] * 9)})", nopython=True, cache=True)(_render_at)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)(compiled_at.address)
    function.code = compiled_at  # which goes with the last reference
    return function


def _render_at(image, height, width, rows, count, places, subtract, multiply, widest):
    picture, plan = (
        carray(pointer_to(image), (height, width, 3), np.uint8),
        carray(pointer_to(rows), (count, ROW), np.float32),
    )
    place = carray(pointer_to(places), 3 + 3 * count, np.int64)
    low = carray(pointer_to(subtract), 3 * widest, np.float32)
    factor = carray(pointer_to(multiply), 3 * widest, np.float32)
    render_into(picture, plan, place, low, factor)


@intrinsic
def pointer_to(typingctx, address):
    """An address as a pointer that `carray` takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@intrinsic
def _normalize_row(typingctx, levels, subtract, multiply, block, tile):
    """(level - subtract) * multiply of one row of levels to each of both addresses that is not 0, as float32.

    Past the caches: they would first read what is going to be overwritten, and nobody needs it soon. Subtracted before
    multiplied, since a product and a sum would be fused on some machines, and round otherwise.
    """
    lanes, float_type = 16, ir.FloatType()
    floats, levels_type = ir.VectorType(float_type, lanes), ir.VectorType(BYTE, lanes)

    def codegen(context, builder, signature, args):
        level_array = context.make_array(signature.args[0])(context, builder, args[0])
        rows = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (1, 2)]
        size = builder.extract_value(level_array.shape, 0)
        blocks = builder.udiv(size, ir.Constant(size.type, lanes))
        marked = builder.module.add_metadata([ir.Constant(WORD, 1)])
        with cgutils.for_range(builder, blocks) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, lanes))
            at = builder.bitcast(builder.gep(level_array.data, [offset]), levels_type.as_pointer())
            value = builder.uitofp(builder.zext(builder.load(at, align=1), ir.VectorType(WORD, lanes)), floats)
            low, factor = (
                builder.load(builder.bitcast(builder.gep(row, [offset]), floats.as_pointer()), align=4) for row in rows
            )
            value = builder.fmul(builder.fsub(value, low), factor)
            for address in (args[3], args[4]):
                with builder.if_then(builder.icmp_signed("!=", address, ir.Constant(address.type, 0))):
                    place = builder.add(address, builder.mul(offset, ir.Constant(offset.type, 4)))
                    stored = builder.store(value, builder.inttoptr(place, floats.as_pointer()), align=64)
                    stored.set_metadata("nontemporal", marked)
        return context.get_dummy_value()

    return types.void(levels, subtract, multiply, types.intp, types.intp), codegen


@intrinsic
def _fence(typingctx):
    """What was stored past the caches is seen by other threads from here on."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


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


def _shuffle(builder, one, other, order):
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(WORD, len(order)), list(order)))


def _transpose(builder, v):
    """Eight vectors of eight words, as rows -> as columns: pairs, pairs of pairs, halves."""
    low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
    t = [_shuffle(builder, v[i], v[i + 1], order) for i in (0, 2, 4, 6) for order in (low, high)]
    low, high = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
    pairs = ((0, 2), (1, 3), (4, 6), (5, 7))
    u = [_shuffle(builder, t[i], t[j], order) for i, j in pairs for order in (low, high)]
    low, high = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
    return [_shuffle(builder, u[i], u[i + 4], order) for order in (low, high) for i in range(4)]


@intrinsic
def _load_block(typingctx, flat, starts, offset, pixels, x):
    """`pixels[x + i, r]` = pixel i behind byte `starts[r] + offset` of `flat`, i and r = 0..7.

    Of the four bytes of a pixel the last is rubbish. 8 bytes more than the pixels take are read.
    """

    def codegen(context, builder, signature, args):
        data, start_data, out = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 1, 3)
        )
        spread = [3 * (i // 4) + min(i % 4, 2) for i in range(4 * ROWS_AT_ONCE)]
        rows = []
        for r in range(ROWS_AT_ONCE):
            start = builder.load(builder.gep(start_data, [ir.Constant(ir.IntType(64), r)]))
            address = builder.gep(data, [builder.add(start, args[2])])
            levels = builder.load(builder.bitcast(address, BYTES.as_pointer()), align=1)
            rows.append(builder.bitcast(_shuffle(builder, levels, levels, spread), PIXELS))
        for i, column in enumerate(_transpose(builder, rows)):
            place = builder.mul(
                builder.add(args[4], ir.Constant(args[4].type, i)), ir.Constant(args[4].type, ROWS_AT_ONCE)
            )
            builder.store(column, builder.bitcast(builder.gep(out, [place]), PIXELS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(flat, starts, types.intp, pixels, types.intp), codegen


@intrinsic
def _weigh_block(typingctx, pixels, first, weights, x, out):
    """Eight pixels of eight rows: `out[r, 3 (x + i) + c] = sum over k of pixels[first[x + i] + k, r][c] * weights[x + i, k]`.

    Fixed point, one vector of 32 sums for the 8 rows of a pixel. 8 bytes past the pixels are written to each row of `out`,
    so it needs as many to spare and blocks must be written from left to right.
    """
    lanes = ir.VectorType(WORD, 4 * ROWS_AT_ONCE)

    def codegen(context, builder, signature, args):
        pixel_array, first_array, weight_array, out_array = (
            context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 1, 2, 4)
        )
        taps = builder.extract_value(weight_array.shape, 1)
        nothing, whole = ir.Constant(lanes, ir.Undefined), ir.Constant(lanes, [RESIZE_BITS] * 4 * ROWS_AT_ONCE)
        half = ir.Constant(lanes, [1 << (RESIZE_BITS - 1)] * 4 * ROWS_AT_ONCE)
        sums, columns = cgutils.alloca_once(builder, lanes), []
        for i in range(ROWS_AT_ONCE):
            place = builder.add(args[3], ir.Constant(args[3].type, i))
            start = builder.load(builder.gep(first_array.data, [place]))
            weight_data = builder.gep(weight_array.data, [builder.mul(place, taps)])
            builder.store(half, sums)
            with cgutils.for_range(builder, taps) as loop:
                at = builder.mul(builder.add(start, loop.index), ir.Constant(loop.index.type, ROWS_AT_ONCE))
                address = builder.bitcast(builder.gep(pixel_array.data, [at]), BYTES.as_pointer())
                weight = builder.load(builder.gep(weight_data, [loop.index]))
                spread = builder.insert_element(nothing, weight, ir.Constant(WORD, 0))
                spread = _shuffle(builder, spread, nothing, [0] * 4 * ROWS_AT_ONCE)
                product = builder.mul(builder.zext(builder.load(address, align=4), lanes), spread)
                builder.store(builder.add(builder.load(sums), product), sums)
            levels = builder.trunc(builder.lshr(builder.load(sums), whole), BYTES)
            columns.append(builder.bitcast(levels, PIXELS))
        stride = builder.extract_value(out_array.strides, 0)
        packed = [4 * (i // 3) + i % 3 for i in range(3 * ROWS_AT_ONCE)] + [0] * ROWS_AT_ONCE
        for r, row in enumerate(_transpose(builder, columns)):
            levels = builder.bitcast(row, BYTES)
            place = builder.add(
                builder.mul(stride, ir.Constant(stride.type, r)), builder.mul(args[3], ir.Constant(args[3].type, 3))
            )
            address = builder.bitcast(builder.gep(out_array.data, [place]), BYTES.as_pointer())
            builder.store(_shuffle(builder, levels, levels, packed), address, align=1)
        return context.get_dummy_value()

    return types.void(pixels, first, weights, types.intp, out), codegen


@compiled
def _resize_rows(source, top, bottom, left, width, first, weights):
    """`width` px from byte `left` on of rows `top` to `bottom` of `source`, by `resize_weights`.

    [bottom - top + 8, 3 side + 8]: the last 8 bytes of a row and the last 8 rows are rubbish.
    """
    side = first.shape[0]
    flat, length = source.reshape(-1), source.shape[1]
    pixels = np.empty((width, ROWS_AT_ONCE), np.uint32)  # side by side, what one vector takes
    starts = np.empty(ROWS_AT_ONCE, np.int64)
    out = np.empty((bottom - top + ROWS_AT_ONCE, 3 * side + ROWS_AT_ONCE), np.uint8)
    for y in range(top, bottom, ROWS_AT_ONCE):
        for r in range(ROWS_AT_ONCE):
            starts[r] = min(y + r, bottom - 1) * length + left
        # Of the last row, which ends last, no block may be read that leaves the picture.
        blocks = min(width // 8, max((flat.shape[0] - starts[7] - 8) // 24, 0))
        for block in range(blocks):
            _load_block(flat, starts, 24 * block, pixels, 8 * block)
        for x in range(8 * blocks, width):
            for r in range(ROWS_AT_ONCE):
                at = starts[r] + 3 * x
                pixels[x, r] = flat[at] | flat[at + 1] << 8 | flat[at + 2] << 16
        made = out[y - top : y - top + ROWS_AT_ONCE]
        for x in range(0, side, 8):
            _weigh_block(pixels, first, weights, x, made)
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
        else:
            _weigh_two(source[start][left:right], source[start + min(1, taps - 1)][left:right], line, sums)
            for k in range(2, taps):
                _weigh_one(source[start + k][left:right], line[k], sums)
            _finish(sums, out[y])


@compiled
def _weigh_three(a, b, c, weights, out):
    i, j, k, half = weights[0], weights[1], weights[2], np.int32(1 << (RESIZE_BITS - 1))
    for x in range(out.shape[0]):
        out[x] = np.int32(a[x] * i + b[x] * j + c[x] * k + half) >> RESIZE_BITS


@compiled
def _weigh_two(a, b, weights, sums):
    i, half = weights[0], np.int32(1 << (RESIZE_BITS - 1))
    j = weights[1] if weights.shape[0] > 1 else np.int32(0)
    for x in range(sums.shape[0]):
        sums[x] = a[x] * i + b[x] * j + half


@compiled
def _weigh_one(line, weight, sums):
    for x in range(sums.shape[0]):
        sums[x] += line[x] * weight


@compiled
def _finish(sums, out):
    for x in range(out.shape[0]):
        out[x] = sums[x] >> RESIZE_BITS


@compiled
def color_view(view, row):
    """Apply the color operations `row[5:10]` with the factors `row[10:14]` to `view [S S 3]` uint8, in place."""
    for slot in range(5, 10):
        operation = int(row[slot])
        if operation == BRIGHTNESS:
            blend_with(view, 0, row[10])
        elif operation == CONTRAST:
            blend_with(view, mean_gray(view), row[11])
        elif operation == SATURATION:
            saturate(view, row[12])
        elif operation == HUE:
            shift_hue(view, row[13])
        elif operation == GRAY:
            saturate(view, np.float32(0.0))


@compiled
def solarize(view, threshold):
    """Invert the levels of `view [S S 3]` uint8 from `threshold` on, as PIL's ImageOps.solarize; in place."""
    flat = view.reshape(-1)
    limit = np.uint8(threshold)
    for i in range(flat.shape[0]):
        flat[i] = flat[i] if flat[i] < limit else np.uint8(255 - flat[i])


@compiled
def blend_with(view, level, factor):
    """`level + factor * (view - level)` in float32, clipped and truncated to uint8 as PIL's blend; in place."""
    flat = view.reshape(-1)
    base = np.float32(level)
    for i in range(flat.shape[0]):
        flat[i] = _blend(base, np.float32(flat[i]), factor)


@njit(nogil=True, inline="always")
def _blend(base, value, factor):
    # To int32 on the way to uint8: the conversion that there is a vector instruction for.
    return np.uint8(np.int32(min(max(base + factor * (value - base), np.float32(0.0)), np.float32(255.0))))


@compiled
def mean_gray(view):
    """The mean of PIL's L image of `view [S S 3]`, rounded to a whole level."""
    flat = view.reshape(-1)
    pixels = flat.shape[0] // 3
    total = 0
    for i in range(pixels):
        total += (flat[3 * i] * RED + flat[3 * i + 1] * GREEN + flat[3 * i + 2] * BLUE + 0x8000) >> 16
    return int(total / pixels + 0.5)


@compiled
def saturate(view, factor):
    """Blend every pixel of `view [S S 3]` with its own gray level, as PIL's Color enhancer; 0 = gray. In place."""
    flat = view.reshape(-1)
    f32, i32, u32 = np.float32, np.int32, np.uint32
    for i in range(flat.shape[0] // 3):
        red, green, blue = u32(flat[3 * i]), u32(flat[3 * i + 1]), u32(flat[3 * i + 2])
        luma = u32(red * u32(RED)) + u32(green * u32(GREEN)) + u32(blue * u32(BLUE)) + u32(0x8000)
        gray = f32(i32(u32(luma) >> u32(16)))
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
    shift = np.int32(turns * 255)
    flat = view.reshape(-1)
    f32, i32, u8 = np.float32, np.int32, np.uint8
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
    side = view.shape[0]
    flat = view.reshape(side, 3 * side)
    across = np.empty((side, 3 * side), np.uint8)
    _blur_rows(flat, inner, outer, radius, across)
    _blur_columns(across, inner, outer, radius, flat)
    _blur_columns(flat, inner, outer, radius, across)
    _blur_columns(across, inner, outer, radius, flat)


@compiled
def box_weights(sigma):
    """PIL's extended box, three of which stand for a Gaussian: (weight of whole px, weight of the px beyond, radius).

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", SSVM 2011.
    """
    # float32 step by step, as PIL; a mixed expression would be computed in float64 and move the last bit of a weight.
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    variance = sigma * sigma / np.float32(BLUR_PASSES)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = np.float32(math.floor((length - one) / two))
    after = whole + one
    part = (two * whole + one) * (whole * after - three * variance) / (six * (variance - after * after))
    reach = whole + part
    inner = int(np.float32(1 << BLUR_BITS) / (reach * two + one))
    radius = int(reach)
    return np.uint32(inner), np.uint32(((1 << BLUR_BITS) - (radius * 2 + 1) * inner) // 2), radius


@compiled
def _blur_rows(source, inner, outer, radius, out):
    # Pass by pass over the whole view: a row read again right after it was written would wait for its own stores. The
    # padded rows lie end to end, so a pass is one long loop; what it makes of the margins is overwritten.
    side, margin = source.shape[0], 3 * (radius + 1)
    size = 3 * side
    padded = np.empty((2, side, size + 2 * margin), np.uint8)
    for y in range(side):
        _copy(source[y], padded[0, y][margin : margin + size])
    for turn in range(BLUR_PASSES):
        lines, made = padded[turn % 2], padded[1 - turn % 2]
        for y in range(side):
            _repeat_ends(lines[y], margin)
        _blur_along(lines.reshape(-1), 3, inner, outer, radius, made.reshape(-1))
    for y in range(side):
        _copy(padded[BLUR_PASSES % 2, y][margin : margin + size], out[y])


@compiled
def _blur_along(flat, stride, inner, outer, radius, out):
    """One box along values that lie `stride` apart in `flat`; `out` but for its ends, `radius + 1` strides each."""
    margin = stride * (radius + 1)
    size = flat.shape[0] - 2 * margin
    before, after, made = flat[:size], flat[2 * margin :], out[margin : margin + size]
    if radius == 0:  # what views are blurred with: sigma up to 2
        _box_of_one(before, flat[margin : margin + size], after, inner, outer, made)
    elif radius == 1:
        left, center, right = flat[stride:], flat[2 * stride :], flat[3 * stride :]
        _box_of_three(before, (left[:size], center[:size], right[:size]), after, inner, outer, made)
    else:
        sums = np.zeros(size, np.uint16)
        for k in range(1, 2 * radius + 2):
            _add(sums, flat[k * stride : k * stride + size])
        _box(sums, before, after, inner, outer, made)


@compiled
def _repeat_ends(line, margin):
    size = line.shape[0]
    for j in range(0, margin, 3):
        for channel in range(3):
            line[j + channel] = line[margin + channel]
            line[size - margin + j + channel] = line[size - margin - 3 + channel]


@compiled
def _blur_columns(source, inner, outer, radius, out):
    side, margin = source.shape[0], radius + 1
    if side > 2 * margin:
        _blur_along(source.reshape(-1), source.shape[1], inner, outer, radius, out.reshape(-1))
    sums = np.empty(source.shape[1], np.uint16)
    for y in range(side):
        if margin <= y < side - margin:
            continue
        sums[:] = 0
        for k in range(y - radius, y + radius + 1):
            _add(sums, source[min(max(k, 0), side - 1)])
        _box(sums, source[max(y - margin, 0)], source[min(y + margin, side - 1)], inner, outer, out[y])


@compiled
def _add(sums, line):
    for j in range(sums.shape[0]):
        sums[j] += line[j]


@compiled
def _box_of_one(before, middle, after, inner, outer, out):
    """`_box` of radius 0, where the sum is a pixel."""
    u32 = np.uint32
    for j in range(out.shape[0]):
        beyond = u32(u32(before[j]) + u32(after[j]))
        whole = u32(u32(middle[j]) * inner)
        out[j] = u32(whole + u32(beyond * outer) + u32(1 << (BLUR_BITS - 1))) >> u32(BLUR_BITS)


@compiled
def _box_of_three(before, middle, after, inner, outer, out):
    """`_box` of radius 1, where the sum is one of three pixels: not written down and read again."""
    u32 = np.uint32
    left, center, right = middle
    for j in range(out.shape[0]):
        beyond = u32(u32(before[j]) + u32(after[j]))
        whole = u32(u32(u32(left[j]) + u32(center[j]) + u32(right[j])) * inner)
        out[j] = u32(whole + u32(beyond * outer) + u32(1 << (BLUR_BITS - 1))) >> u32(BLUR_BITS)


@compiled
def _box(sums, before, after, inner, outer, out):
    u32 = np.uint32
    for j in range(sums.shape[0]):
        beyond = u32(u32(before[j]) + u32(after[j]))
        out[j] = u32(u32(sums[j] * inner) + u32(beyond * outer) + u32(1 << (BLUR_BITS - 1))) >> u32(BLUR_BITS)

"""The innermost loops of pipelines/kernels.py that numba finds no vector instructions for, in LLVM's own terms.

Measured on one core of a Xeon: the rows of a crop take 0.06 ms with these and 0.23 ms with the best plain loop; batches written
past the caches save 0.2 ms of 0.95 per image. What they make is compared with PIL, bit for bit (tests/pipelines/test_kernels.py).
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 8
"""Rows of a picture that are resized together, as blocks of 8x8 pixels of 32 bit: rows share the weights."""
WORD, BYTE, FLOAT = ir.IntType(32), ir.IntType(8), ir.FloatType()
PIXELS, BYTES, SUMS = ir.VectorType(WORD, ROWS), ir.VectorType(BYTE, 4 * ROWS), ir.VectorType(WORD, 4 * ROWS)
FLOATS, LEVELS = ir.VectorType(FLOAT, 16), ir.VectorType(BYTE, 16)
RESIZE_BITS = 22  # fixed point of resize weights, as PIL's for 8-bit channels


def _whole(number):
    return ir.Constant(ir.IntType(64), number)


def _arrays(context, builder, signature, args, *which):
    return [context.make_array(signature.args[i])(context, builder, args[i]) for i in which]


def _pointer(builder, data, at, kind):
    return builder.bitcast(builder.gep(data, [at]), kind.as_pointer())


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
def pointer_to(typingctx, address):
    """An address as a pointer that `carray` takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@intrinsic
def stream_normalized(typingctx, levels, low, factor, block, tile):
    """(level - low) * factor of a row of uint8 `levels`, a multiple of 16, as float32 to the address `block` and, unless it is 0,
    to `tile`, both of 64: past the caches, which would first read what is going to be overwritten, and nobody needs it soon.

    A `fence` must follow. Subtracted before multiplied, since a product and a sum would be fused on some machines, and round
    otherwise.
    """

    def codegen(context, builder, signature, args):
        level, less, times = _arrays(context, builder, signature, args, 0, 1, 2)
        blocks = builder.udiv(builder.extract_value(level.shape, 0), _whole(16))
        marked = builder.module.add_metadata([ir.Constant(WORD, 1)])
        with cgutils.for_range(builder, blocks) as loop:
            at = builder.mul(loop.index, _whole(16))
            value = builder.load(_pointer(builder, level.data, at, LEVELS), align=1)
            value = builder.uitofp(builder.zext(value, ir.VectorType(WORD, 16)), FLOATS)
            lows, factors = (builder.load(_pointer(builder, row.data, at, FLOATS), align=4) for row in (less, times))
            value = builder.fmul(builder.fsub(value, lows), factors)
            for address in args[3:]:
                with builder.if_then(builder.icmp_signed("!=", address, _whole(0))):
                    place = builder.inttoptr(builder.add(address, builder.mul(at, _whole(4))), FLOATS.as_pointer())
                    builder.store(value, place, align=64).set_metadata("nontemporal", marked)
        return context.get_dummy_value()

    return types.void(levels, low, factor, types.intp, types.intp), codegen


@intrinsic
def fence(typingctx):
    """What was streamed is seen by other threads from here on."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def load_block(typingctx, flat, starts, offset, pixels, x):
    """`pixels[x + i, r]` = pixel i behind byte `starts[r] + offset` of `flat`, i and r = 0..7.

    Of the four bytes of a pixel the last is rubbish. 8 bytes more than the pixels take are read.
    """

    def codegen(context, builder, signature, args):
        source, first, out = _arrays(context, builder, signature, args, 0, 1, 3)
        spread, rows = [3 * (i // 4) + min(i % 4, 2) for i in range(4 * ROWS)], []
        for r in range(ROWS):
            start = builder.add(builder.load(builder.gep(first.data, [_whole(r)])), args[2])
            levels = builder.load(_pointer(builder, source.data, start, BYTES), align=1)
            rows.append(builder.bitcast(_shuffle(builder, levels, levels, spread), PIXELS))
        for i, column in enumerate(_transpose(builder, rows)):
            at = builder.mul(builder.add(args[4], _whole(i)), _whole(ROWS))
            builder.store(column, _pointer(builder, out.data, at, PIXELS), align=4)
        return context.get_dummy_value()

    return types.void(flat, starts, types.intp, pixels, types.intp), codegen


@intrinsic
def weigh_block(typingctx, pixels, first, weights, x, out):
    """Eight pixels of eight rows: `out[r, 3 (x + i) + c] = sum over k of pixels[first[x + i] + k, r][c] * weights[x + i, k]`.

    Fixed point, one vector of 32 sums for the 8 rows of a pixel. 8 bytes past the pixels are written to each row of `out`,
    so it needs as many to spare and blocks must be written from left to right.
    """

    def codegen(context, builder, signature, args):
        pixel, start, weight, made = _arrays(context, builder, signature, args, 0, 1, 2, 4)
        taps, sums, columns = builder.extract_value(weight.shape, 1), cgutils.alloca_once(builder, SUMS), []
        for i in range(ROWS):
            at = builder.add(args[3], _whole(i))
            left, line = builder.load(builder.gep(start.data, [at])), builder.gep(weight.data, [builder.mul(at, taps)])
            builder.store(ir.Constant(SUMS, [1 << (RESIZE_BITS - 1)] * 4 * ROWS), sums)
            with cgutils.for_range(builder, taps) as loop:
                at = builder.mul(builder.add(left, loop.index), _whole(ROWS))
                levels = builder.load(_pointer(builder, pixel.data, at, BYTES), align=4)
                factor = builder.load(builder.gep(line, [loop.index]))
                factor = builder.insert_element(ir.Constant(SUMS, ir.Undefined), factor, ir.Constant(WORD, 0))
                product = builder.mul(builder.zext(levels, SUMS), _shuffle(builder, factor, factor, [0] * 4 * ROWS))
                builder.store(builder.add(builder.load(sums), product), sums)
            levels = builder.lshr(builder.load(sums), ir.Constant(SUMS, [RESIZE_BITS] * 4 * ROWS))
            columns.append(builder.bitcast(builder.trunc(levels, BYTES), PIXELS))
        left, stride = builder.mul(args[3], _whole(3)), builder.extract_value(made.strides, 0)
        packed = [4 * (i // 3) + i % 3 for i in range(3 * ROWS)] + [0] * ROWS
        for r, row in enumerate(_transpose(builder, columns)):
            levels, at = builder.bitcast(row, BYTES), builder.add(builder.mul(stride, _whole(r)), left)
            builder.store(_shuffle(builder, levels, levels, packed), _pointer(builder, made.data, at, BYTES), align=1)
        return context.get_dummy_value()

    return types.void(pixels, first, weights, types.intp, out), codegen

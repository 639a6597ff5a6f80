"""RandAugment's operations on a view that the color operations lack, for CPUs: PIL's arithmetic, bit for bit.

Those that change levels are tables, one for each channel; those that move pixels are one affine map, interpolated in float64.
"""

import math

import numpy as np

from inscon import plan as codes
from inscon.plan import FILL
from pipelines.compiled import compiled, u8

DECIMALS = 1e15  # PIL rounds sines and cosines to 15 decimals
SPLIT = 134217729.0  # 2**27 + 1: halves a float64 into two factors whose products are exact


@compiled
def change_levels(view, operation, strength):
    """Auto-contrast, equalize, invert, posterize, solarize or solarize-add of `view [S S 3]` uint8, in place."""
    flat, counts, table = view.reshape(-1), np.zeros((3, 256), np.int64), np.empty((3, 256), np.uint8)
    if operation in (codes.AUTO_CONTRAST, codes.EQUALIZE):
        for i in range(0, flat.shape[0], 3):
            for channel in range(3):
                counts[channel, flat[i + channel]] += 1
    for channel in range(3):
        if operation == codes.AUTO_CONTRAST:
            _stretch(counts[channel], table[channel])
        elif operation == codes.EQUALIZE:
            _equalize(counts[channel], table[channel])
        else:
            _change(operation, int(strength), table[channel])
    for i in range(0, flat.shape[0], 3):
        for channel in range(3):
            flat[i + channel] = table[channel, flat[i + channel]]


@compiled
def _change(operation, strength, table):
    for level in range(256):
        if operation == codes.INVERT:
            table[level] = 255 - level
        elif operation == codes.POSTERIZE:
            table[level] = level >> (8 - strength) << (8 - strength)
        elif operation == codes.SOLARIZE:
            table[level] = level if level < strength else 255 - level
        else:
            assert operation == codes.SOLARIZE_ADD
            table[level] = min(level + strength, 255) if level < 128 else level


@compiled
def _stretch(counts, table):
    """The lowest level that occurs becomes 0 and the highest 255; a single one stays."""
    found = np.flatnonzero(counts)
    low, high = found[0], found[-1]
    scale = 255.0 / max(high - low, 1)
    for level in range(256):
        table[level] = min(max(int(level * scale + -low * scale), 0), 255) if high > low else level


@compiled
def _equalize(counts, table):
    """Levels become their ranks, in steps of a 255th of the pixels below the highest level."""
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    below = step // 2
    for level in range(256):
        table[level] = min(below // step, 255) if step else level
        below += counts[level]


@compiled
def matrix(operation, strength, side):
    """Where what a view of `side` px shows at (x, y) comes from, (a x + b y + c, d x + e y + f), as PIL works it out: turned by
    degrees, sheared by px per px, or shifted by px."""
    s = float(strength)
    if operation != codes.ROTATE:
        b, c = s * (operation == codes.SHEAR_X), s * (operation == codes.TRANSLATE_X)
        return 1.0, b, c, s * (operation == codes.SHEAR_Y), 1.0, s * (operation == codes.TRANSLATE_Y)
    middle, angle = side / 2, -math.radians(s % 360.0)
    cosine, sine = _rounded(math.cos(angle)), _rounded(math.sin(angle))
    across, down = cosine * -middle + sine * -middle + middle, -sine * -middle + cosine * -middle + middle
    return cosine, sine, across, -sine, cosine, down


@compiled
def _rounded(x):
    """Python's round(x, 15) of -1..1: what the product loses decides close cases, and is worked out (Dekker, 1971)."""
    product = x * DECIMALS
    x_high, high = SPLIT * x - (SPLIT * x - x), SPLIT * DECIMALS - (SPLIT * DECIMALS - DECIMALS)
    x_low, low = x - x_high, DECIMALS - high
    lost = x_high * high - product + x_high * low + x_low * high + x_low * low
    whole = np.rint(product)
    above, below = product - whole - 0.5 + lost > 0, product - whole + 0.5 + lost < 0
    return (whole + above - below) / DECIMALS


@compiled
def move(view, operation, strength):
    """Rotate, shear or shift `view [S S 3]` uint8, in place: bilinear, between pixel centers; FILL from outside."""
    side, source = view.shape[0], view.copy()
    a, b, c, d, e, f = matrix(operation, strength, side)
    for j in range(side):
        for i in range(side):
            x = a * (i + 0.5) + b * (j + 0.5) + c
            y = d * (i + 0.5) + e * (j + 0.5) + f
            if not (0 <= x < side and 0 <= y < side):
                view[j, i, 0], view[j, i, 1], view[j, i, 2] = FILL
                continue
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            right, bottom = min(left + 1, side - 1), min(top + 1, side - 1)
            dx, dy = x - 0.5 - left, y - 0.5 - top
            left, top = max(left, 0), max(top, 0)
            for channel in range(3):
                upper = _between(source[top, left, channel], source[top, right, channel], dx)
                lower = _between(source[bottom, left, channel], source[bottom, right, channel], dx)
                view[j, i, channel] = u8(_between(upper, lower, dy))


@compiled
def _between(one, other, share):
    return float(one) + (float(other) - float(one)) * share


@compiled
def smoothed(view):
    """PIL's ImageFilter.SMOOTH of `view [S S 3]` uint8, a new array: (neighbors + 5 center) / 13, but at the borders."""
    made, side = view.copy(), view.shape[0]
    for y in range(1, side - 1):
        for x in range(1, side - 1):
            for channel in range(3):
                total = 4 * int(view[y, x, channel])
                for row in range(y - 1, y + 2):
                    for column in range(x - 1, x + 2):
                        total += view[row, column, channel]
                made[y, x, channel] = (2 * total + 13) // 26
    return made

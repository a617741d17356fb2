"""Slow plain twin of trainer.finalize.coder's reader: one symbol at a time, in Python integers.

Its own range coder state and its own probabilities, from the format's definition only: no numpy,
no constriction. Fractions are rounded down wherever the format says so.
"""

from functools import cache
from itertools import pairwise
from math import isqrt

CLASSES, PRECISION = 160, 24


class Ans:
    """rANS with a 64-bit state on a stack of 32-bit words, the last word on top."""

    def __init__(self, blob):
        blob = blob + bytes(-len(blob) % 4)
        self.words = [int.from_bytes(blob[i : i + 4], "little") for i in range(0, len(blob), 4)]
        self.state = 0
        for _ in range(min(2, len(self.words))):
            self.state = self.state << 32 | self.words.pop()

    def take(self, weights):
        """Return the index of the interval of weights, which sum to 2 ** 24, that is next."""
        at, symbol = self.state % 2**PRECISION, 0
        while at >= weights[symbol]:
            at -= weights[symbol]
            symbol += 1
        self.state = (self.state >> PRECISION) * weights[symbol] + at
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol

    def number(self, count):
        if count == 1:
            return 0
        each = 2**PRECISION // count
        return self.take([each] * (count - 1) + [2**PRECISION - each * (count - 1)])


@cache
def root(j):
    """Return 2 ** (-j / 16) in units of 2 ** -40."""
    return isqrt(isqrt(isqrt(isqrt(2 ** (1280 - j))))) // 2**40


@cache
def tails():
    one = 2**96

    def exp_minus(power):
        total, term, n = 0, one, 0
        while term:
            total += (-1) ** n * term
            n += 1
            term = (term >> power) // n
        return total

    ratio, square = exp_minus(17), exp_minus(16)
    density = [one]
    for _ in range(2049):
        density.append(density[-1] * ratio // one)
        ratio = ratio * square // one
    areas = [0]
    for i in range(2048, -1, -1):
        areas.append(areas[-1] + density[i] + density[i + 1])
    return [area * 2**37 // areas[-1] for area in reversed(areas)]


def below(edge, cls, mean):
    """Return P(X < edge / 2) in units of 2 ** -38, mean in eighths of σ."""
    inverse = root(cls % 16) >> cls // 16
    at = (edge * inverse >> 22) - (mean << 13)
    place, fraction = min(abs(at) >> 8, 2048), abs(at) & 255
    upper = tails()[place] - ((tails()[place] - tails()[place + 1]) * fraction >> 8)
    return upper if at < 0 else 2**38 - upper


@cache
def probabilities(cls, mean, shape, low, high):
    """Return the weights of low..high in units of 2 ** -24."""
    size = high - low + 1
    mixed = [min(max(cls + by, 0), CLASSES - 1) for by in (0, 0, -3 * shape, 3 * shape)]
    ends = [0]
    for q in range(low, high):
        inner = sum(below(2 * q + 1, part, mean) for part in mixed) >> 2
        ends.append(inner * (2**PRECISION - size) >> 38)
    ends.append(2**PRECISION - size)
    return [right - left + 1 for left, right in pairwise(ends)]


def log2_sixteenths(value):
    """Return log2 of a positive float in sixteenths, rounded down."""
    result = 0
    while value >= 2:
        value, result = value / 2, result + 16
    while value < 1:
        value, result = value * 2, result - 16
    return result + max(j for j in range(16) if j == 0 or value * root(j) >= 2**40)


def centre(values):
    mean = sum(values) // len(values)
    return [value - mean for value in values]


def clip(value, bound):
    return min(max(value, -bound), bound)


def take_codes(ans, length):
    spread = ans.number(64)
    if spread == 0:
        return [0] * length
    weights = probabilities(2 * (spread - 1), 0, 2, -63, 63)
    return [ans.take(weights) - 63 for _ in range(length)]


def take_scales(ans, length, count, own, earlier, used):
    references = earlier.get(length, [])
    reference = ans.number(len(references) + 1)
    slope = ans.number(16) + 1 if reference else 0
    step = max(1, isqrt(3196 // count))
    scales = [code * step for code in take_codes(ans, length)]
    used.update(["scales"] if any(scales) else [], ["reference"] if reference else [])
    if reference:
        like = references[reference - 1]
        scales = [s + (slope * r >> 3) - o for s, r, o in zip(scales, like, own, strict=True)]
    return [clip(scale, CLASSES) for scale in scales]


def take_components(ans, rows, cols):
    return [
        (ans.number(16), take_codes(ans, rows), take_codes(ans, cols)) for _ in range(ans.number(9))
    ]


def total(components, unit, i, j):
    return sum(12 * unit * a[i] * b[j] << 16 - exponent for exponent, a, b in components) >> 16


def decode(blob, rows, cols, bits, scale, earlier, used):
    """Return the integers by rows and whether the blob ended there.

    `earlier` grows by the sizes of rows and columns, `used` by the parts of the format seen.
    """
    ans = Ans(blob)
    low, high = (ans.number(2**bits) - 2 ** (bits - 1) for _ in range(2))
    if low == high:
        return [[low] * cols for _ in range(rows)], ans.state == 0
    base, shape = ans.number(CLASSES), ans.number(8)
    own = centre([log2_sixteenths(value) for value in scale])
    row_scales = take_scales(ans, rows, cols, own, earlier, used)
    col_scales = take_scales(ans, cols, rows, [0] * cols, earlier, used)
    shifts, means = take_components(ans, rows, cols), take_components(ans, rows, cols)
    parts = {"shape": shape, "shifts": shifts, "means": means}
    used.update(part for part, value in parts.items() if value)
    kinds = {}
    for i in range(rows):
        for j in range(cols):
            shift = clip(total(shifts, 16, i, j), CLASSES)
            mean = clip(total(means, 2048, i, j), 2**22)
            mean = clip((mean * root(shift % 16) >> 40 + shift // 16) >> 8, 127)
            cls = base + row_scales[i] + col_scales[j] + shift
            kinds.setdefault((mean, min(max(cls, 0), CLASSES - 1)), []).append((i, j))
    q = [[0] * cols for _ in range(rows)]
    for mean, cls in sorted(kinds):
        weights = probabilities(cls, mean, shape, low, high)
        for i, j in kinds[mean, cls]:
            q[i][j] = low + ans.take(weights)
    sizes = [s + o for s, o in zip(row_scales, own, strict=True)]
    earlier.setdefault(rows, []).append(centre(sizes))
    earlier.setdefault(cols, []).append(centre(col_scales))
    return q, ans.state == 0 and not ans.words

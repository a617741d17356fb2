"""Slow plain twin of trainer.finalize.quantize: one row, one candidate, one weight at a time."""

import statistics

import torch

RATIOS = (0.80, 0.85, 0.90, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0)
QUANTILES = {
    "p3": (0.999, 0.9999, 1.0),
    "p5": (0.999, 0.9995, 0.9999, 0.99999, 1.0),
    "p9": (0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999, 1.0),
}


def half(value):
    """Round a Python float to the nearest float16 and back."""
    return float(torch.tensor(value, dtype=torch.float32).half())


def row_clips(row, clip):
    if clip == "none":
        return [float(row.abs().max())]
    if clip == "r9":
        return [ratio * float(row.abs().max()) for ratio in RATIOS]
    if clip.startswith("sd"):
        return [float(clip[2:]) * statistics.pstdev(row.tolist())]
    return [float(torch.quantile(row.abs(), share)) for share in QUANTILES[clip]]


def quantize_row(row, scale, lowest, highest):
    # Python's round, like torch's, takes halves to the even neighbour.
    return [max(lowest, min(highest, round(float(weight / scale)))) for weight in row]


def candidates(row, bits, clip, scale_floor, symmetric):
    """Yield (integers, scale, squared error) of each candidate clip of a row."""
    bound = 2 ** (bits - 1) - 1
    for candidate in row_clips(row, clip):
        scale = min(max(half(max(candidate / bound, scale_floor)), 2.0**-24), 65_504.0)
        lowest = -bound if symmetric else -bound - 1
        q = quantize_row(row, torch.tensor(scale), lowest, bound)
        yield q, scale, sum((float(w) - k * scale) ** 2 for w, k in zip(row, q, strict=True))


def quantize_matrix(weight, bits, clip, scale_floor, *, symmetric=True):
    """Each row takes its own best candidate; return (integer rows, scales, squared errors)."""
    rows = [
        min(candidates(row, bits, clip, scale_floor, symmetric), key=lambda kept: kept[2])
        for row in weight
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def quantize_whole_matrix(weight, bits, clip, scale_floor, *, symmetric=True):
    """All rows take the one candidate that is best for the matrix; return as above."""
    per_row = [list(candidates(row, bits, clip, scale_floor, symmetric)) for row in weight]
    together = list(zip(*per_row, strict=True))  # by candidate, then by row
    best = min(together, key=lambda rows: sum(error for _, _, error in rows))
    return [list(column) for column in zip(*best, strict=True)]


def quantize_int8(weight, quantile, scale_floor):
    """The public baseline's rule for 8 bits; return (integer rows, stored scales)."""
    all_q, scales = [], []
    for row in weight:
        clip = torch.quantile(row.abs(), quantile)
        scale = max(clip / 127.0, torch.tensor(scale_floor))
        clipped = [max(min(weight, clip), -clip) for weight in row]
        all_q.append(quantize_row(clipped, scale, -127, 127))
        scales.append(float(scale.half()))
    return all_q, scales

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


def quantize_row(row, scale, bound):
    # Python's round, like torch's, takes halves to the even neighbour.
    return [max(-bound, min(bound, round(float(weight / scale)))) for weight in row]


def quantize_matrix(weight, bits, clip, scale_floor):
    """Return (list of integer rows, list of scales, list of squared errors)."""
    bound = 2 ** (bits - 1) - 1
    all_q, scales, errors = [], [], []
    for row in weight:
        best = None
        for candidate in row_clips(row, clip):
            scale = min(max(half(max(candidate / bound, scale_floor)), 2.0**-24), 65_504.0)
            q = quantize_row(row, torch.tensor(scale), bound)
            error = sum((float(w) - k * scale) ** 2 for w, k in zip(row, q, strict=True))
            if best is None or error < best[2]:
                best = (q, scale, error)
        all_q.append(best[0])
        scales.append(best[1])
        errors.append(best[2])
    return all_q, scales, errors

"""Slow plain twin of trainer.finalize.gptq: Optimal Brain Quantization in a fixed order, the
Hessian of what is left inverted afresh for every column, one row at a time, in float64."""

import torch


def column_order(hessian, *, act_order):
    """Columns by falling diagonal, equal ones by position."""
    columns = list(range(len(hessian)))
    return sorted(columns, key=lambda c: -float(hessian[c, c])) if act_order else columns


def round_row(row, scale, hessian, damping, order, lowest, highest):
    """Round one row of integers with the update of Frantar & Alistarh 2022, equation 3."""
    mean = float(hessian.diagonal().double().mean())
    damped = hessian.double() + damping * mean * torch.eye(len(hessian), dtype=torch.float64)
    left, weights, rounded = list(order), row.double().clone(), [0] * len(row)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        column = left[0]
        step = round(float(weights[column]) / scale)
        rounded[column] = max(lowest, min(highest, step))
        error = (float(weights[column]) - rounded[column] * scale) / float(inverse[0, 0])
        for place, other in enumerate(left):
            weights[other] -= error * float(inverse[0, place])
        left = left[1:]
    return rounded


def round_matrix(weight, scales, bits, hessian, damping, *, act_order=True, symmetric=True):
    """Round every row on its own scale; return integer rows."""
    bound = 2 ** (bits - 1) - 1
    order = column_order(hessian, act_order=act_order)
    lowest = -bound if symmetric else -bound - 1
    return [
        round_row(row, float(scale), hessian, damping, order, lowest, bound)
        for row, scale in zip(weight, scales, strict=True)
    ]

"""Low-rank repair of a quantized matrix: W ≈ W_q + A B, with A in 2 bits and B in 4.

Source: Zhang et al. 2024 (arXiv 2402.02446); the bits and scales from parameter-golf PR #1855
(techniques 4.3-23). Where the Hessian is known the error is decomposed in its metric, which on a
trained pr414 takes away 2 instead of 1 % of what rounding by the Hessian leaves at the output.
"""

from dataclasses import replace

import torch
from torch import Tensor

from trainer.finalize.gptq import Factor, row_errors
from trainer.finalize.stored import LOW_RANK_GROUP, LowRank, Quantized, low_rank_product, restore
from trainer.quant import LARGEST_SCALE, SMALLEST_SCALE


def repair(weight: Tensor, stored: Quantized, rank: int, factor: Factor | None) -> Quantized:
    """Add a low-rank part to a stored matrix; return it as it was if its error would not fall.

    The error is that at the output, or by squares without a factor.
    """
    error = weight - restore(stored)
    part = _low_rank(error, rank, factor)

    def size(left: Tensor) -> float:
        if factor is None:
            return float(left.square().sum(dtype=torch.float64))
        return float(row_errors(left.to(factor.hessian.device), factor.hessian).sum())

    if size(error - low_rank_product(part)) >= size(error):
        return stored
    return replace(stored, low_rank=part)


def _low_rank(error: Tensor, rank: int, factor: Factor | None) -> LowRank:
    """Decompose an error, round A, and give B the least squares for the A that is stored."""
    measured = error.double()
    if factor is not None:
        # H = R Rᵀ: the singular vectors of E R are those that count at the output.
        there = error.to(factor.root.device).double()[:, factor.order]
        measured = (there @ factor.root.double()).cpu()
    left = torch.linalg.svd(measured, full_matrices=False).U[:, :rank].float()
    # Columns of equal size share A's one scale best; B's rows, with scales of their own, carry S.
    left = left / left.abs().amax(dim=0)
    a_scale = _half(left.abs().max() / 1.5)
    a = (left / a_scale.float()).round().clamp(-2, 1)
    b = torch.linalg.pinv((a * a_scale.float()).double()) @ error.double()
    padded = torch.nn.functional.pad(b.float(), (0, -b.shape[1] % LOW_RANK_GROUP))
    groups = padded.unflatten(1, (-1, LOW_RANK_GROUP))
    b_scale = _half(groups.abs().amax(dim=2) / 7.5)
    steps = (groups / b_scale.float()[:, :, None]).round().clamp(-8, 7)
    whole = steps.flatten(1)[:, : b.shape[1]]
    return LowRank(a.to(torch.int8), a_scale, whole.to(torch.int8).contiguous(), b_scale)


def _half(scale: Tensor) -> Tensor:
    return scale.float().clamp(SMALLEST_SCALE, LARGEST_SCALE).half()

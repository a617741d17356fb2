"""The forms in which a tensor is stored, and what a reader of the artifact gets from each.

Which tensor takes which form is `trainer.finalize.quantize`'s choice, how the bytes lie in the file
`trainer.finalize.artifact`'s.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trainer.quant import dequantize_rows

LOW_RANK_GROUP: Final = 64  # entries of a row of B that share a scale


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A repair A B of a quantized matrix [rows, cols], of rank r.

    a int8 [rows, r] in -2..1 with one float16 scale; b int8 [r, cols] in -8..7 with a float16
    scale for each `LOW_RANK_GROUP` columns of a row, [r, ceil(cols / group)].
    """

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A matrix on the grid: q int8 [rows, cols], scale float16 [rows]; repaired where it has a
    low-rank part."""

    q: Tensor
    scale: Tensor
    bits: int
    low_rank: LowRank | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Floats:
    """A tensor stored as it is, in float16 or float32."""

    tensor: Tensor


Stored = Quantized | Floats


def restore(stored: Stored) -> Tensor:
    """Return the float32 tensor that a reader of the artifact gets."""
    if isinstance(stored, Floats):
        return stored.tensor.float()
    weight = dequantize_rows(stored.q, stored.scale)
    return weight if stored.low_rank is None else weight + low_rank_product(stored.low_rank)


def low_rank_product(part: LowRank) -> Tensor:
    """Return A B as float32 [rows, cols].

    Summed rank by rank in float32: a library's product may sum in another order on another
    machine, and the weights would differ.
    """
    a = part.a.float() * part.a_scale.float()
    groups = part.b_scale.float().repeat_interleave(LOW_RANK_GROUP, dim=1)
    b = part.b.float() * groups[:, : part.b.shape[1]]
    product = torch.zeros(a.shape[0], b.shape[1])
    for rank in range(a.shape[1]):
        product += a[:, rank, None] * b[rank]
    return product

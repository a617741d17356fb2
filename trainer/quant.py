"""The grid that weights are rounded to: integers around zero, one float16 scale per row.

The one source of the rounding, for what is written after training and for any training that
imitates it: a second copy of these functions would drift from the artifact (techniques 2.21).
Which clip a row gets is decided in `trainer.finalize.quantize`, not here.

Shapes: weight [rows, cols] float32, clip [rows] float32, scale [rows] float16, q [rows, cols] int8.
"""

import torch
from torch import Tensor

from trainer.specs.final import LARGEST_SCALE

SMALLEST_SCALE = 2.0**-24  # the least float16 above zero: a row of zeros still has a scale
SMALLEST_NORMAL_HALF = 2.0**-14


def levels(bits: int) -> int:
    """Return R, the largest integer of the grid -R..R; 31 for 6 bits."""
    return 2 ** (bits - 1) - 1


def exact_scale(clip: Tensor, bits: int, scale_floor: float) -> Tensor:
    """Return max(clip / R, scale_floor) per row as float32, within what float16 can hold."""
    scale = (clip.float() / levels(bits)).clamp(min=scale_floor)
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)


def row_scale(clip: Tensor, bits: int, scale_floor: float) -> Tensor:
    """Return max(clip / R, scale_floor) per row as float16, never zero and never infinite.

    What is stored is what is divided by, so the rounding to float16 comes before any use.
    """
    return _nearest_half(exact_scale(clip, bits, scale_floor)).half()


def _nearest_half(x: Tensor) -> Tensor:
    """Round x, within float16's positive range, to its nearest float16, ties to even; float32.

    By bits, because a compiler drops the pair `.half().float()` and with it the rounding. After
    this one the pair rounds nothing.
    """
    bits = x.view(torch.int32)
    dropped = 13  # of float32's 23 mantissa bits float16 keeps 10
    is_odd = (bits >> dropped) & 1
    kept = (bits + (1 << (dropped - 1)) - 1 + is_odd) & ~((1 << dropped) - 1)
    subnormal = torch.round(x / SMALLEST_SCALE) * SMALLEST_SCALE
    return torch.where(x < SMALLEST_NORMAL_HALF, subnormal, kept.view(torch.float32))


def quantize_rows(weight: Tensor, scale: Tensor, bits: int, *, symmetric: bool = True) -> Tensor:
    """Round weight / scale half to even and clamp to -R..R, or -R-1..R; int8."""
    bound = levels(bits)
    steps = torch.round(weight.float() / scale.float().unsqueeze(-1))
    return steps.clamp(-bound if symmetric else -bound - 1, bound).to(torch.int8)


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """Return q times its row's scale; float32."""
    return q.float() * scale.float().unsqueeze(-1)

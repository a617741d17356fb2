"""The grid that weights are rounded to: symmetric integers, one float16 scale per row.

The one source of the rounding, for what is written after training and for any training that
imitates it: a second copy of these four functions would drift from the artifact (techniques 2.21).
Which clip a row gets is decided in `trainer.finalize.quantize`, not here.

Shapes: weight [rows, cols] float32, clip [rows] float32, scale [rows] float16, q [rows, cols] int8.
"""

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the least float16 above zero: a row of zeros still has a scale
LARGEST_SCALE = 65_504.0  # the greatest finite float16


def levels(bits: int) -> int:
    """Return R, the largest integer of the grid -R..R; 31 for 6 bits."""
    return 2 ** (bits - 1) - 1


def row_scale(clip: Tensor, bits: int, scale_floor: float) -> Tensor:
    """Return max(clip / R, scale_floor) per row as float16, never zero and never infinite.

    What is stored is what is divided by, so the rounding to float16 comes before any use.
    """
    scale = (clip.float() / levels(bits)).clamp(min=scale_floor)
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half()


def quantize_rows(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round weight / scale half to even and clamp to the grid; int8."""
    bound = levels(bits)
    steps = torch.round(weight.float() / scale.float().unsqueeze(-1))
    return steps.clamp(-bound, bound).to(torch.int8)


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """Return q times its row's scale; float32."""
    return q.float() * scale.float().unsqueeze(-1)

"""The walk of `trainer.finalize.gptq.walk_block` over a block of columns, as one Triton kernel.

Rows do not see one another, so each program takes a few and keeps their block in registers. Sums
come in the twin's order, the division is rounded as IEEE has it and the product with a scale of
float16 is exact: what may differ is only whether a product is rounded before it is added.
"""

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from trainer.quant import levels

_ROWS = 8  # of a program: as many as a warp keeps in registers with 128 columns
_WARP_ENTRIES = 1024
_MOST_WARPS = 16


def walk_block_triton(
    own: Tensor, aim: Tensor, mix: Tensor, scale: Tensor, q: Tensor, bits: int, *, symmetric: bool
) -> None:
    """Do what `walk_block` does, which see, on a CUDA device; own, aim and q are contiguous."""
    num_columns, num_rows = own.shape
    columns = max(triton.next_power_of_2(num_columns), 16)
    high = float(levels(bits))
    with torch.cuda.device_of(own):  # Triton takes the current one
        _walk[(triton.cdiv(num_rows, _ROWS),)](  # pyright: ignore[reportIndexIssue]
            own,
            aim,
            mix.contiguous(),
            scale.contiguous(),
            q,
            num_rows,
            -high if symmetric else -high - 1.0,
            high,
            num_columns=num_columns,
            COLUMNS=columns,
            ROWS=_ROWS,
            num_warps=min(max(columns * _ROWS // _WARP_ENTRIES, 1), _MOST_WARPS),
        )


@triton.jit
def _walk(
    own,
    aim,
    mix,
    scale,
    q,
    num_rows,
    low,
    high,
    num_columns: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, column < num_columns
    places = column[:, None] * num_rows + row[None, :]
    aims = tl.load(aim + places, mask=is_column[:, None] & is_row[None, :], other=0.0)
    unit = tl.load(scale + row, mask=is_row, other=1.0)
    for k in range(num_columns):
        at = k * num_rows + row
        plain = tl.load(own + at, mask=is_row, other=0.0)
        weights = tl.load(mix + k * num_columns + column, mask=is_column, other=0.0)
        here = tl.sum(tl.where(column[:, None] == k, aims, 0.0), axis=0)
        step = tl.minimum(tl.maximum(tl.div_rn(here, unit), low), high)
        # At 1.5 · 2^23 float32 holds integers only, so the sum is rounded: half to even.
        step = (step + 12582912.0) - 12582912.0
        step = tl.where(plain != 0.0, step, 0.0)
        lost = plain - step * unit
        tl.store(q + at, step.to(tl.int8), mask=is_row)
        tl.store(aim + at, lost, mask=is_row)
        aims += weights[:, None] * lost[None, :]

"""The kernels of `trainer.kernels.loss`, in Triton. A row is the logits of one token.

A warp holds whole rows, up to a width where a program of several warps shares one: no loop over
the vocabulary, and the logits are read once. At memory's speed 9 logits pass a multiprocessor per
clock, which computes 16 special functions in it: one for tanh and one for the power of two, no
more. The instruction for tanh is off by 2⁻¹¹ of its value, where a bfloat16 logit was rounded by
2⁻⁹ before; for float32 logits tanh comes from a power of two and is off by 10⁻⁷. Near the cap the
error of 1 − tanh² is a large part of it, and next to nothing of a gradient.
"""

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

_LANES = 32
# Logits that a thread holds: enough loads in flight, and no register spilled.
_PER_THREAD = 64
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


def loss_forward(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Do what `loss._forward` does, of contiguous logits."""
    loss = logits.new_empty(targets.shape, dtype=torch.float32)
    lse = torch.empty_like(loss)
    _launch(_forward, (logits, targets, loss, lse), logits, cap)
    return loss, lse


def loss_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float | None
) -> Tensor:
    """Do what `loss._backward` does, of contiguous tensors."""
    d_logits = torch.empty_like(logits)
    _launch(_backward, (grad, logits, targets, lse, d_logits), logits, cap)
    return d_logits


def _launch(kernel, tensors: tuple[Tensor, ...], logits: Tensor, cap: float | None) -> None:
    width = logits.shape[-1]
    num_rows = logits.numel() // max(1, width)
    if not num_rows:
        return
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // (_LANES * _PER_THREAD)))
    rows = max(1, warps * _LANES * _PER_THREAD // block)
    with torch.cuda.device_of(logits):
        kernel[(triton.cdiv(num_rows, rows),)](
            *tensors,
            num_rows,
            1.0 if cap is None else cap,
            1.0 if cap is None else 1.0 / cap,
            WIDTH=width,
            BLOCK=block,
            ROWS=rows,
            HAS_CAP=cap is not None,
            EXACT=logits.dtype == torch.float32,
            num_warps=warps,
        )


@triton.jit
def _scaled(x, cap, inverse, HAS_CAP: tl.constexpr, EXACT: tl.constexpr):
    """Return z · log2(e), for powers of two, and tanh(x / cap), or x where there is no cap."""
    if HAS_CAP:
        if EXACT:
            x = 1.0 - 2.0 / (1.0 + tl.exp2(x * inverse * (2.0 * _LOG2_E)))
        else:
            x = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [x * inverse], tl.float32, True, 1
            )
        z = x * (cap * _LOG2_E)
    else:
        z = x * _LOG2_E
    return z, x


@triton.jit
def _forward(
    logits_at, targets_at, loss_at, lse_at, num_rows, cap, inverse,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_CAP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = row < num_rows
    inside = there[:, None] & (column[None, :] < WIDTH)
    target = tl.load(targets_at + row, mask=there, other=0)
    place = row[:, None] * WIDTH + column[None, :]
    x = tl.load(logits_at + place, mask=inside, other=-float("inf")).to(tl.float32)
    known = there & (target >= 0) & (target < WIDTH)
    at_target = tl.load(logits_at + row * WIDTH + target, mask=known, other=float("nan"))
    of_target, _ = _scaled(at_target.to(tl.float32), cap, inverse, HAS_CAP, EXACT)
    of_target = tl.where(known, of_target, float("nan"))
    most, _ = _scaled(tl.max(x, axis=1), cap, inverse, HAS_CAP, EXACT)  # the cap keeps the order
    z, _ = _scaled(x, cap, inverse, HAS_CAP, EXACT)
    powers = tl.exp2(z - most[:, None])
    if WIDTH < BLOCK:
        powers = tl.where(column[None, :] < WIDTH, powers, 0.0)
    lse = most + tl.log2(tl.sum(powers, axis=1))
    tl.store(loss_at + row, (lse - of_target) * _LN_2, mask=there)
    tl.store(lse_at + row, lse * _LN_2, mask=there)


@triton.jit
def _backward(
    grad_at, logits_at, targets_at, lse_at, d_logits_at, num_rows, cap, inverse,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_CAP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = row < num_rows
    inside = there[:, None] & (column[None, :] < WIDTH)
    place = row[:, None] * WIDTH + column[None, :]
    x = tl.load(logits_at + place, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(targets_at + row, mask=there, other=0).to(tl.int32)
    grad = tl.load(grad_at + row, mask=there, other=0.0).to(tl.float32)
    lse = tl.load(lse_at + row, mask=there, other=0.0) * _LOG2_E
    z, t = _scaled(x, cap, inverse, HAS_CAP, EXACT)
    d = tl.exp2(z - lse[:, None])
    d = tl.where(column[None, :] == target[:, None], d - 1.0, d) * grad[:, None]
    if HAS_CAP:
        d = d * (1.0 - t * t)
    tl.store(d_logits_at + place, d.to(d_logits_at.dtype.element_ty), mask=inside)

"""The kernels of `trainer.kernels.stream` in Triton, for CUDA tensors.

A warp holds whole rows, so that a row's mean needs no barrier. Backwards every program walks over
many rows, keeps its share of the weights' gradients in registers and writes it once; torch adds
the shares up. Nothing is added atomically: two runs give the same bits.
"""

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

_LANES = 32
# Elements of one tensor that a thread holds at a time, forwards.
_ELEMENTS = 64
# The same backwards, and how many warps then share a multiprocessor, by a weight's rows: the more
# sums over tokens are in registers too, the fewer warps have room. A program too many would wait
# for all the others to end.
_BACKWARD = {1: (32, 14), 2: (32, 8)}


def triton_forward(
    x: Tensor, z: Tensor, weight: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `plain_forward` returns, of contiguous tensors in float32 or less."""
    width = x.shape[-1]
    num_rows = x.numel() // width
    out, normed = torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block, warps, rows = _tile(width, _ELEMENTS)
    with torch.cuda.device_of(x):  # Triton takes the current one
        _forward[(max(1, triton.cdiv(num_rows, rows)),)](  # pyright: ignore[reportIndexIssue]
            *(x, z, weight, out, normed, rstd),
            *(num_rows, factor, torch.finfo(torch.float32).eps, width),
            MIXED=weight.dim() == 2,
            BLOCK=block,
            ROWS=rows,
            num_warps=warps,
        )
    return out, normed, rstd


def triton_backward(
    grads: tuple[Tensor | None, Tensor | None],
    kept: Tensor,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `plain_backward` returns, of contiguous tensors in float32 or less."""
    width = kept.shape[-1]
    num_rows = kept.numel() // width
    d_x, d_z = torch.empty_like(kept), torch.empty_like(z)
    elements, at_once = _BACKWARD[weight.dim()]
    block, warps, rows = _tile(width, elements)
    num_tiles = triton.cdiv(num_rows, rows)
    most = _multiprocessors(kept.device) * max(1, at_once // warps)
    programs = max(1, min(num_tiles, most))
    shares = rstd.new_empty(programs, weight.numel())
    with torch.cuda.device_of(kept):
        _backward[(programs,)](  # pyright: ignore[reportIndexIssue]
            *(*grads, kept, z, weight, rstd, d_x, d_z, shares, num_rows, factor, width),
            MIXED=weight.dim() == 2,
            BLOCK=block,
            ROWS=rows,
            STEPS=triton.cdiv(num_tiles, programs),
            num_warps=warps,
        )
    return d_x, d_z, shares.sum(dim=0).view(weight.shape)


def _tile(width: int, elements: int) -> tuple[int, int, int]:
    """Return the padded width, the warps of a program and the rows that it holds at a time."""
    block = triton.next_power_of_2(width)
    warps = min(8, max(1, block // (_LANES * 16)))
    return block, warps, max(1, warps * _LANES * elements // block)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _load(ptr, place, inside):
    """Return what lies there in float32, zeros for a pointer that is None."""
    if ptr is None:
        value = tl.zeros(place.shape, tl.float32)
    else:
        value = tl.load(ptr + place, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _store(ptr, place, value, inside):
    tl.store(ptr + place, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(value, ptr):
    """Return float32 values as the dtype behind `ptr` keeps them."""
    return value.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _forward(
    x_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    normed_ptr,
    rstd_ptr,
    num_rows,
    factor,
    eps,
    WIDTH: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = column < WIDTH
    inside = (row < num_rows)[:, None] & there[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    # All loads before the first store: the compiler moves none across a store.
    x, z = _load(x_ptr, place, inside), _load(z_ptr, place, inside)
    weight = _load(weight_ptr, column, there)[None, :]
    if MIXED:
        out = weight * x + _load(weight_ptr, WIDTH + column, there)[None, :] * z
    else:
        out = x + weight * z
    out = _rounded(out, x_ptr)
    _store(out_ptr, place, out, inside)
    rstd = 1.0 / tl.sqrt(tl.sum(out * out, axis=1) / WIDTH + eps)
    _store(normed_ptr, place, out * (rstd * factor)[:, None], inside)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)


@triton.jit
def _backward(
    d_out_ptr,
    d_normed_ptr,
    kept_ptr,
    z_ptr,
    weight_ptr,
    rstd_ptr,
    d_x_ptr,
    d_z_ptr,
    shares_ptr,
    num_rows,
    factor,
    WIDTH: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    there = column < WIDTH
    weight_x = _load(weight_ptr, column, there)
    weight_z = weight_x
    if MIXED:
        weight_z = _load(weight_ptr, WIDTH + column, there)
    sum_x, sum_z = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        tile = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & there[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        # As there, and every one is under way before the first is waited for.
        kept, z = _load(kept_ptr, place, inside), _load(z_ptr, place, inside)
        d, g = _load(d_out_ptr, place, inside), _load(d_normed_ptr, place, inside)
        rstd = _load(rstd_ptr, row, row < num_rows)[:, None]
        if MIXED:
            out = _rounded(weight_x[None, :] * kept + weight_z[None, :] * z, kept_ptr)
        else:
            out = kept
        n = out * rstd
        d += rstd * factor * (g - n * (tl.sum(g * n, axis=1) / WIDTH)[:, None])
        _store(d_z_ptr, place, weight_z[None, :] * d, inside)
        sum_z += tl.sum(d * z, axis=0)
        if MIXED:
            sum_x += tl.sum(d * kept, axis=0)
            d = weight_x[None, :] * d
        _store(d_x_ptr, place, d, inside)
    if MIXED:
        share = shares_ptr + tl.program_id(0) * (2 * WIDTH) + column
        tl.store(share, sum_x, mask=there)
        tl.store(share + WIDTH, sum_z, mask=there)
    else:
        tl.store(shares_ptr + tl.program_id(0) * WIDTH + column, sum_z, mask=there)

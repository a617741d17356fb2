"""The kernels of `trainer.kernels.stream` in Triton, for CUDA tensors.

A warp holds whole rows, so that a row's mean needs no barrier. Backwards every program walks over
many rows, keeps its share of the parameters' gradients in registers and writes it once; torch adds
the shares up. Nothing is added atomically: two runs give the same bits.
"""

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

Terms = tuple[Tensor | None, ...]

_LANES = 32
# Elements of one tensor that a thread holds at a time, forwards.
_ELEMENTS = 64
# The same backwards, and how many warps then share a multiprocessor, by the number of sums over
# tokens. The parameters and these sums are in registers too: with more of them fewer elements and
# fewer warps have room. A program too many would wait for all the others to end.
_BACKWARD = {1: (32, 14), 2: (32, 8), 3: (16, 9), 4: (16, 8)}


def triton_forward(x: Tensor, terms: Terms, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `plain_forward` returns, of contiguous tensors in float32 or less."""
    branch, _, _, _, x0, _ = terms
    width = x.shape[-1]
    num_rows = x.numel() // width
    keeps_y = branch is not None and x0 is not None
    y = torch.empty_like(x) if keeps_y else x.new_empty(0)
    entry, normed = torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block, warps, rows = _tile(width, _ELEMENTS)
    with torch.cuda.device_of(x):  # Triton takes the current one
        _forward[(max(1, triton.cdiv(num_rows, rows)),)](  # pyright: ignore[reportIndexIssue]
            *(x, *terms, y if keeps_y else None, entry, normed, rstd),
            *(num_rows, factor, torch.finfo(torch.float32).eps, width),
            BLOCK=block,
            ROWS=rows,
            num_warps=warps,
        )
    return y, entry, normed, rstd


def triton_backward(
    grads: Terms, y: Tensor, rstd: Tensor, terms: Terms, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `plain_backward` returns, of contiguous tensors in float32 or less."""
    branch, _, skip, _, x0, _ = terms
    width = y.shape[-1]
    num_rows = y.numel() // width
    num_sums = sum((branch is not None, skip is not None, 2 * (x0 is not None)))
    d_x = torch.empty_like(y)
    d_terms = [None if term is None else torch.empty_like(term) for term in (branch, skip, x0)]
    elements, at_once = _BACKWARD[num_sums]
    block, warps, rows = _tile(width, elements)
    num_tiles = triton.cdiv(num_rows, rows)
    most = _multiprocessors(y.device) * max(1, at_once // warps)
    programs = max(1, min(num_tiles, most))
    shares = rstd.new_empty(num_sums, programs, width)
    with torch.cuda.device_of(y):
        _backward[(programs,)](  # pyright: ignore[reportIndexIssue]
            *(*grads, y, rstd, *terms, d_x, *d_terms, shares, num_rows, factor, width),
            BLOCK=block,
            ROWS=rows,
            STEPS=triton.cdiv(num_tiles, programs),
            num_warps=warps,
        )
    d_branch, d_skip, d_x0 = (y.new_empty(0) if d is None else d for d in d_terms)
    return d_x, d_branch, d_skip, d_x0, shares.sum(dim=1)


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
    if ptr is not None:
        tl.store(ptr + place, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(value, ptr):
    """Return float32 values as the dtype behind `ptr` keeps them."""
    return value.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _forward(
    x_ptr,
    branch_ptr,
    scale_ptr,
    skip_ptr,
    skip_scale_ptr,
    x0_ptr,
    mix_ptr,
    y_ptr,
    entry_ptr,
    normed_ptr,
    rstd_ptr,
    num_rows,
    factor,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = column < WIDTH
    inside = (row < num_rows)[:, None] & there[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    # All loads before the first store: the compiler moves none across a store.
    entry, x0 = _load(x_ptr, place, inside), _load(x0_ptr, place, inside)
    if branch_ptr is not None:
        scale = _load(scale_ptr, column, there)[None, :]
        entry += scale * _load(branch_ptr, place, inside)
    if skip_ptr is not None:
        skip_scale = _load(skip_scale_ptr, column, there)[None, :]
        entry += skip_scale * _load(skip_ptr, place, inside)
    entry = _rounded(entry, x_ptr)
    _store(y_ptr, place, entry, inside)
    if x0_ptr is not None:
        mix0 = _load(mix_ptr, column, there)[None, :]
        mix1 = _load(mix_ptr, WIDTH + column, there)[None, :]
        entry = _rounded(mix0 * entry + mix1 * x0, x_ptr)
    _store(entry_ptr, place, entry, inside)
    rstd = 1.0 / tl.sqrt(tl.sum(entry * entry, axis=1) / WIDTH + eps)
    _store(normed_ptr, place, entry * (rstd * factor)[:, None], inside)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)


@triton.jit
def _give(total, d, value, weight, d_ptr, place, inside):
    """Store weight ⊙ d, a term's gradient; return the total with that of its weight added."""
    if d_ptr is not None:
        _store(d_ptr, place, weight[None, :] * d, inside)
        total += tl.sum(d * value, axis=0)
    return total


@triton.jit
def _keep(share, total, term_ptr, there, size):
    """Write a total whose term is there; return where the next one goes."""
    if term_ptr is not None:
        tl.store(share, total, mask=there)
        share += size
    return share


@triton.jit
def _backward(
    d_y_ptr,
    d_entry_ptr,
    d_normed_ptr,
    y_ptr,
    rstd_ptr,
    branch_ptr,
    scale_ptr,
    skip_ptr,
    skip_scale_ptr,
    x0_ptr,
    mix_ptr,
    d_x_ptr,
    d_branch_ptr,
    d_skip_ptr,
    d_x0_ptr,
    shares_ptr,
    num_rows,
    factor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    there = column < WIDTH
    mix0, mix1 = _load(mix_ptr, column, there), _load(mix_ptr, WIDTH + column, there)
    scale, skip_scale = _load(scale_ptr, column, there), _load(skip_scale_ptr, column, there)
    sum_mix0, sum_mix1 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    sum_scale, sum_skip = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        tile = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & there[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        # As there, and every one is under way before the first is waited for.
        y, x0 = _load(y_ptr, place, inside), _load(x0_ptr, place, inside)
        d, g = _load(d_entry_ptr, place, inside), _load(d_normed_ptr, place, inside)
        branch, skip = _load(branch_ptr, place, inside), _load(skip_ptr, place, inside)
        d_y = _load(d_y_ptr, place, inside)
        rstd = _load(rstd_ptr, row, row < num_rows)[:, None]
        n = y * rstd
        if x0_ptr is not None:
            n = _rounded(mix0[None, :] * y + mix1[None, :] * x0, y_ptr) * rstd
        d += rstd * factor * (g - n * (tl.sum(g * n, axis=1) / WIDTH)[:, None])
        sum_mix1 = _give(sum_mix1, d, x0, mix1, d_x0_ptr, place, inside)
        if x0_ptr is not None:
            sum_mix0 += tl.sum(d * y, axis=0)
            d = mix0[None, :] * d
        d += d_y
        sum_scale = _give(sum_scale, d, branch, scale, d_branch_ptr, place, inside)
        sum_skip = _give(sum_skip, d, skip, skip_scale, d_skip_ptr, place, inside)
        _store(d_x_ptr, place, d, inside)
    size = tl.num_programs(0) * WIDTH
    share = shares_ptr + tl.program_id(0) * WIDTH + column
    share = _keep(share, sum_mix0, x0_ptr, there, size)
    share = _keep(share, sum_mix1, x0_ptr, there, size)
    share = _keep(share, sum_scale, branch_ptr, there, size)
    _keep(share, sum_skip, skip_ptr, there, size)

"""The kernels of `trainer.kernels.heads` in Triton, for CUDA tensors.

A head is read as pairs (e, e + half) in groups of 2·half dims: the first group is turned by the
position's angles, the others by none, so that every thread does the same. A tile is some tokens
with all of their heads, and a slot of it always meets the same head: the gain's gradient is one
register per slot, written once per program and added up by torch. Nothing is added atomically.
"""

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

# Pairs that a program holds at a time: one vector of 8 numbers in bfloat16 for each of its
# threads is 1024.
_PAIRS = 2048
_WARPS = 4
# Tiles of a program with a gain to sum over; fewer shares to add up.
_STEPS = 8


def triton_forward(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `plain_forward` returns, for x in float32 or less."""
    x, cos, sin = _rows(x), cos.contiguous(), sin.contiguous()
    out = x.new_empty(x.shape)
    sizes = _sizes(x, cos)
    programs = max(1, triton.cdiv(x.shape[0] * x.shape[1], sizes["TOKENS"]))
    with torch.cuda.device_of(x):  # Triton takes the current one
        _forward[(programs,)](  # pyright: ignore[reportIndexIssue]
            *(x, gain, cos, sin, out, x.shape[0] * x.shape[1], x.shape[1]),
            *(*x.stride()[:3], torch.finfo(torch.float32).eps),
            **sizes,
            num_warps=_WARPS,
        )
    return out


def triton_backward(
    d_out: Tensor, x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `plain_backward` returns, for x in float32 or less."""
    d_out, x, cos, sin = _rows(d_out), _rows(x), cos.contiguous(), sin.contiguous()
    d_x = x.new_empty(x.shape)
    sizes = _sizes(x, cos)
    steps = 1 if gain is None else _STEPS
    programs = max(1, triton.cdiv(x.shape[0] * x.shape[1], sizes["TOKENS"] * steps))
    shares = None
    if gain is not None:
        shares = x.new_empty(programs, x.shape[2], dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward[(programs,)](  # pyright: ignore[reportIndexIssue]
            *(d_out, x, gain, cos, sin, d_x, shares, x.shape[0] * x.shape[1], x.shape[1]),
            *(*d_out.stride()[:3], *x.stride()[:3], torch.finfo(torch.float32).eps),
            **sizes,
            STEPS=steps,
            num_warps=_WARPS,
        )
    d_gain = x.new_empty(0, dtype=torch.float32) if shares is None else shares.sum(dim=0)
    return d_x, d_gain


def _rows(x: Tensor) -> Tensor:
    """x itself if every head lies in one piece, wherever the heads lie; a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(x: Tensor, cos: Tensor) -> dict[str, int]:
    _, _, num_heads, width = x.shape
    half = cos.shape[-1]
    pairs = triton.next_power_of_2(triton.cdiv(width, 2 * half) * half)
    padded = triton.next_power_of_2(num_heads)
    return {
        "HEADS": num_heads,
        "WIDTH": width,
        "HALF": half,
        "PAIRS": pairs,
        "HEADS_PADDED": padded,
        "TOKENS": max(1, _PAIRS // (pairs * padded)),
    }


@triton.jit
def _places(
    num_tokens, tile, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr
):
    """Return each slot's token, its head, and whether there is such a one."""
    slot = tl.arange(0, TOKENS * HEADS_PADDED)
    token = tile * TOKENS + slot // HEADS_PADDED
    head = slot % HEADS_PADDED
    return token, head, (token < num_tokens) & (head < HEADS)


@triton.jit
def _pair(ptr, start, there, WIDTH: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Return both halves of every pair of the heads that begin at `start`, in float32."""
    pair = tl.arange(0, PAIRS)
    column = (pair // HALF) * (2 * HALF) + pair % HALF
    place = start[:, None] + column[None, :]
    first = there[:, None] & (column < WIDTH)[None, :]
    second = there[:, None] & (column + HALF < WIDTH)[None, :]
    a = tl.load(ptr + place, mask=first, other=0.0).to(tl.float32)
    b = tl.load(ptr + place + HALF, mask=second, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _put(ptr, start, there, a, b, WIDTH: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)
    column = (pair // HALF) * (2 * HALF) + pair % HALF
    place = start[:, None] + column[None, :]
    first = there[:, None] & (column < WIDTH)[None, :]
    second = there[:, None] & (column + HALF < WIDTH)[None, :]
    tl.store(ptr + place, a.to(ptr.dtype.element_ty), mask=first)
    tl.store(ptr + place + HALF, b.to(ptr.dtype.element_ty), mask=second)


@triton.jit
def _angles(cos_ptr, sin_ptr, time, there, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Return cosines and sines; those of no angle for the dims that are not turned."""
    pair = tl.arange(0, PAIRS)
    place = time[:, None] * HALF + pair[None, :]
    turned = there[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + place, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, mask=turned, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _start(token, head, num_times, stride_b, stride_t, stride_h):
    """Return where the slots' heads begin."""
    text = (token // num_times).to(tl.int64)
    return text * stride_b + (token % num_times).to(tl.int64) * stride_t + head * stride_h


@triton.jit
def _forward(
    x_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_tokens,
    num_times,
    stride_b,
    stride_t,
    stride_h,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token, head, there = _places(num_tokens, tl.program_id(0), HEADS, HEADS_PADDED, TOKENS)
    start = _start(token, head, num_times, stride_b, stride_t, stride_h)
    a, b = _pair(x_ptr, start, there, WIDTH, HALF, PAIRS)
    cos, sin = _angles(cos_ptr, sin_ptr, token % num_times, there, HALF, PAIRS)
    factor = 1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / WIDTH + eps)
    if gain_ptr is not None:
        factor *= tl.load(gain_ptr + head, mask=there, other=0.0).to(tl.float32)
    a, b = a * factor[:, None], b * factor[:, None]
    own = (token.to(tl.int64) * HEADS + head) * WIDTH
    _put(out_ptr, own, there, a * cos + b * sin, b * cos - a * sin, WIDTH, HALF, PAIRS)


@triton.jit
def _backward(
    d_ptr,
    x_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    d_x_ptr,
    shares_ptr,
    num_tokens,
    num_times,
    d_stride_b,
    d_stride_t,
    d_stride_h,
    stride_b,
    stride_t,
    stride_h,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
):
    sums = tl.zeros([TOKENS * HEADS_PADDED], tl.float32)
    for step in range(STEPS):
        tile = tl.program_id(0) * STEPS + step
        token, head, there = _places(num_tokens, tile, HEADS, HEADS_PADDED, TOKENS)
        start = _start(token, head, num_times, stride_b, stride_t, stride_h)
        a, b = _pair(x_ptr, start, there, WIDTH, HALF, PAIRS)
        start = _start(token, head, num_times, d_stride_b, d_stride_t, d_stride_h)
        d_a, d_b = _pair(d_ptr, start, there, WIDTH, HALF, PAIRS)
        cos, sin = _angles(cos_ptr, sin_ptr, token % num_times, there, HALF, PAIRS)
        rstd = 1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / WIDTH + eps)
        a, b = a * rstd[:, None], b * rstd[:, None]
        # The rotation is taken off d_out, then one inner product serves norm and gain.
        d_a, d_b = d_a * cos - d_b * sin, d_a * sin + d_b * cos
        inner = tl.sum(d_a * a + d_b * b, axis=1)
        factor = rstd
        if gain_ptr is not None:
            sums += inner
            factor *= tl.load(gain_ptr + head, mask=there, other=0.0).to(tl.float32)
        mean = (inner / WIDTH)[:, None]
        d_a, d_b = factor[:, None] * (d_a - a * mean), factor[:, None] * (d_b - b * mean)
        own = (token.to(tl.int64) * HEADS + head) * WIDTH
        _put(d_x_ptr, own, there, d_a, d_b, WIDTH, HALF, PAIRS)
    if shares_ptr is not None:
        sums = tl.sum(tl.reshape(sums, [TOKENS, HEADS_PADDED]), axis=0)
        slot = tl.arange(0, HEADS_PADDED)
        tl.store(shares_ptr + tl.program_id(0) * HEADS + slot, sums, mask=slot < HEADS)

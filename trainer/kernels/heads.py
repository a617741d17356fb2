"""Queries and keys between projection and attention: norm, rotation and gain in one pass.

With half the number of turned pairs, r = 1 / √(mean(x²) + ε) over a head and n = x · r,

    out = gain_h · (n_a cos + n_b sin,  n_b cos − n_a sin,  the rest of n)

and backwards, with u the turned n, s = Σ d_out ⊙ u over a head and R the rotation,

    d_gain_h = Σ s over tokens,  d_x = r · (gain_h · Rᵀ d_out − n · gain_h · s / E)

since a rotation keeps inner products (Su et al., arXiv 2104.09864; Zhang & Sennrich, arXiv
1910.07467). All of it is computed in float32 (float64 for float64) and rounded once. What is here
is the plain twin and what runs on a CPU; a CUDA tensor takes the kernels of
`trainer.kernels.heads_triton`.
"""

from typing import Any

import torch
from torch import Tensor


def turn_heads(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm every head of x [B, T, H, E], turn its first 2·half dims, multiply by gain [H].

    cos and sin [1, T, 1, half] get no gradient. Saved for the backward: x.
    """
    return _turn_heads(x, gain, cos, sin)


def plain_forward(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the turned heads: the slow twin."""
    n, _ = _normed(x)
    u = _turned(n, cos, sin)
    return (u if gain is None else u * gain[:, None]).to(x.dtype)


def plain_backward(
    d_out: Tensor, x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return d_x and d_gain [H], which is empty where there is no gain: the slow twin."""
    n, rstd = _normed(x)
    d = d_out.to(n.dtype)
    s = (d * _turned(n, cos, sin)).sum(dim=-1, keepdim=True)
    d_n = _turned(d, cos, -sin)
    inner = s
    if gain is not None:
        d_n, inner = d_n * gain[:, None], s * gain[:, None]
    d_x = rstd * (d_n - n * inner / x.shape[-1])
    d_gain = n.new_empty(0) if gain is None else s.flatten(0, 1).sum(dim=(0, 2))
    return d_x.to(x.dtype), d_gain


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = torch.finfo(wide.dtype).eps
    rstd = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return wide * rstd, rstd


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def _check(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    _, num_tokens, num_heads, width = x.shape
    half = cos.shape[-1]
    if cos.shape != (1, num_tokens, 1, half) or sin.shape != cos.shape or 2 * half > width:
        raise ValueError(
            f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)} and x {tuple(x.shape)}: "
            f"be (1, {num_tokens}, 1, half) with 2·half at most {width}"
        )
    if gain is not None and gain.shape != (num_heads,):
        raise ValueError(f"gain is {tuple(gain.shape)}: be ({num_heads},), one for each head")


@torch.library.custom_op("fairway::turn_heads", mutates_args=())
def _turn_heads(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    _check(x, gain, cos, sin)
    return plain_forward(x, gain, cos, sin).contiguous()


@_turn_heads.register_kernel("cuda")
def _(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    from trainer.kernels.heads_triton import triton_forward

    if x.dtype == torch.float64:
        return plain_forward(x, gain, cos, sin).contiguous()
    _check(x, gain, cos, sin)
    return triton_forward(x, gain, cos, sin)


@_turn_heads.register_fake
def _(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fairway::turn_heads_backward", mutates_args=())
def _turn_heads_backward(
    d_out: Tensor, x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    d_x, d_gain = plain_backward(d_out, x, gain, cos, sin)
    return d_x.contiguous(), d_gain


@_turn_heads_backward.register_kernel("cuda")
def _(
    d_out: Tensor, x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    from trainer.kernels.heads_triton import triton_backward

    if x.dtype == torch.float64:
        d_x, d_gain = plain_backward(d_out, x, gain, cos, sin)
        return d_x.contiguous(), d_gain
    return triton_backward(d_out, x, gain, cos, sin)


@_turn_heads_backward.register_fake
def _(
    d_out: Tensor, x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if gain is None else x.shape[2], dtype=wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _propagate(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    x, gain, cos, sin = ctx.saved_tensors
    d_x, d_gain = _turn_heads_backward(d_out, x, gain, cos, sin)
    return d_x, None if gain is None else d_gain.to(gain.dtype), None, None


_turn_heads.register_autograd(_propagate, setup_context=_save)

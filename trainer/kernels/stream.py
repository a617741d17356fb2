"""The residual stream between the matrices: its next sum and the norm of that in one pass.

One operator serves both functions. With w of one row, the scale of a branch z, or of two, the mix
with the input embedding z, and as the dtype of the stream x rounds it,

    out    = x + w ⊙ z  or  w₀ ⊙ x + w₁ ⊙ z
    normed = factor · out · r,  r = 1 / √(mean(out²) + ε)

and backwards, with n = out · r and g = factor · d_normed (Zhang & Sennrich, arXiv 1910.07467)

    d = d_out + r · (g − n · mean(g ⊙ n))
    d_x = d  or  w₀ ⊙ d,  d_z = w ⊙ d  or  w₁ ⊙ d

where a weight's gradient is a sum over tokens. All of it is computed in float32 (float64 for a
float64 stream) and rounded once on the way out. What is here is the plain twin and what runs on a
CPU; a CUDA tensor takes the kernels of `trainer.kernels.stream_triton`.
"""

from typing import Any

import torch
from torch import Tensor

_FORWARD = (
    "(Tensor x, Tensor z, Tensor weight, float factor) -> (Tensor out, Tensor normed, Tensor)"
)
_BACKWARD = (
    "(Tensor? d_out, Tensor? d_normed, Tensor kept, Tensor z, Tensor weight, Tensor rstd, "
    "float factor) -> (Tensor d_x, Tensor d_z, Tensor d_weight)"
)


def mix_norm(x: Tensor, x0: Tensor, mix: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return (out, normed) of out = mix₀ ⊙ x + mix₁ ⊙ x0.

    x and x0 [B, T, D], mix [2, D]. Saved for the backward: x, x0 and a float32 per token.
    """
    out, normed, _ = _norm_stream(x, x0, mix, factor)
    return out, normed


def add_norm(x: Tensor, branch: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return (out, normed) of out = x + scale ⊙ branch.

    x and branch [B, T, D], scale [D]. Saved for the backward: out, branch and a float32 per token.
    """
    out, normed, _ = _norm_stream(x, branch, scale, factor)
    return out, normed


def plain_forward(
    x: Tensor, z: Tensor, weight: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, normed and r [B, T, 1]: the slow twin."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = _summed(x.to(wide), z, weight).to(x.dtype)
    n = out.to(wide)
    rstd = (n.square().mean(dim=-1, keepdim=True) + torch.finfo(wide).eps).rsqrt()
    return out, (factor * n * rstd).to(x.dtype), rstd


def plain_backward(
    grads: tuple[Tensor | None, Tensor | None],
    kept: Tensor,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_x, d_z and d_weight, its shape the weight's and its dtype r's: the slow twin.

    grads are d_out and d_normed; kept is x where it is mixed, and out where it is added to.
    """
    is_mixed = weight.dim() == 2
    d_out, d_normed = (None if grad is None else grad.to(rstd.dtype) for grad in grads)
    d = torch.zeros_like(kept, dtype=rstd.dtype) if d_out is None else d_out
    if d_normed is not None:
        out = _summed(kept, z, weight).to(kept.dtype) if is_mixed else kept
        n = out.to(rstd.dtype) * rstd
        g = factor * d_normed
        d = d + rstd * (g - n * (g * n).mean(dim=-1, keepdim=True))
    over_z = (d * z).flatten(0, -2).sum(dim=0)
    if not is_mixed:
        # A copy, because an operator may not return what it was given.
        return d.to(kept.dtype, copy=True), (weight * d).to(z.dtype), over_z
    d_weight = torch.stack([(d * kept).flatten(0, -2).sum(dim=0), over_z])
    return (weight[0] * d).to(kept.dtype), (weight[1] * d).to(z.dtype), d_weight


def _summed(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return weight[0] * x + weight[1] * z
    return x + weight * z


def _contiguous(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if z.shape != x.shape:
        raise ValueError(f"z is {tuple(z.shape)}, x is {tuple(x.shape)}: be one shape")
    return x.contiguous(), z.contiguous(), weight.contiguous()


@torch.library.custom_op("fairway::norm_stream", mutates_args=(), schema=_FORWARD)
def _norm_stream(
    x: Tensor, z: Tensor, weight: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    return plain_forward(*_contiguous(x, z, weight), factor)


@_norm_stream.register_kernel("cuda")
def _(x: Tensor, z: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    from trainer.kernels.stream_triton import triton_forward

    run = plain_forward if x.dtype == torch.float64 else triton_forward
    return run(*_contiguous(x, z, weight), factor)


@_norm_stream.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=wide)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


@torch.library.custom_op("fairway::norm_stream_backward", mutates_args=(), schema=_BACKWARD)
def _norm_stream_backward(*given: Any) -> tuple[Tensor, ...]:
    return plain_backward(*_unpacked(given))


@_norm_stream_backward.register_kernel("cuda")
def _(*given: Any) -> tuple[Tensor, ...]:
    from trainer.kernels.stream_triton import triton_backward

    grads, kept, *rest = _unpacked(given)
    run = plain_backward if kept.dtype == torch.float64 else triton_backward
    return run(grads, kept, *rest)


@_norm_stream_backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    _, kept, z, weight, rstd, _ = _unpacked(given)
    d_weight = rstd.new_empty(weight.shape)
    return kept.new_empty(kept.shape), z.new_empty(z.shape), d_weight


def _unpacked(given: tuple[Any, ...]) -> Any:
    """The arguments of `plain_backward`, each tensor in order in memory."""
    *tensors, factor = given
    d_out, d_normed, *rest = (None if one is None else one.contiguous() for one in tensors)
    return (d_out, d_normed), *rest, factor


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, z, weight, ctx.factor = inputs
    out, _, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x if weight.dim() == 2 else out, z, weight, rstd)


def _propagate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    kept, z, weight, rstd = ctx.saved_tensors
    d_out, d_normed, _ = grads
    d_x, d_z, d_weight = _norm_stream_backward(d_out, d_normed, kept, z, weight, rstd, ctx.factor)
    return d_x, d_z, d_weight.to(weight.dtype), None


_norm_stream.register_autograd(_propagate, setup_context=_save)

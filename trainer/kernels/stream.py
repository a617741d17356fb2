"""The residual stream between the matrices: sum, mix with the input embedding and norm in one pass.

One operator serves all three functions. With the terms that a caller names, and as the dtype of
the stream x rounds it,

    y      = x + scale ⊙ branch + skip_scale ⊙ skip
    entry  = mix₀ ⊙ y + mix₁ ⊙ x0                    (y itself where there is no x0)
    normed = factor · entry · r,  r = 1 / √(mean(entry²) + ε)

and backwards, with n = entry · r and g = factor · d_normed (Zhang & Sennrich, arXiv 1910.07467)

    d_entry += r · (g − n · mean(g ⊙ n))
    d_x = d_y + mix₀ ⊙ d_entry,  d_x0 = mix₁ ⊙ d_entry,  d_branch = scale ⊙ d_x, …

where each parameter's gradient is a sum over tokens. All of it is computed in float32 (float64 for
a float64 stream) and rounded once on the way out. What is here is the plain twin and what runs on
a CPU; a CUDA tensor takes the kernels of `trainer.kernels.stream_triton`.
"""

from typing import Any

import torch
from torch import Tensor

Terms = tuple[Tensor | None, ...]
"""branch, scale, skip, skip_scale, x0, mix: each pair is there or None."""

_TERMS = "Tensor? branch, Tensor? scale, Tensor? skip, Tensor? skip_scale, Tensor? x0, Tensor? mix"
_FORWARD = f"(Tensor x, {_TERMS}, float factor) -> (Tensor y, Tensor entry, Tensor normed, Tensor)"
_BACKWARD = (
    f"(Tensor? d_y, Tensor? d_entry, Tensor? d_normed, Tensor y, Tensor rstd, {_TERMS}, "
    "float factor) -> (Tensor d_x, Tensor d_branch, Tensor d_skip, Tensor d_x0, Tensor sums)"
)


def mix_norm(x: Tensor, x0: Tensor, mix: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return (entry, normed) of entry = mix₀ ⊙ x + mix₁ ⊙ x0.

    x and x0 [B, T, D], mix [2, D]. Saved for the backward: x, x0 and a float32 per token.
    """
    _, entry, normed, _ = _norm_stream(x, None, None, None, None, x0, mix, factor)
    return entry, normed


def add_norm(x: Tensor, branch: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return (out, normed) of out = x + scale ⊙ branch.

    x and branch [B, T, D], scale [D]. Saved for the backward: out, branch and a float32 per token.
    """
    _, out, normed, _ = _norm_stream(x, branch, scale, None, None, None, None, factor)
    return out, normed


def enter(
    x: Tensor,
    branch: Tensor,
    scale: Tensor,
    skip: tuple[Tensor, Tensor] | None,
    x0: Tensor,
    mix: Tensor,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, entry, normed): one block's last sum and the next one's entry.

    x, branch and x0 [B, T, D], scale [D], mix [2, D]; skip is a pair ([B, T, D], [D]) of a tensor
    and its scale. Saved for the backward: y, branch, x0, skip and a float32 per token.
    """
    skipped, skip_scale = skip or (None, None)
    y, entry, normed, _ = _norm_stream(x, branch, scale, skipped, skip_scale, x0, mix, factor)
    return y, entry, normed


def plain_forward(x: Tensor, terms: Terms, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y (empty unless a sum is mixed), entry, normed and r [B, T, 1]: the slow twin."""
    wide = torch.promote_types(x.dtype, torch.float32)
    branch, scale, skip, skip_scale, x0, mix = terms
    y = x.to(wide)
    if branch is not None and scale is not None:
        y = y + scale * branch.to(wide)
    if skip is not None and skip_scale is not None:
        y = y + skip_scale * skip.to(wide)
    y = y.to(x.dtype)
    entry = _mixed(y, x0, mix).to(x.dtype)
    n = entry.to(wide)
    rstd = (n.square().mean(dim=-1, keepdim=True) + torch.finfo(wide).eps).rsqrt()
    return _kept(x, y, terms), entry, (factor * n * rstd).to(x.dtype), rstd


def plain_backward(
    grads: Terms, y: Tensor, rstd: Tensor, terms: Terms, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return d_x, d_branch, d_skip, d_x0 and the rows of parameter gradients: the slow twin.

    grads are d_y, d_entry and d_normed, y is x where nothing was added to it. The rows: mix₀,
    mix₁, scale, skip_scale, those that are there.
    """
    branch, scale, skip, skip_scale, x0, mix = terms
    d_y, d_entry, d_normed = (None if grad is None else grad.to(rstd.dtype) for grad in grads)
    d = torch.zeros_like(y, dtype=rstd.dtype) if d_entry is None else d_entry
    if d_normed is not None:
        n = _mixed(y, x0, mix).to(y.dtype).to(rstd.dtype) * rstd
        g = factor * d_normed
        d = d + rstd * (g - n * (g * n).mean(dim=-1, keepdim=True))
    rows: list[Tensor] = []
    d_x0, d_branch, d_skip = (y.new_empty(0) for _ in range(3))
    if x0 is not None and mix is not None:
        rows += [_over_tokens(d * y), _over_tokens(d * x0)]
        d_x0 = (mix[1] * d).to(x0.dtype)
        d = mix[0] * d
    if d_y is not None:
        d = d + d_y
    if branch is not None and scale is not None:
        rows.append(_over_tokens(d * branch))
        d_branch = (scale * d).to(branch.dtype)
    if skip is not None and skip_scale is not None:
        rows.append(_over_tokens(d * skip))
        d_skip = (skip_scale * d).to(skip.dtype)
    # A copy, because an operator may not return what it was given.
    d_x = d.to(y.dtype, copy=True)
    return d_x, d_branch, d_skip, d_x0, torch.stack(rows)


def _mixed(y: Tensor, x0: Tensor | None, mix: Tensor | None) -> Tensor:
    return y if x0 is None or mix is None else mix[0] * y + mix[1] * x0


def _over_tokens(products: Tensor) -> Tensor:
    return products.flatten(0, -2).sum(dim=0)


def _kept(x: Tensor, y: Tensor, terms: Terms) -> Tensor:
    branch, _, _, _, x0, _ = terms
    return x.new_empty(0) if branch is None or x0 is None else y


def _check(x: Tensor, terms: Terms) -> None:
    for name, term in zip(("branch", "skip", "x0"), terms[::2], strict=True):
        if term is not None and term.shape != x.shape:
            raise ValueError(f"{name} is {tuple(term.shape)}, x is {tuple(x.shape)}: be one shape")


def _contiguous(tensors: Any) -> tuple[Any, ...]:
    return tuple(None if one is None else one.contiguous() for one in tensors)


@torch.library.custom_op("fairway::norm_stream", mutates_args=(), schema=_FORWARD)
def _norm_stream(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *terms, factor = rest
    _check(x, tuple(terms))
    return plain_forward(x.contiguous(), _contiguous(terms), factor)


@_norm_stream.register_kernel("cuda")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from trainer.kernels.stream_triton import triton_forward

    *terms, factor = rest
    _check(x, tuple(terms))
    return triton_forward(x.contiguous(), _contiguous(terms), factor)


@_norm_stream.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *terms, _ = rest
    like = x.new_empty(x.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=wide)
    return _kept(x, like, tuple(terms)), x.new_empty(x.shape), x.new_empty(x.shape), rstd


@torch.library.custom_op("fairway::norm_stream_backward", mutates_args=(), schema=_BACKWARD)
def _norm_stream_backward(*given: Any) -> tuple[Tensor, ...]:
    return plain_backward(*_unpacked(given))


@_norm_stream_backward.register_kernel("cuda")
def _(*given: Any) -> tuple[Tensor, ...]:
    from trainer.kernels.stream_triton import triton_backward

    return triton_backward(*_unpacked(given))


@_norm_stream_backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    _, y, rstd, terms, _ = _unpacked(given)
    branch, _, skip, _, x0, _ = terms
    num_rows = sum((branch is not None, skip is not None, 2 * (x0 is not None)))
    d_terms = (y.new_empty(0) if t is None else t.new_empty(t.shape) for t in (branch, skip, x0))
    return y.new_empty(y.shape), *d_terms, rstd.new_empty(num_rows, y.shape[-1])


def _unpacked(given: tuple[Any, ...]) -> tuple[Terms, Tensor, Tensor, Terms, float]:
    tensors = _contiguous(given[:-1])
    return tensors[:3], tensors[3], tensors[4], tensors[5:], given[-1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *terms, ctx.factor = inputs
    y, entry, _, rstd = output
    if terms[0] is None:
        y = x
    elif terms[4] is None:
        y = entry
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(y, rstd, *terms)


def _propagate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    y, rstd, *terms = ctx.saved_tensors
    branch, scale, skip, skip_scale, x0, mix = terms
    d_y, d_entry, d_normed, _ = grads
    if branch is None or x0 is None:  # y is empty
        d_y = None
    d_x, d_branch, d_skip, d_x0, sums = _norm_stream_backward(
        d_y, d_entry, d_normed, y, rstd, *terms, ctx.factor
    )
    rows = list(sums)
    d_mix = d_scale = d_skip_scale = None
    if mix is not None:
        d_mix, rows = sums[:2].to(mix.dtype), rows[2:]
    if scale is not None:
        d_scale, rows = rows[0].to(scale.dtype), rows[1:]
    if skip_scale is not None:
        d_skip_scale = rows[0].to(skip_scale.dtype)
    return (
        d_x,
        None if branch is None else d_branch,
        d_scale,
        None if skip is None else d_skip,
        d_skip_scale,
        None if x0 is None else d_x0,
        d_mix,
        None,
    )


_norm_stream.register_autograd(_propagate, setup_context=_save)

"""FlashAttention-4 as an operator that `torch.compile` takes whole. Importing needs the package.

The package's own autograd function cannot be traced, and the binding in torch below 2.14 expects
two of its five results; so its two kernels are called here, as its function calls them. Source:
flash-attn-4 4.0.0b36, flash_attn/cute/interface.py; Zadouri et al. 2026.
"""

import torch
from flash_attn.cute.interface import (  # type: ignore[import-not-found]
    _flash_attn_bwd,
    _flash_attn_fwd,
)
from torch import Tensor


@torch.library.custom_op("fairway::flash_attn_4", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output [B, T, H, E] and the scores' log-sum-exp float32 [B, H, T]."""
    out, lse, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, num_heads, _ = q.shape
    lse = q.new_empty((batch, num_heads, num_tokens), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("fairway::flash_attn_4_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, causal=True, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v)


def _keep(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _learn(ctx, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_learn, setup_context=_keep)


def attend_flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; bfloat16 or float16 on a GPU of compute capability 9.0 or newer."""
    return _forward(q, k, v)[0]

"""The loss of softcapped logits, one pass over the logits forward and one read, one write back.

With z = cap · tanh(logits / cap), or the logits themselves without a cap, and p = softmax(z)

    loss = logsumexp(z) − z[target],  d_logits = d_loss · (p − onehot(target)) · (1 − (z / cap)²)

in float32 (float64 for float64 logits), whatever the dtype of the logits. The softcap is that of
Gemma 2, arXiv 2408.00118; one pass before the cap is techniques 4.3, item 25. What is here is the
plain twin and what runs on a CPU; a CUDA tensor takes the kernels of `loss_triton`. A model whose
vocabulary is wider than a program of theirs keeps the plain loss, which torch.compile fuses.
"""

import torch
from torch import Tensor

WIDEST = 16_384
"""Logits of a token that one program of the kernels holds."""


def capped_loss(logits: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Return the nats per token, float32 and of targets' shape, of logits [..., V] before the cap.

    targets int64 in [0, V): another one is an error on a CPU and gives NaN on a GPU. Saved for the
    backward: logits, targets and a float32 per token.
    """
    loss, _ = _forward(logits, targets, cap)
    return loss


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if cap is None else cap * torch.tanh(z / cap)


def _has_kernel(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and logits.shape[-1] <= WIDEST


@torch.library.custom_op("fairway::capped_loss", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Return the losses and logsumexp(z), both of targets' shape."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets are {tuple(targets.shape)}, logits {tuple(logits.shape)}: give a target each"
        )
    if _has_kernel(logits):
        from trainer.kernels.loss_triton import loss_forward

        return loss_forward(logits.contiguous(), targets.contiguous(), cap)
    z = _capped(logits, cap)
    lse = z.logsumexp(-1)
    return lse - z.gather(-1, targets.unsqueeze(-1)).squeeze(-1), lse


@_forward.register_fake
def _shapes(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(targets.shape, dtype=wide), logits.new_empty(targets.shape, dtype=wide)


@torch.library.custom_op("fairway::capped_loss_backward", mutates_args=())
def _backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float | None
) -> Tensor:
    """Return the gradient of the logits, in their dtype."""
    if _has_kernel(logits):
        from trainer.kernels.loss_triton import loss_backward

        grad, logits, targets = grad.contiguous(), logits.contiguous(), targets.contiguous()
        return loss_backward(grad, logits, targets, lse.contiguous(), cap)
    z = _capped(logits, cap)
    d = (z - lse.unsqueeze(-1)).exp()
    d.scatter_add_(-1, targets.unsqueeze(-1), d.new_full((*targets.shape, 1), -1.0))
    d *= grad.unsqueeze(-1)
    if cap is not None:
        d *= 1 - (z / cap).square()
    return d.to(logits.dtype).contiguous()


@_backward.register_fake
def _gradient_shape(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float | None
) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.cap = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, targets, lse)


def _learn(ctx, grad: Tensor, _: Tensor | None):
    return _backward(grad, *ctx.saved_tensors, ctx.cap), None, None


_forward.register_autograd(_learn, setup_context=_keep)

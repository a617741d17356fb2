"""Attention and loss back ends, each behind one function."""

from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, T, H, E] over k, v [B, T, K, E]; head h reads kv head ⌊h·K/H⌋."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per token [B, T] of logits [B, T, V], in float32."""
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view_as(targets)

"""The loss of logits."""

from torch import Tensor
from torch.nn import functional as F


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per token [B, T] of logits [B, T, V], in float32."""
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view_as(targets)

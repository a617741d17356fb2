"""From the normed stream to logits and losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.linear import Absent, Linear
from trainer.model.loss import token_loss
from trainer.specs import model as specs


class TiedHead(nn.Module):
    """Logits through the token table. `adapter` is the seam of `Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter: nn.Module = Absent()

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return self.adapter(F.linear(hidden, table.to(hidden.dtype)), hidden)


class UntiedHead(nn.Module):
    """Logits through a matrix of its own, from zero. Parameters: V·D, role head."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.output = Linear(dim, vocab_size, start="zero", role="head")

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return self.output(hidden)


class Softcap(nn.Module):
    """cap · tanh(z / cap). Source: Gemma 2, arXiv 2408.00118; no parameters."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        return self.cap * torch.tanh(logits / self.cap)


class MultiTokenHeads(nn.Module):
    """Head k predicts the token k + 1 places after the target; its loss joins in training only.

    Source: Gloeckle et al., arXiv 2404.19737, as in parameter-golf PR #414 (off there),
    techniques 2.14. Parameters: V·D each, role matrix; they are never exported.
    """

    def __init__(self, spec: specs.Mtp, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.loss_weight = spec.loss_weight
        self.heads = nn.ModuleList(
            Linear(dim, vocab_size, start="zero") for _ in range(spec.num_heads)
        )

    def forward(
        self, losses: Tensor, hidden: Tensor, targets: Tensor, softcap: nn.Module
    ) -> Tensor:
        """Raise every loss [B, T] by the weighted mean loss of the heads, while training."""
        if not self.training:
            return losses
        extra = [
            token_loss(softcap(head(hidden[:, : -1 - k])), targets[:, k + 1 :]).mean()
            for k, head in enumerate(self.heads)
        ]
        return losses + self.loss_weight * torch.stack(extra).mean()

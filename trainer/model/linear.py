"""The one matrix multiplication of the blocks: float32 weight, cast to the stream's dtype."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y = x Wᵀ without bias. The master weight stays float32 whatever the stream's dtype."""

    ROLES = {"weight": "matrix"}

    def __init__(self, in_width: int, out_width: int, *, starts_at_zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.starts_at_zero = starts_at_zero

    def reset_parameters(self, generator: torch.Generator, *, orthogonal: bool) -> None:
        """Initialise from `generator`: zero, orthogonal with gain 1, or uniform in ±1/√in."""
        if self.starts_at_zero:
            nn.init.zeros_(self.weight)
        elif orthogonal:
            nn.init.orthogonal_(self.weight, generator=generator)
        else:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    """RMS-normalise the last axis, without a weight; eps is the dtype's machine epsilon."""
    return F.rms_norm(x, (x.shape[-1],))

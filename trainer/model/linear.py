"""The one matrix multiplication of the model: float32 weight, cast to the stream's dtype."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Start = Literal["plain", "branch end", "zero"]


class Absent(nn.Module):
    """What stands where a recipe names no part: it returns its first argument."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x


class Linear(nn.Module):
    """y = x Wᵀ without bias. The master weight stays float32 whatever the stream's dtype.

    `weight_edit` is the seam for fake quantization: what it returns is what is multiplied.
    `adapter` is the seam for test-time training: it maps the output, given the input.
    """

    ROLES = {"weight": "matrix"}  # unless the owner says otherwise

    def __init__(
        self, in_width: int, out_width: int, *, start: Start = "plain", role: str = "matrix"
    ) -> None:
        super().__init__()
        self.ROLES = {"weight": role}
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.start = start
        self.weight_edit: nn.Module = nn.Identity()
        self.adapter: nn.Module = Absent()

    def reset_parameters(self, generator: torch.Generator, *, orthogonal: bool, depth: int) -> None:
        """Initialise from `generator`: zero, orthogonal with gain 1, or uniform in ±1/√in.

        Orthogonal matrices that end a branch are divided by √(2 · depth) (techniques 2.16).
        """
        if self.start == "zero":
            nn.init.zeros_(self.weight)
        elif orthogonal:
            gain = (2 * depth) ** -0.5 if self.start == "branch end" else 1.0
            nn.init.orthogonal_(self.weight, gain, generator=generator)
        else:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def cast(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix as it is multiplied."""
        return self.weight_edit(self.weight).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(F.linear(x, self.cast(x.dtype)), x)


def norm(x: Tensor) -> Tensor:
    """RMS-normalise the last axis, without a weight; eps is torch's own for it."""
    return F.rms_norm(x, (x.shape[-1],))

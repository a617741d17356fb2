"""How the second half of the stack takes up what the first half handed over."""

import torch
from torch import Tensor, nn


class Skips(nn.Module):
    """x + w_j ⊙ skip for skip j.

    Source: parameter-golf baseline, techniques 2.3. Parameters: D per skip, role scalar.
    """

    ROLES = {"scale": "scalar"}

    def __init__(self, num_skips: int, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.scale = nn.Parameter(torch.empty(num_skips, dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.init)

    def forward(self, x: Tensor, skip: Tensor, j: int) -> Tensor:
        return x + self.scale[j].to(x.dtype) * skip


class GatedSkips(nn.Module):
    """g ⊙ x + (1 − g) ⊙ (w_j ⊙ skip) with g = σ(γ_j): half and half at init.

    Source: parameter-golf PR #1218, techniques 2.3. Parameters: 2 D per skip, role scalar.
    """

    ROLES = {"scale": "scalar", "gate": "scalar"}

    def __init__(self, num_skips: int, dim: int, init: float, gate_init: float) -> None:
        super().__init__()
        self.init = init
        self.gate_init = gate_init
        self.scale = nn.Parameter(torch.empty(num_skips, dim))
        self.gate = nn.Parameter(torch.empty(num_skips, dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.init)
        nn.init.constant_(self.gate, self.gate_init)

    def forward(self, x: Tensor, skip: Tensor, j: int) -> Tensor:
        share = torch.sigmoid(self.gate[j].to(x.dtype))
        return share * x + (1 - share) * (self.scale[j].to(x.dtype) * skip)

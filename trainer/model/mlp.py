"""The MLP and its activations."""

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.blueprint import Blueprint
from trainer.model.linear import Linear
from trainer.specs import model as specs


class Relu2(nn.Module):
    """max(0, x)². Source: So et al., arXiv 2109.08668; no parameters."""

    def __init__(self, spec: specs.Relu2) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class LeakyRelu2(nn.Module):
    """(x where x > 0, else slope · x)². Source: parameter-golf PR #549; no parameters."""

    def __init__(self, spec: specs.LeakyRelu2) -> None:
        super().__init__()
        self.slope = spec.slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope).square()


ACTIVATIONS = {specs.Relu2: Relu2, specs.LeakyRelu2: LeakyRelu2}


class Mlp(nn.Module):
    """Up, activation, down; the down projection starts at zero."""

    def __init__(self, plan: Blueprint) -> None:
        super().__init__()
        activation = plan.spec.mlp.activation
        self.up = Linear(plan.spec.dim, plan.mlp_dim)
        self.activation = ACTIVATIONS[type(activation)](activation)
        self.down = Linear(plan.mlp_dim, plan.spec.dim, starts_at_zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        return self.down(self.activation(self.up(x)))

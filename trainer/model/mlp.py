"""The MLP and its activations."""

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.blueprint import Blueprint
from trainer.kernels.chosen import Kernels
from trainer.kernels.mlp import fits_mlp, relu2_mlp
from trainer.model.linear import Absent, Linear
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


class ReluPower(nn.Module):
    """max(0, x)^power. Source: So et al., arXiv 2109.08668, generalised; no parameters."""

    def __init__(self, spec: specs.ReluPower) -> None:
        super().__init__()
        self.power = spec.power

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).pow(self.power)


ACTIVATIONS = {
    specs.Relu2: Relu2,
    specs.LeakyRelu2: LeakyRelu2,
    specs.ReluPower: ReluPower,
}


class Mlp(nn.Module):
    """Up, activation, down. `adapter` is the seam of `Linear`, beside the whole."""

    def __init__(self, plan: Blueprint, kernels: Kernels) -> None:
        super().__init__()
        activation = plan.spec.mlp.activation
        is_square = not isinstance(activation, specs.ReluPower)
        has_kernel = kernels.mlp and is_square and fits_mlp(plan.spec.dim, plan.mlp_dim)
        self.fused = has_kernel and kernels.fused
        self.scores_fused = has_kernel and kernels.scores
        self.slope = getattr(activation, "slope", 0.0)
        self.up = Linear(plan.spec.dim, plan.mlp_dim)
        self.activation = ACTIVATIONS[type(activation)](activation)
        self.down = _down(plan)
        self.adapter: nn.Module = Absent()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        if self.fused if self.training else self.scores_fused:
            return relu2_mlp(x, self.up.cast(x.dtype), self.down.cast(x.dtype), self.slope)
        return self.adapter(self.down(self.activation(self.up(x))), x)


class SwiGlu(nn.Module):
    """down(silu(gate x) ⊙ up x). Source: Shazeer, arXiv 2002.05202. A third matrix."""

    def __init__(self, plan: Blueprint) -> None:
        super().__init__()
        self.up = Linear(plan.spec.dim, plan.mlp_dim)
        self.gate = Linear(plan.spec.dim, plan.mlp_dim)
        self.down = _down(plan)
        self.adapter: nn.Module = Absent()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        return self.adapter(self.down(F.silu(self.gate(x)) * self.up(x)), x)


def build_mlp(plan: Blueprint, kernels: Kernels) -> nn.Module:
    """Build the MLP that the spec's activation asks for."""
    return (
        SwiGlu(plan) if isinstance(plan.spec.mlp.activation, specs.SwiGlu) else Mlp(plan, kernels)
    )


def _down(plan: Blueprint) -> Linear:
    init = plan.spec.ortho_init
    start = "branch end" if init and init.scaled_outputs else "zero"
    return Linear(plan.mlp_dim, plan.spec.dim, start=start)

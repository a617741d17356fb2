"""One residual block."""

import torch
from torch import Tensor, nn

from trainer.blueprint import Blueprint
from trainer.model.attention import Attention
from trainer.model.linear import norm
from trainer.model.mlp import Mlp


class ResidualScale(nn.Module):
    """A learned vector on a sublayer's output.

    Source: parameter-golf baseline (attn_scale, mlp_scale). Parameters: D, role scalar.
    Identity at init with init 1.
    """

    ROLES = {"scale": "scalar"}

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.scale = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)


class X0Mix(nn.Module):
    """mix₀ ⊙ x + mix₁ ⊙ x0: lets each block look at the input embedding again.

    Source: parameter-golf baseline (resid_mix). Parameters: 2 D, role scalar. Identity at init.
    """

    ROLES = {"mix": "scalar"}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(2, dim))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.mix[0].fill_(1.0)
            self.mix[1].zero_()

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        return mix[0] * x + mix[1] * x0


class KeepStream(nn.Module):
    """The entry of a block without an x0 mix."""

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    """h = x̂ + a ⊙ Attn(rms(x̂)); y = h + m ⊙ MLP(rms(h)), with x̂ the (mixed) stream."""

    def __init__(self, plan: Blueprint) -> None:
        super().__init__()
        spec = plan.spec

        def residual_scale() -> nn.Module:
            if spec.residual_scale is None:
                return nn.Identity()
            return ResidualScale(spec.dim, spec.residual_scale.init)

        self.attention_scale = residual_scale()
        self.mlp_scale = residual_scale()
        self.x0_mix = KeepStream() if spec.x0_mix is None else X0Mix(spec.dim)
        self.attention = Attention(plan)
        self.mlp = Mlp(plan)

    def forward(self, x: Tensor, x0: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map the stream x [B, T, D] to [B, T, D]."""
        x = self.x0_mix(x, x0)
        x = x + self.attention_scale(self.attention(norm(x), rope))
        return x + self.mlp_scale(self.mlp(norm(x)))

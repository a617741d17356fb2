"""One residual block."""

import torch
from torch import Tensor, nn

from trainer.blueprint import Blueprint, LayerPlan
from trainer.kernels.attention import Attend
from trainer.kernels.chosen import Kernels
from trainer.kernels.stream import add_norm, mix_norm
from trainer.model.attention import Attention, tail
from trainer.model.linear import Absent, norm
from trainer.model.mlp import build_mlp


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


class LnScale(nn.Module):
    """A constant factor on a block's normed inputs. Source: techniques 2.10; no parameters."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class LearnedLnScale(nn.Module):
    """The same factor, learned. Source: the text of parameter-golf PR #610, whose code has the
    constant. Parameters: 1, role scalar."""

    ROLES = {"scale": "scalar"}

    def __init__(self, init: float) -> None:
        super().__init__()
        self.init = init
        self.scale = nn.Parameter(torch.empty(()))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)


class DtgGate(nn.Module):
    """x̂ + σ(w · sg(x̂) + b)(y − x̂): each token decides how much of the block it takes.

    Source: parameter-golf PR #414 (off there), techniques 2.14. Parameters: D + 1, role scalar.
    """

    ROLES = {"weight": "scalar", "bias": "scalar"}

    def __init__(self, dim: int, bias_init: float) -> None:
        super().__init__()
        self.bias_init = bias_init
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(()))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.bias_init)

    def forward(self, y: Tensor, entry: Tensor) -> Tensor:
        gate = torch.sigmoid(entry.detach() @ self.weight.to(entry.dtype) + self.bias.to(y.dtype))
        return entry + gate.unsqueeze(-1) * (y - entry)


class Block(nn.Module):
    """h = x̂ + a ⊙ Attn(s · rms(x̂)); y = h + m ⊙ MLP(s · rms(h)), with x̂ the (mixed) stream."""

    def __init__(
        self, plan: Blueprint, layer: LayerPlan, kv_owner: "Block | None", kernels: Kernels
    ) -> None:
        super().__init__()
        spec = plan.spec

        def residual_scale() -> nn.Module:
            if spec.residual_scale is None:
                return Absent()
            return ResidualScale(spec.dim, spec.residual_scale.init)

        self.attention_scale = residual_scale()
        self.mlp_scale = residual_scale()
        self.x0_mix = Absent() if spec.x0_mix is None else X0Mix(spec.dim)
        self.norm_scale = _norm_scale(plan, layer)
        self.dtg = Absent() if spec.dtg is None else DtgGate(spec.dim, spec.dtg.bias_init)
        owner = None if kv_owner is None else kv_owner.attention
        self.attention = Attention(plan, layer, owner, kernels)
        self.mlp = build_mlp(plan, kernels)
        has_kernel = kernels.fused and not isinstance(self.norm_scale, LearnedLnScale)
        self.norm_factor = getattr(self.norm_scale, "factor", 1.0)
        self.fuses_mix = has_kernel and spec.x0_mix is not None
        self.fuses_sum = has_kernel and spec.residual_scale is not None

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        rope: tuple[Tensor, Tensor],
        values: Tensor,
        last: int | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Map the stream x [B, T, D] to its `last` positions [B, S, D], or to all of them.

        Keys and values always come from all positions. `attend`: in place of the layer's own.
        """
        entry, normed = self._enter(x, x0)
        attended = self.attention(normed, rope, values, last, attend)
        entry = tail(entry, last)
        x, normed = self._add(entry, attended)
        x = x + self.mlp_scale(self.mlp(normed))
        return self.dtg(x, entry)

    def _enter(self, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return x̂ and its scaled norm."""
        if self.fuses_mix and self.training:
            return mix_norm(x, x0, self.x0_mix.mix, self.norm_factor)  # type: ignore[arg-type]
        entry = self.x0_mix(x, x0)
        return entry, self.norm_scale(norm(entry))

    def _add(self, entry: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Return h and its scaled norm."""
        if self.fuses_sum and self.training:
            scale = self.attention_scale.scale
            return add_norm(entry, attended, scale, self.norm_factor)  # type: ignore[arg-type]
        x = entry + self.attention_scale(attended)
        return x, self.norm_scale(norm(x))


def _norm_scale(plan: Blueprint, layer: LayerPlan) -> nn.Module:
    spec = plan.spec.ln_scale
    if spec is None or layer.norm_scale is None:
        return Absent()
    return LearnedLnScale(layer.norm_scale) if spec.learned else LnScale(layer.norm_scale)

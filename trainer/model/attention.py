"""Causal grouped-query attention, and what may be added to its values and outputs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.blueprint import Blueprint, LayerPlan
from trainer.kernels.attention import Attend, attend_masked
from trainer.kernels.chosen import Kernels
from trainer.kernels.heads import turn_heads
from trainer.model.linear import Absent, Linear, norm
from trainer.model.rotary import rotate


def tail(x: Tensor, last: int | None) -> Tensor:
    """The `last` positions of x [B, T, …]; x itself where all of them are meant."""
    return x if last is None or last == x.shape[1] else x[:, -last:]


def attend_tail(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` for the queries [B, S, H, E] of the last S of T positions.

    Fewer queries than keys need a mask that ends at the lower right.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    if num_queries == num_keys:
        return attend(q, k, v)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    return attend_masked(mask.tril(num_keys - num_queries), q, k, v)


class QGain(nn.Module):
    """A learned factor per query head, applied after norm and rotation.

    Source: parameter-golf baseline. Parameters: H, role scalar. Bytes: about 4 H.
    """

    ROLES = {"gain": "scalar"}

    def __init__(self, num_heads: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gain = nn.Parameter(torch.empty(num_heads))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, self.init)

    def forward(self, q: Tensor) -> Tensor:
        return q * self.gain.to(q.dtype)[:, None]


class ValueMix(nn.Module):
    """v + scale · shared: this layer's share of the value embedding.

    Source: parameter-golf PR #374, techniques 2.11. Parameters: 1, role scalar.
    """

    ROLES = {"scale": "scalar"}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, v: Tensor, shared: Tensor) -> Tensor:
        """Add shared [B, T, K·E] to v [B, T, K, E]."""
        return v + (shared * self.scale.to(v.dtype)).unflatten(-1, v.shape[-2:])


class Xsa(nn.Module):
    """Takes from each head's output its component along the token's own value.

    Source: exclusive self attention, arXiv 2603.09078, in the grouped form of techniques 2.7: the
    values are broadcast over their query heads, never repeated. No parameters.
    """

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        """Map y [B, T, H, E], given v [B, T, K, E], to [B, T, H, E]."""
        grouped = y.unflatten(2, (v.shape[2], -1))
        own = F.normalize(v, dim=-1).unsqueeze(-2)
        return (grouped - (grouped * own).sum(dim=-1, keepdim=True) * own).flatten(2, 3)


class Attention(nn.Module):
    """Project, norm queries and keys per head, rotate, attend, project back.

    A layer that shares keys and values multiplies by the matrices of `owner`; they are registered
    there only, so a state holds them once.
    """

    def __init__(
        self, plan: Blueprint, layer: LayerPlan, owner: "Attention | None", kernels: Kernels
    ) -> None:
        super().__init__()
        self.attend = kernels.attend
        self.fused, self.scores_fused = kernels.fused, kernels.scores
        d, spec, init = plan.spec.dim, plan.spec.attention, plan.spec.ortho_init
        self.head_dim = plan.head_dim
        gain = spec.q_gain
        self.q_gain = Absent() if gain is None else QGain(spec.num_heads, gain.init)
        self.value_mix = ValueMix() if layer.uses_value_embedding else Absent()
        self.xsa = Xsa() if layer.has_xsa else Absent()
        self.query = Linear(d, d)
        if owner is None:
            self.key = Linear(d, plan.kv_dim)
            self.value = Linear(d, plan.kv_dim)
        # A tuple, because a module given as an attribute would be registered again.
        self.key_value = (self.key, self.value) if owner is None else owner.key_value
        self.out = Linear(d, d, start="branch end" if init and init.scaled_outputs else "zero")

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        values: Tensor,
        last: int | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Map x [B, T, D] to the `last` S positions [B, S, D], or to all of them.

        values [B, T, K·E] is the value embedding's share; `attend` stands in for the layer's own.
        """
        q = self.query(tail(x, last)).unflatten(-1, (-1, self.head_dim))
        k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in self.key_value)
        v = self.value_mix(v, values)
        q = self._turn_queries(q, (tail(rope[0], last), tail(rope[1], last)))
        attend = self.attend if attend is None else attend
        y = attend_tail(attend, q, self._turn_keys(k, rope), v)
        y = self.xsa(y, tail(v, last))
        return self.out(y.flatten(-2))

    def _turn_queries(self, q: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.fused if self.training else self.scores_fused:
            return turn_heads(q, getattr(self.q_gain, "gain", None), *rope)
        return self.q_gain(rotate(norm(q), rope))

    def _turn_keys(self, k: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.fused if self.training else self.scores_fused:
            return turn_heads(k, None, *rope)
        return rotate(norm(k), rope)

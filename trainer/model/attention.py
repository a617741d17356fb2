"""Causal grouped-query attention."""

import torch
from torch import Tensor, nn

from trainer.blueprint import Blueprint
from trainer.model.kernels import attend
from trainer.model.linear import Linear, norm
from trainer.model.rotary import rotate


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


class Attention(nn.Module):
    """Project, norm queries and keys per head, rotate, attend, project back (from zero)."""

    def __init__(self, plan: Blueprint) -> None:
        super().__init__()
        d, spec = plan.spec.dim, plan.spec.attention
        self.head_dim = plan.head_dim
        gain = spec.q_gain
        self.q_gain = nn.Identity() if gain is None else QGain(spec.num_heads, gain.init)
        self.query = Linear(d, d)
        self.key = Linear(d, plan.kv_dim)
        self.value = Linear(d, plan.kv_dim)
        self.out = Linear(d, d, starts_at_zero=True)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.query, self.key, self.value)
        )
        q = self.q_gain(rotate(norm(q), rope))
        return self.out(attend(q, rotate(norm(k), rope), v).flatten(-2))

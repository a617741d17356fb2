"""Averages of the weights: the EMA bank and SWA, in float32 on the weights' device."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.optim.schedule import has_begun
from trainer.specs.train import Averages, ema_entry


class AverageBank:
    """One EMA shadow per decay, all updated at once, and a running SWA sum.

    EMA: E ← αᴺE + (1−αᴺ)p after every Nth step, N being `ema_every`, from the initial weights,
    without bias correction (techniques 2.19). SWA: mean of the snapshots at `step mod every = 0`
    once `start` has come (2.20).
    """

    def __init__(self, model: nn.Module, spec: Averages) -> None:
        self.spec = spec
        self.names = [name for name, _ in model.named_parameters()]
        self.sources = [parameter.detach() for parameter in model.parameters()]
        self.shadows = {
            decay: [source.float().clone() for source in self.sources] for decay in spec.decays()
        }
        self.swa_count = 0
        self.swa_sums = (
            [torch.zeros_like(source, dtype=torch.float32) for source in self.sources]
            if spec.swa is not None
            else []
        )

    @torch.no_grad()
    def update(self, step: int, lr_scale: float, progress: float) -> None:
        """Fold in the weights after step `step` (from 1), run at this lr scale and progress."""
        swa = self.spec.swa
        moves_shadows = bool(self.shadows) and step % self.spec.ema_every == 0
        takes_snapshot = (
            swa is not None and step % swa.every == 0 and has_begun(swa.start, lr_scale, progress)
        )
        if not moves_shadows and not takes_snapshot:
            return
        weights = [source.float() for source in self.sources]
        if moves_shadows:
            for decay, shadow in self.shadows.items():
                torch._foreach_lerp_(shadow, weights, 1.0 - decay**self.spec.ema_every)
        if takes_snapshot:
            torch._foreach_add_(self.swa_sums, weights)
            self.swa_count += 1

    def entries(self) -> dict[str, dict[str, Tensor]]:
        """Return every bank entry by name, each a float32 state: raw, ema-<decay>, swa.

        SWA is left out when no snapshot was taken.
        """
        banked = {"raw": [source.float() for source in self.sources]}
        banked |= {ema_entry(decay): shadow for decay, shadow in self.shadows.items()}
        if self.swa_count:
            banked["swa"] = [total / self.swa_count for total in self.swa_sums]
        return {
            entry: dict(zip(self.names, tensors, strict=True)) for entry, tensors in banked.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Without a snapshot it is the same whether SWA was asked for or not."""
        return {
            "shadows": {repr(decay): shadow for decay, shadow in self.shadows.items()},
            "swa_sums": self.swa_sums if self.swa_count else [],
            "swa_count": self.swa_count,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for decay, shadow in self.shadows.items():
            torch._foreach_copy_(shadow, state["shadows"][repr(decay)])
        self.swa_count = state["swa_count"]
        if self.swa_count:
            torch._foreach_copy_(self.swa_sums, state["swa_sums"])
        elif self.swa_sums:
            torch._foreach_zero_(self.swa_sums)

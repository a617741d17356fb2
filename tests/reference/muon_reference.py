"""Slow plain twin of Muon: one matrix at a time, from the formulas of its paper."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """Iterate x <- a x + b (x xT) x + c (x xT)^2 x on the matrix over its Frobenius norm."""
    x = matrix.double()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (torch.sqrt((x * x).sum()) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if is_tall else x


@dataclass
class PlainMuon:
    """One matrix and its momentum, in float64."""

    weight: Tensor
    lr: float
    weight_decay: float
    ns_steps: int
    buffer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = self.weight.double().clone()
        self.buffer = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor, momentum: float, lr_scale: float) -> None:
        """Take one step: Nesterov momentum, orthogonal update, decoupled decay."""
        gradient = gradient.double()
        self.buffer = momentum * self.buffer + gradient
        update = orthogonalise(gradient + momentum * self.buffer, self.ns_steps)
        rows, cols = update.shape
        lr = self.lr * lr_scale
        stretched = update * max(1.0, rows / cols) ** 0.5
        self.weight = (1 - lr * self.weight_decay) * self.weight - lr * stretched

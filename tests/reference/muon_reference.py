"""Slow plain twin of Muon: one matrix at a time, from the formulas of its paper."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.156555, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def orthogonalise(matrix: Tensor, triples: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Iterate x <- a x + b (x xT) x + c (x xT)^2 x on the matrix over its Frobenius norm."""
    x = matrix.double()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (torch.sqrt((x * x).sum()) + 1e-7)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if is_tall else x


@dataclass
class PlainMuon:
    """One matrix and its momentum, in float64."""

    weight: Tensor
    lr: float
    weight_decay: float
    triples: tuple[tuple[float, float, float], ...] = QUINTIC
    buffer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = self.weight.double().clone()
        self.buffer = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor, momentum: float, lr_scale: float) -> None:
        """Take one step: Nesterov momentum, orthogonal update, decoupled decay."""
        gradient = gradient.double()
        self.buffer = momentum * self.buffer + gradient
        update = orthogonalise(gradient + momentum * self.buffer, self.triples)
        rows, cols = update.shape
        lr = self.lr * lr_scale
        stretched = update * max(1.0, rows / cols) ** 0.5
        self.weight = (1 - lr * self.weight_decay) * self.weight - lr * stretched

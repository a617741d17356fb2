"""Steps of a whole gang on sequences of the scored text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from trainer.errors import TrainingError
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks

Sequences = Sequence[np.ndarray]
"""Token arrays, each of one or more predictions and so one token longer than that."""


def cosine(share: float) -> float:
    """Return the factor on a learning rate once `share` of the way is done: from 1 down to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * share))


def cut(tokens: np.ndarray, window: int) -> list[np.ndarray]:
    """Cut tokens [N + 1] into sequences of `window` predictions; the last may be shorter."""
    return [tokens[i : i + window + 1] for i in range(0, len(tokens) - 1, window)]


def share(sequences: Sequences, ranks: Ranks) -> Sequences:
    """Return this rank's contiguous share."""
    return _shares(sequences, ranks.world_size)[ranks.rank]


def batches(sequences: Sequences, size: int, ranks: Ranks) -> list[tuple[Sequences, int]]:
    """Cut every rank's contiguous share into batches of up to `size` sequences.

    Returns for each step this rank's batch, which may be empty, and how many predictions the gang
    has in it: all ranks take every step, however ragged the shares are.
    """
    shares = _shares(sequences, ranks.world_size)
    firsts = range(0, max(map(len, shares)), size)
    return [
        (
            shares[ranks.rank][first : first + size],
            sum(len(row) - 1 for mine in shares for row in mine[first : first + size]),
        )
        for first in firsts
    ]


def _shares(sequences: Sequences, world_size: int) -> list[Sequences]:
    edges = [len(sequences) * rank // world_size for rank in range(world_size + 1)]
    return [sequences[a:b] for a, b in pairwise(edges)]


@contextmanager
def training(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are kept for these parameters and for no other of the model."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = set(map(id, parameters))
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


class GangStep:
    """One optimizer step of the gang down the mean loss over all of its ranks' predictions.

    Dividing by the gang's predictions and adding gradients up is the mean whatever each rank
    holds. The model stays in eval mode: what is trained is what is scored.
    """

    def __init__(
        self, model: GPT, optimizer: torch.optim.Optimizer, width: int, clip: float, ranks: Ranks
    ) -> None:
        """Rows turn as the beginnings of windows of `width`; gradients are clipped to `clip`."""
        self.model = model
        self.optimizer = optimizer
        self.width = width
        self.clip = clip
        self.ranks = ranks
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def take(self, micros: Iterable[Sequences], num_predictions: int) -> None:
        """Step on this rank's micro-batches; `num_predictions` is the whole gang's.

        A rank that has none steps along. TrainingError where the gradient is no number.
        """
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for rows in micros:
            if rows:
                (self._nats(rows) / num_predictions).backward()
        gradients = [parameter.grad for parameter in self.parameters]
        if self.ranks.world_size > 1:
            flat = torch.cat([gradient.float().flatten() for gradient in gradients])
            parts = self.ranks.sum(flat).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        if not math.isfinite(norm):
            raise TrainingError(
                f"test-time training diverged: gradient norm {norm}; lower evaluate.ttt.lr"
            )
        self.optimizer.step()

    def _nats(self, rows: Sequences) -> torch.Tensor:
        """Sum the losses over every prediction of the rows."""
        lengths = np.array([len(row) - 1 for row in rows])
        filled = np.zeros((len(rows), int(lengths.max()) + 1), dtype=np.int64)
        for i, row in enumerate(rows):
            filled[i, : len(row)] = row
        inside = torch.from_numpy(np.arange(filled.shape[1] - 1) < lengths[:, None])
        tokens = torch.from_numpy(filled).to(self.ranks.device)
        losses = self.model(tokens[:, :-1], tokens[:, 1:], self.width)
        return (losses * inside.to(losses.device)).sum()

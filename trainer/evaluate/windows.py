"""Sliding windows: which positions are read and which are scored. Pure.

Source: techniques 1.5. Every window reads up to `window` tokens; the first scores all of its
predictions, later ones only those that end it. Documents are not separated: context crosses BOS.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.specs.evaluate import EvaluateSpec


@dataclass(frozen=True, slots=True)
class Windows:
    """Window i reads predictions [start, stop) and scores its last `scored` ones; int64 arrays."""

    start: np.ndarray
    stop: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def part(self, rank: int, world_size: int) -> "Windows":
        """Return one rank's contiguous share."""
        mine = slice(len(self) * rank // world_size, len(self) * (rank + 1) // world_size)
        return Windows(self.start[mine], self.stop[mine], self.scored[mine])


def plan_windows(num_predictions: int, spec: EvaluateSpec) -> Windows:
    """Lay windows over the predictions 0 … num_predictions−1.

    Variant C stops once everything is scored, each prediction exactly once. Variant A goes on
    while a window would hold anything, re-scoring the tail as the public scripts do.
    """
    window, stride = spec.window, spec.stride
    if spec.variant == "C":
        later = range(stride, max(num_predictions - window + stride, stride), stride)
    else:
        later = range(stride, num_predictions, stride)
    start = np.array([0, *later], dtype=np.int64)
    stop = np.minimum(start + window, num_predictions)
    length = stop - start
    scored = length - (window - stride) if spec.variant == "C" else np.minimum(length, stride)
    scored[0] = length[0]
    return Windows(start, stop, scored)


def times_scored(plan: Windows, num_predictions: int) -> np.ndarray:
    """Return how often each prediction is scored."""
    edges = np.zeros(num_predictions + 1, dtype=np.int64)
    np.add.at(edges, plan.stop - plan.scored, 1)
    np.add.at(edges, plan.stop, -1)
    return edges[:-1].cumsum()


def batches(plan: Windows, size: int) -> Iterator[Windows]:
    """Yield runs of up to `size` windows of equal length and share."""
    first = 0
    length = plan.stop - plan.start
    for i in range(1, len(plan) + 1):
        same = (
            i < len(plan)
            and i - first < size
            and length[i] == length[first]
            and plan.scored[i] == plan.scored[first]
        )
        if not same:
            run = slice(first, i)
            yield Windows(plan.start[run], plan.stop[run], plan.scored[run])
            first = i

"""Sliding windows: which positions are read, which are scored, and the sums over them.

Source: techniques 1.5. Every window reads up to `window` tokens; the first scores all of its
predictions, later ones only those that end it. Documents are not separated: context crosses BOS.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from trainer.data.bytecount import ByteTable
from trainer.errors import DataError
from trainer.model.gpt import GPT
from trainer.results import Totals
from trainer.runtime.distributed import Ranks
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


def _batches(plan: Windows, size: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield (starts, length, scored) for runs of up to `size` equal windows."""
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
            yield plan.start[first:i], int(length[first]), int(plan.scored[first])
            first = i


@torch.no_grad()
def score_stream(
    model: GPT, tokens: np.ndarray, table: ByteTable, spec: EvaluateSpec, ranks: Ranks
) -> Totals:
    """Score a token stream [N+1] with sliding windows; every rank returns the gang's totals.

    Sums are float64. DataError if there is nothing to predict.
    """
    num_predictions = len(tokens) - 1
    if num_predictions < 1:
        raise DataError(f"a stream of {len(tokens)} tokens has nothing to predict")
    plan = plan_windows(num_predictions, spec).part(ranks.rank, ranks.world_size)
    nats, scored_tokens, scored_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    for starts, length, scored in _batches(plan, spec.batch_windows):
        rows = starts[:, None] + np.arange(length + 1)
        # A window that the end cuts short is filled up behind: the model turns positions by the
        # length it is given (the NTK rule), and no filling is seen from before it.
        filled = np.zeros((len(starts), spec.window + 1), dtype=np.int64)
        filled[:, : length + 1] = tokens[rows]
        batch = torch.from_numpy(filled).to(ranks.device)
        loss = model(batch[:, :-1], batch[:, length + 1 - scored :])[:, :scored]
        nats += float(loss.double().sum())
        ends = tokens[rows[:, length - scored :]]
        scored_tokens += scored * len(starts)
        scored_bytes += int(table.count(ends[:, :-1], ends[:, 1:]).sum())
    model.train(was_training)
    sums = torch.tensor(
        [nats, scored_tokens, scored_bytes], dtype=torch.float64, device=ranks.device
    )
    total = ranks.sum(sums).tolist()
    return Totals(nats=total[0], tokens=int(total[1]), bytes=int(total[2]))

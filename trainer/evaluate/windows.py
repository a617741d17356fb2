"""Windows: which positions are read and which are scored, and which go through together. Pure.

Source: techniques 1.4 to 1.6. Every window reads up to `window` tokens. In a flat stream the first
scores all of its predictions, later ones only those that end it, and context crosses BOS. With
documents the windows slide inside each of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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

    @property
    def length(self) -> np.ndarray:
        """Tokens that each window reads."""
        return self.stop - self.start

    def take(self, which: np.ndarray | slice) -> "Windows":
        """Return some of the windows: indices, a mask or a slice."""
        return Windows(self.start[which], self.stop[which], self.scored[which])

    def part(self, rank: int, world_size: int) -> "Windows":
        """Return one rank's contiguous share."""
        return self.take(
            slice(len(self) * rank // world_size, len(self) * (rank + 1) // world_size)
        )

    def positions(self) -> np.ndarray:
        """Return the predictions that are scored, window by window; int64."""
        before = self.scored.cumsum() - self.scored
        return np.arange(self.scored.sum()) + np.repeat(
            self.stop - self.scored - before, self.scored
        )

    def joined(self) -> "Windows":
        """Make one window of those in a row that start alike, where each goes on from the last.

        Causal scores are the same: a prediction does not see how far its window reaches.
        """
        goes_on = (self.start[1:] == self.start[:-1]) & (
            self.stop[1:] - self.scored[1:] == self.stop[:-1]
        )
        first = np.flatnonzero(np.concatenate([[True], ~goes_on]))
        last = np.append(first[1:], len(self)) - 1
        begin = (self.stop - self.scored)[first]
        return Windows(self.start[first], self.stop[last], self.stop[last] - begin)


class Shape(NamedTuple):
    """A batch's: `rows` windows of up to `length` tokens, losses of the last `scored` of these."""

    rows: int
    length: int
    scored: int

    @property
    def tokens(self) -> int:
        """Tokens that a forward of this shape reads."""
        return self.rows * self.length

    def holds(self, other: "Shape") -> bool:
        """Whether a batch of the other shape can be filled up to this one."""
        is_within = other.rows <= self.rows and other.length <= self.length
        return is_within and other.length - other.scored >= self.length - self.scored


def shape_of(batch: Windows) -> Shape:
    """Return the smallest shape that holds a batch."""
    length = batch.length
    longest = int(length.max())
    return Shape(len(batch), longest, longest - int((length - batch.scored).min()))


def concatenate(parts: list[Windows]) -> Windows:
    """Return the windows of all parts, in order."""
    nothing = np.zeros(0, np.int64)
    columns = [[getattr(part, name) for part in parts] for name in ("start", "stop", "scored")]
    return Windows(*(np.concatenate([nothing, *column]) for column in columns))


def plan_windows(
    num_predictions: int, spec: EvaluateSpec, starts: np.ndarray | None = None
) -> Windows:
    """Lay windows over the predictions 0 … num_predictions−1.

    Variant C stops once everything is scored, each prediction exactly once. Variant A goes on
    while a window would hold anything, re-scoring the tail as the public scripts do. With
    `documents`, which open at `starts` (without them the text is one), every `stride` predictions
    of a document are a chunk with a window of its own that ends with it.
    """
    if spec.documents is not None:
        opens = np.zeros(1, np.int64) if starts is None else starts
        return _document_windows(num_predictions, spec, opens)
    window, stride = spec.window, spec.stride
    whole = num_predictions - window + stride if spec.variant == "C" else num_predictions
    start = np.concatenate([[0], np.arange(stride, max(whole, stride), stride)]).astype(np.int64)
    stop = np.minimum(start + window, num_predictions)
    length = stop - start
    scored = length - (window - stride) if spec.variant == "C" else np.minimum(length, stride)
    scored[0] = length[0]
    return Windows(start, stop, scored)


def _document_windows(num_predictions: int, spec: EvaluateSpec, starts: np.ndarray) -> Windows:
    stops = np.append(starts[1:], num_predictions)
    chunks = -(-(stops - starts) // spec.stride)
    number = np.arange(chunks.sum()) - np.repeat(chunks.cumsum() - chunks, chunks)
    first = np.repeat(starts, chunks) + number * spec.stride
    stop = np.minimum(first + spec.stride, np.repeat(stops, chunks))
    start = np.maximum(np.repeat(starts, chunks), stop - spec.window)
    return Windows(start, stop, stop - first)


def times_scored(plan: Windows, num_predictions: int) -> np.ndarray:
    """Return how often each prediction is scored."""
    edges = np.zeros(num_predictions + 1, dtype=np.int64)
    np.add.at(edges, plan.stop - plan.scored, 1)
    np.add.at(edges, plan.stop, -1)
    return edges[:-1].cumsum()


def batches(plan: Windows, size: int) -> Iterator[Windows]:
    """Yield alike windows together: up to `size` of the longest, more of shorter ones.

    A batch is as wide as its longest window, so they go by length. Windows that score all they
    read come evenly between those that score their end: then the time left can be told from the
    predictions left, and every n-th batch is a fair share. Who takes which changes no batch.
    """
    length = plan.length
    budget = size * int(length.max(initial=1))
    order = np.lexsort((-plan.scored, -length))
    cut: list[tuple[float, np.ndarray]] = []
    for is_whole in (True, False):
        kind = order[(plan.scored == length)[order] == is_whole]
        runs, first = [], 0
        while first < len(kind):
            run = kind[first : first + budget // int(length[kind[first]])]
            runs.append(run)
            first += len(run)
        cut += [(number / len(runs), run) for number, run in enumerate(runs)]
    for _, run in sorted(cut, key=lambda item: item[0]):
        yield plan.take(run)

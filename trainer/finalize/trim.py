"""Integers of ±1 set to zero, those of the smallest scales first, until a file is small enough.

How many is searched on real files, because no forecast is exact to a byte. Each costs a whole
compression, so the search follows the entropy of the integers and needs few of them.

Source: parameter-golf PRs #609 and #1019 (techniques 2.25).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from trainer.errors import InfeasibleError
from trainer.finalize.stored import Quantized, Stored

TOLERANCE: Final = 5e-4  # of the target: a file so near below it ends the search
MAX_WRITES: Final = 10

Write = Callable[[Mapping[str, Stored]], int]
"""Write the weights file of these tensors and return its bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Trimmed:
    """What is on disk now: `count` ones were zeroed, in the tensors of `names`."""

    stored: dict[str, Stored]
    count: int
    names: frozenset[str]


def trim_ones(stored: Mapping[str, Stored], most_bytes: int, write: Write) -> Trimmed:
    """Zero the fewest ones that bring the file to `most_bytes`, within TOLERANCE below it.

    The file that the last `write` leaves is the result's. InfeasibleError names the size that is
    left when all are zeroed.
    """
    ones = _Ones(stored)
    sizes = {0: write(stored)}
    while (count := _next_count(ones, sizes, most_bytes)) is not None:
        sizes[count] = write(ones.zeroed(count))
    fitting = [count for count, size in sizes.items() if size <= most_bytes]
    if not fitting:
        raise InfeasibleError(
            f"final.trim_ones.weights_bytes={most_bytes:,}: {sizes[ones.total]:,} bytes are left "
            f"when all {ones.total:,} ones are zeroed; allow as many, or quantize more coarsely"
        )
    best = min(fitting)
    result = ones.zeroed(best)
    if best != [*sizes][-1]:
        write(result)
    return Trimmed(result, best, ones.names(best))


def _next_count(ones: "_Ones", sizes: Mapping[int, int], most_bytes: int) -> int | None:
    """How many ones to zero next; None when the search is over."""
    high = min((count for count, size in sizes.items() if size <= most_bytes), default=None)
    if high == 0:
        return None
    low = max(count for count in sizes if high is None or count < high)
    if high is None:
        if low == ones.total:
            return None
        if len(sizes) >= MAX_WRITES - 1:
            return ones.total
    elif sizes[high] >= (1 - TOLERANCE) * most_bytes or high - low <= 1 or len(sizes) >= MAX_WRITES:
        return None
    elif any(count > high and size >= sizes[high] for count, size in sizes.items()):
        return None  # more ones made a larger file: what is left is the compressor's noise
    known = [(ones.bits(count), size) for count, size in sizes.items()]
    count = ones.count_at(aimed_bits(known, (1 - TOLERANCE / 2) * most_bytes))
    return min(max(count, low + 1), ones.total if high is None else high - 1)


def aimed_bits(known: Sequence[tuple[float, int]], aim_bytes: float) -> float:
    """The forecast bits at which a file should have `aim_bytes`: on the line through the two known
    files, each (forecast bits, bytes), that are nearest to it."""
    nearest = sorted(known, key=lambda file: abs(file[1] - aim_bytes))[:2]
    (bits, size), (other_bits, other_size) = nearest[0], nearest[-1]
    slope = (bits - other_bits) / (size - other_size) if size != other_size else 8.0
    return bits + (aim_bytes - size) * min(max(slope, 4.0), 16.0)


class _Ones:
    """All integers of ±1, in the order in which they go: by scale, tensor, row and column."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        forms = {name: form for name, form in stored.items() if isinstance(form, Quantized)}
        self._matrices = list(forms)
        none = np.zeros(0, np.int64)
        integers = [form.q.numpy() for form in forms.values()]
        order = np.argsort(
            np.concatenate([none, *(form.scale.float().numpy() for form in forms.values())]),
            kind="stable",
        )
        owners = [np.full(len(q), index) for index, q in enumerate(integers)]
        self._owners = np.concatenate([none, *owners])[order]
        self._rows = np.concatenate([none, *(np.arange(len(q)) for q in integers)])[order]
        self._plus = np.concatenate([none, *((q == 1).sum(axis=1) for q in integers)])[order]
        self._minus = np.concatenate([none, *((q == -1).sum(axis=1) for q in integers)])[order]
        counts = [np.bincount(q.ravel().astype(np.int16) + 128, minlength=256) for q in integers]
        self._histograms = np.array(counts, np.float64).reshape(-1, 256)
        self._ends = np.cumsum(self._plus + self._minus)
        self.total = int(self._ends[-1]) if len(self._ends) else 0

    def bits(self, count: int) -> float:
        """Entropy of the integers, tensor by tensor, with about `count` ones zeroed."""
        rows, histograms = self._whole_rows(count), self._histograms.copy()
        for sign, ones in ((1, self._plus), (-1, self._minus)):
            gone = np.bincount(self._owners[:rows], ones[:rows], minlength=len(histograms))
            histograms[:, 128 + sign] -= gone
            histograms[:, 128] += gone
        seen = histograms[histograms > 0]
        totals = histograms.sum(axis=1)
        return float((totals * np.log2(totals)).sum() - (seen * np.log2(seen)).sum())

    def count_at(self, bits: float) -> int:
        """The fewest ones that bring the entropy down to `bits`, all where none do."""
        return bisect_left(range(self.total), -bits, key=lambda count: -self.bits(count))

    def zeroed(self, count: int) -> dict[str, Stored]:
        """The tensors with the first `count` ones zeroed; the others are shared."""
        whole = self._whole_rows(count)
        result = dict(self._stored)
        for index, name in enumerate(self._matrices):
            form = self._stored[name]
            assert isinstance(form, Quantized)
            rows = torch.from_numpy(self._rows[:whole][self._owners[:whole] == index])
            if len(rows):
                q = form.q.clone()
                q[rows] = q[rows].masked_fill(q[rows].abs() == 1, 0)
                result[name] = replace(form, q=q)
        left = count - (int(self._ends[whole - 1]) if whole else 0)
        if left:
            name, row = self._matrices[self._owners[whole]], int(self._rows[whole])
            form = result[name]
            assert isinstance(form, Quantized)
            q = form.q.clone()
            q[row, (q[row].abs() == 1).nonzero().view(-1)[:left]] = 0
            result[name] = replace(form, q=q)
        return result

    def names(self, count: int) -> frozenset[str]:
        """The tensors that lose any of the first `count` ones."""
        rows = int(np.searchsorted(self._ends, count)) + 1 if count else 0
        losing = self._owners[:rows][(self._plus + self._minus)[:rows] > 0]
        return frozenset(self._matrices[index] for index in set(losing.tolist()))

    def _whole_rows(self, count: int) -> int:
        """How many rows lose all of their ones."""
        return int(np.searchsorted(self._ends, count, side="right"))

"""Which tokens a step trains on: a pure function of the step, the seed and the stream.

Sequence i of a stream reads tokens [i*T, (i+1)*T] inclusive: T inputs, and the same T shifted by
one as targets, so neighbours share one token and every token after the first is a target once in
an epoch. There is no position to save: a training resumes by asking for its next step. Sequences
cross document boundaries, as in the challenge's own loader; unlike there, no token is lost
between ranks. Source of the stream's shape: techniques.md 1.1.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from trainer.data.shards import TokenStream
from trainer.errors import DataError, UsageError

Order = Literal["sequential", "shuffled"]


class Loader:
    """Global batches of `batch_tokens` tokens, cut into sequences of `seq_len`."""

    def __init__(
        self, stream: TokenStream, seq_len: int, batch_tokens: int, order: Order, seed: int
    ) -> None:
        if seq_len < 1 or batch_tokens < 1 or batch_tokens % seq_len:
            raise UsageError(
                f"train.batch_tokens={batch_tokens} is not a multiple of train.seq_len={seq_len}; "
                f"use {max(1, batch_tokens // max(1, seq_len)) * max(1, seq_len)}"
            )
        if order not in ("sequential", "shuffled"):
            raise UsageError(f"train.order={order!r}: use sequential or shuffled")
        if len(stream) < seq_len + 1:
            raise DataError(
                f"train.seq_len={seq_len} needs {seq_len + 1:,} tokens, the stream has "
                f"{len(stream):,}; shorten the sequences or prepare more text"
            )
        self._stream = stream
        self._seq_len = seq_len
        self._order = order
        self._seed = seed
        self._permutations: dict[int, np.ndarray] = {}
        self.batch_sequences = batch_tokens // seq_len
        self.epoch_sequences = (len(stream) - 1) // seq_len

    def rows(
        self, step: int, rank: int = 0, world_size: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a rank's share of a step's batch: int64 [sequences, T + 1], into `out` if given.

        Ranks take contiguous slices: their rows, in rank order, are the batch of one worker.
        """
        if world_size < 1 or self.batch_sequences % world_size:
            divisors = [n for n in range(1, 65) if self.batch_sequences % n == 0]
            raise UsageError(
                f"resources.workers={world_size} does not divide a batch of "
                f"{self.batch_sequences} sequences; use one of {', '.join(map(str, divisors))}"
            )
        if step < 0 or not 0 <= rank < world_size:
            raise IndexError(f"step {step}, rank {rank} of {world_size}")
        num_rows = self.batch_sequences // world_size
        first = step * self.batch_sequences + rank * num_rows
        shape = num_rows, self._seq_len + 1
        rows = np.empty(shape, dtype=np.int64) if out is None else out
        if rows.shape != shape:
            raise ValueError(f"out is {rows.shape}, the share is {shape}")
        done = 0
        for sequence, count in self._runs(first, first + num_rows):
            start = sequence * self._seq_len
            tokens = self._stream.read(start, start + count * self._seq_len + 1)
            windows = sliding_window_view(tokens, self._seq_len + 1)[:: self._seq_len]
            rows[done : done + count] = windows
            done += count
        return rows

    def _runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Walk the sequences at positions [first, stop): each first of a run, and its length."""
        position = first
        while position < stop:
            epoch, index = divmod(position, self.epoch_sequences)
            if self._order == "sequential":
                count = min(stop - position, self.epoch_sequences - index)
                yield index, count
            else:
                count = 1
                yield int(self._permutation_of(epoch)[index]), count
            position += count

    def _permutation_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # A batch may span two epochs (more when the stream is tiny); older ones are not kept.
            self._permutations = {
                known: order for known, order in self._permutations.items() if known == epoch - 1
            }
            self._permutations[epoch] = permutation(self.epoch_sequences, self._seed, epoch)
        return self._permutations[epoch]


def permutation(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's sequences, from the seed and the epoch alone."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.random.Generator(bits).permutation(num_sequences)

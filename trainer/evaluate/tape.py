"""The text that is scored, read in one direction: scores go in once, and tokens come out for
training only after that.

Every evaluator scores through a `Tape`. Its record of what happened in which order is what the
audit judges. Source: issue #1017, C3 and C4 (techniques 1.9).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.bytecount import ByteTable
from trainer.errors import TrainingError
from trainer.evaluate.windows import Windows
from trainer.results import Totals
from trainer.runtime.distributed import Ranks

Forward = Callable[[Tensor, Tensor], Tensor]
"""tokens [B, T], targets [B, S] of the last S positions → loss in nats [B, S]: the one forward."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: `score`, `lend` or `update`, of how many predictions, and the digest
    of all scores sealed before it."""

    kind: str
    predictions: int
    digest: str


class Tape:
    """N predictions over N + 1 tokens. Losses float [N], NaN until sealed.

    `again` admits predictions that are scored more than once (variant A): their losses add up.
    """

    def __init__(self, tokens: np.ndarray, *, again: bool = False) -> None:
        self._tokens = tokens
        self.again = again
        self.losses = np.zeros(len(tokens) - 1, np.float64 if again else np.float32)
        self.times = np.zeros(len(tokens) - 1, np.int32)
        self.order = np.full(len(tokens) - 1, -1, np.int64)
        """Index of the event that sealed a prediction, -1 while it is open."""
        self.events: list[Event] = []
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.losses)

    def document_starts(self, bos: int) -> np.ndarray:
        """Return where documents open: position 0 and every `bos` token; int64."""
        starts = np.flatnonzero(self._tokens[:-1] == bos)
        return np.unique(np.concatenate([[0], starts]))

    def score(
        self, forward: Forward, windows: Windows, device: torch.device, width: int
    ) -> tuple[Tensor, Tensor]:
        """Score the ends of a batch of windows and seal them.

        Rows are filled up behind to `width` tokens: the model turns positions by the length it is
        given (the NTK rule), and no filling is seen from before it. Returns the losses [B, S] with
        their graph, for a step on what is now sealed, and bool [B, S], which of them are scored.
        """
        length = windows.stop - windows.start
        inside = np.arange(width + 1) <= length[:, None]
        rows = np.where(inside, windows.start[:, None] + np.arange(width + 1), 0)
        filled = np.where(inside, self._tokens[rows], 0).astype(np.int64)
        first = int((length - windows.scored).min())
        batch = torch.from_numpy(filled).to(device)
        losses = forward(batch[:, :-1], batch[:, first + 1 :])
        column = np.arange(first, width)
        scored = (column >= (length - windows.scored)[:, None]) & (column < length[:, None])
        positions = (windows.start[:, None] + column)[scored]
        mask = torch.from_numpy(scored).to(device)
        self._seal(positions, losses.detach()[mask].double().cpu().numpy())
        return losses, mask

    def lend(self, first: int, stop: int) -> np.ndarray:
        """Return the tokens [first, stop] behind predictions first … stop - 1, all of them sealed.

        They are the inputs and targets of a training step; TrainingError while a score is open.
        """
        still_open = int((self.order[first:stop] < 0).sum())
        if still_open:
            raise TrainingError(
                f"predictions {first}..{stop - 1}: {still_open} are not scored yet, and what is "
                "not scored may not be trained on; score them first"
            )
        self._note("lend", stop - first)
        return self._tokens[first : stop + 1]

    def note_update(self) -> None:
        """Record that a step changed what the next scores are made with."""
        self._note("update", 0)

    def gather(self, ranks: Ranks, first: int = 0, stop: int | None = None) -> None:
        """Share what the ranks sealed in [first, stop), so that all hold all of it."""
        if ranks.world_size == 1:
            return
        part = slice(first, len(self) if stop is None else stop)
        for array in (self.losses, self.times):
            total = ranks.sum(torch.from_numpy(array[part].copy()).to(ranks.device))
            array[part] = total.cpu().numpy()
        theirs = (self.times[part] > 0) & (self.order[part] < 0)
        if theirs.any():
            self._note("score", int(theirs.sum()))
            self.order[part][theirs] = len(self.events) - 1

    def totals(self, table: ByteTable) -> Totals:
        """Sum what is sealed; float64, in the order of the text."""
        num_bytes = table.count(self._tokens[:-1], self._tokens[1:])
        return Totals(
            nats=float(self.losses.sum(dtype=np.float64)),
            tokens=int(self.times.sum()),
            bytes=int((num_bytes * self.times).sum()),
        )

    def digest(self) -> str:
        """sha256 over every score sealed here, in the order of sealing."""
        return self._digest.hexdigest()

    def _seal(self, positions: np.ndarray, losses: np.ndarray) -> None:
        if not self.again and (self.times[positions] > 0).any():
            twice = int(positions[self.times[positions] > 0][0])
            raise TrainingError(f"prediction {twice}: scored before; a score is final")
        self._note("score", len(positions))
        self._digest.update(positions.astype("<i8").tobytes() + losses.astype("<f8").tobytes())
        np.add.at(self.losses, positions, losses)
        np.add.at(self.times, positions, 1)
        self.order[positions] = len(self.events) - 1

    def _note(self, kind: str, predictions: int) -> None:
        self.events.append(Event(kind, predictions, self._digest.hexdigest()[:16]))

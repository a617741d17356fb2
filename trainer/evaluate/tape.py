"""The text that is scored, read in one direction: scores go in once, and tokens come out for
training only after that.

Every evaluator scores through a `Tape`. Its record of what happened in which order is what the
audit judges. Source: issue #1017, C3 and C4 (techniques 1.9).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.bytecount import ByteTable
from trainer.errors import TrainingError
from trainer.evaluate.journal import Entry, Journal
from trainer.evaluate.progress import Progress, Silent
from trainer.evaluate.windows import Shape, Windows, concatenate, shape_of
from trainer.results import Totals
from trainer.runtime.distributed import Ranks

Forward = Callable[[Tensor, Tensor, int], Tensor]
"""tokens [B, T], targets [B, S] of the last S positions, width → loss in nats [B, S]: the one
forward. The T tokens begin windows of `width`, and turn as they do in whole ones."""

_NO_WINDOWS = concatenate([])
_NO_LOSSES = np.zeros(0, np.float32)
_COUNTED = 1 << 22  # predictions whose bytes are counted at a time


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: `score`, `lend`, `peek` or `update`, of how many predictions, and
    the digest of all scores sealed before it."""

    kind: str
    predictions: int
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A batch that is being scored: its losses [B, S], and bool [B, S], which of them are scored.

    `fetched` holds the losses on the host, float32, once `ready` has come to pass.
    """

    windows: Windows
    scored: np.ndarray
    losses: Tensor
    fetched: Tensor
    ready: torch.cuda.Event | None


class Tape:
    """N predictions over N + 1 tokens. Losses float [N], 0 until sealed.

    `again` admits predictions that are scored more than once (variant A): their losses add up.
    With a journal, `save` keeps what happened for a later attempt to `resume`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        again: bool = False,
        progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._tokens = tokens
        self.again = again
        self.progress = progress or Silent()
        self.journal = journal
        self.losses = np.zeros(len(tokens) - 1, np.float64 if again else np.float32)
        self.times = np.zeros(len(tokens) - 1, np.int32)
        self.order = np.full(len(tokens) - 1, -1, np.int32)
        """Index of the event that sealed a prediction, -1 while it is open."""
        self.events: list[Event] = []
        self._digest = hashlib.sha256()
        self._unsaved: list[Entry] = []

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

        Returns the losses [B, S] with their graph, for a step on what is now sealed, and bool
        [B, S], which of them are scored.
        """
        flight = self.launch(forward, windows, device, width)
        self.land(flight)
        return flight.losses, torch.from_numpy(flight.scored).to(device)

    def launch(
        self,
        forward: Forward,
        windows: Windows,
        device: torch.device,
        width: int,
        shape: Shape | None = None,
    ) -> Flight:
        """Start to score the ends of a batch of windows; `land` seals them. Waits for no device.

        The batch has its own shape or a larger one that it is told: rows are filled up behind, and
        no filling is seen from before it; rows that stand for no window are dropped.
        """
        shape = shape or shape_of(windows)
        first, length = shape.length - shape.scored, windows.length
        inside = np.arange(shape.length + 1) <= length[:, None]
        rows = np.where(inside, windows.start[:, None] + np.arange(shape.length + 1), 0)
        filled = np.zeros((shape.rows, shape.length + 1), np.int64)
        filled[: len(windows)] = np.where(inside, self._tokens[rows], 0)
        batch = _sent(filled, device)
        losses = forward(batch[:, :-1], batch[:, first + 1 :], width)[: len(windows)]
        column = np.arange(first, shape.length)
        scored = (column >= (length - windows.scored)[:, None]) & (column < length[:, None])
        return Flight(windows, scored, losses, *_fetched(losses.detach().float()))

    def land(self, flight: Flight) -> None:
        """Wait for the scores of a batch and seal them. Batches land as they were launched."""
        if flight.ready is not None:
            flight.ready.synchronize()
        self._seal(flight.windows, flight.fetched.numpy()[flight.scored])
        self.progress.advance(int(flight.windows.scored.sum()))

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
        # A copy: the slice alone would give the whole text away as its base.
        return self._tokens[first : stop + 1].copy()

    def illegal_tokens(self) -> np.ndarray:
        """Return all tokens, scored or not: the oracle's door. The audit fails whoever opens it."""
        self._note("peek", len(self))
        return self._tokens

    def note_update(self) -> None:
        """Record that a step changed what the next scores are made with."""
        self._note("update", 0)

    def gather(self, ranks: Ranks, first: int = 0, stop: int | None = None) -> None:
        """Share what the ranks sealed in [first, stop), so that all hold all of it.

        Once for each prediction: what is shared already would be counted again.
        """
        if ranks.world_size == 1:
            return
        part = slice(first, len(self) if stop is None else stop)
        for array in (self.losses, self.times):
            total = ranks.sum(torch.from_numpy(array[part].copy()).to(ranks.device))
            array[part] = total.cpu().numpy()
        theirs = first + np.flatnonzero((self.times[part] > 0) & (self.order[part] < 0))
        if len(theirs):
            self._take(theirs, self.losses[theirs])
        if self.journal is not None and self.journal.rank:
            self._unsaved.clear()  # the first rank holds it now, and keeps it

    def resume(self, ranks: Ranks) -> Windows:
        """Take over what the journal holds, and return the windows that it had scored.

        Every rank calls it before the first score. Only the first holds the scores after it, until
        they are gathered.
        """
        if self.journal is None:
            return _NO_WINDOWS
        # Together: a part that a fast rank writes after this is not an earlier attempt's.
        entries = ranks.together(self.journal.read)
        for entry in entries if ranks.is_first else ():
            self._replay(entry)
        self._unsaved.clear()
        self.progress.resumed(int((self.times > 0).sum()))
        return concatenate([entry.windows for entry in entries if entry.kind == "score"])

    def save(self, state: Callable[[], Any] | None = None) -> None:
        """Write what is new to the journal, if there is one and it is time.

        `state` makes what the next scores follow from, where that changes; the first rank's counts.
        """
        if self.journal is None or not self._unsaved or not self.journal.is_due:
            return
        self.journal.write(self._unsaved, None if self.journal.rank else state)
        self._unsaved.clear()

    def totals(self, table: ByteTable) -> Totals:
        """Sum what is sealed; float64, in the order of the text."""
        num_bytes = 0
        for first in range(0, len(self), _COUNTED):
            tokens = self._tokens[first : first + _COUNTED + 1]
            times = self.times[first : first + _COUNTED]
            num_bytes += int((table.count(tokens[:-1], tokens[1:]) * times).sum())
        return Totals(
            nats=float(self.losses.sum(dtype=np.float64)),
            tokens=int(self.times.sum()),
            bytes=num_bytes,
        )

    def digest(self) -> str:
        """sha256 over every score sealed here, in the order of sealing."""
        return self._digest.hexdigest()

    def _seal(self, windows: Windows, losses: np.ndarray) -> None:
        positions = windows.positions()
        if not self.again:
            sealed, num_times = np.unique(positions, return_counts=True)
            twice = sealed[(num_times > 1) | (self.times[sealed] > 0)]
            if len(twice):
                raise TrainingError(f"prediction {twice[0]}: scored before; a score is final")
        self._note("score", len(positions), windows, losses)
        self._digest.update(positions.astype("<i8").tobytes() + losses.astype("<f8").tobytes())
        np.add.at(self.losses, positions, losses)
        np.add.at(self.times, positions, 1)
        self.order[positions] = len(self.events) - 1

    def _take(self, positions: np.ndarray, losses: np.ndarray) -> None:
        """Note what other ranks sealed; runs of it stand as windows in the journal."""
        is_first = np.diff(positions, prepend=-2) > 1
        is_last = np.append(is_first[1:], True)
        start, stop = positions[is_first], positions[is_last] + 1
        self._note("gather", len(positions), Windows(start, stop, stop - start), losses)
        self.order[positions] = len(self.events) - 1

    def _replay(self, entry: Entry) -> None:
        positions = entry.windows.positions()
        if entry.kind == "score":
            self._seal(entry.windows, entry.losses)
        elif entry.kind == "gather":
            self.losses[positions] = entry.losses
            self.times[positions] = 1
            self._take(positions, entry.losses)
        else:
            self._note(entry.kind, entry.predictions)

    def _note(
        self,
        kind: str,
        predictions: int,
        windows: Windows = _NO_WINDOWS,
        losses: np.ndarray = _NO_LOSSES,
    ) -> None:
        shown = "score" if kind == "gather" else kind
        self.events.append(Event(shown, predictions, self._digest.hexdigest()[:16]))
        is_theirs = self.journal is not None and self.journal.rank and not len(windows)
        if self.journal is not None and not is_theirs:
            self._unsaved.append(Entry(kind, predictions, windows, losses))


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device. Only from pinned memory does that not wait for its kernels."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _fetched(losses: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy losses to the host. The event comes before what is launched after this."""
    if losses.device.type != "cuda":
        return losses.cpu(), None
    # torch makes this copy in pinned memory, so it runs behind the forward and nobody waits.
    fetched = losses.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(losses.device))
    return fetched, ready

"""What a killed evaluation leaves to the next one: the events of its tape, in parts on disk.

    FOLDER/NNNNNN-RANK.npz      events since the rank's last part, with the scores they sealed
    FOLDER/NNNNNN-RANK.state/   what the next scores are made with, where the evaluator adapts

A part is renamed into place once it is whole and is never changed after that. It names the
evaluation it belongs to, and another one refuses it. To keep a second process off is the caller's.
"""

import hashlib
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from trainer.errors import DataError, UsageError
from trainer.evaluate.windows import Windows, concatenate
from trainer.runtime.files import write_bytes
from trainer.runtime.tensors import load_tensors, save_tensors

KINDS: Final = ("score", "gather", "lend", "update", "peek")
_PART = re.compile(r"(\d{6})-(\d+)\.npz")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One event of a tape and, where it sealed scores, the windows and float32 losses of these."""

    kind: str
    predictions: int
    windows: Windows
    losses: np.ndarray


def identity(*parts: Any) -> str:
    """Hash everything that a score follows from: plain data, arrays and states; 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_content(part))
    return digest.hexdigest()


def _content(part: Any) -> bytes:
    """Hash a part at a fixed length, so that no two lists of parts spell the same bytes."""
    if isinstance(part, dict) and any(isinstance(value, torch.Tensor) for value in part.values()):
        spelled = b"".join(_content(name) + _content(part[name]) for name in sorted(part))
    elif isinstance(part, torch.Tensor):
        flat = part.detach().cpu().flatten().view(torch.uint8).numpy()
        spelled = f"{part.dtype}{tuple(part.shape)}".encode() + flat.tobytes()
    elif isinstance(part, np.ndarray):
        spelled = f"{part.dtype}{part.shape}".encode() + part.tobytes()
    else:
        spelled = json.dumps(part, sort_keys=True).encode()
    return hashlib.sha256(spelled).digest()


class Journal:
    """One rank's hand in the folder of an evaluation. What `read` found: `state`, the last one,
    and `spent_s`, the seconds of earlier attempts up to their last parts."""

    def __init__(self, folder: Path, identity: str, rank: int = 0, every_s: float = 30.0) -> None:
        self.folder = folder
        self.identity = identity
        self.rank = rank
        self.every_s = every_s
        self.state: Any = None
        self.spent_s = 0.0
        self._next = 0
        self._since = self._written = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last part is long enough ago."""
        return time.monotonic() - self._written >= self.every_s

    def read(self) -> list[Entry]:
        """Return what all ranks of earlier attempts left, in order; DataError if it is not ours."""
        self._since = time.monotonic()
        found = sorted(path for path in self.folder.glob("*.npz") if _PART.fullmatch(path.name))
        entries = [entry for path in found for entry in self._read(path)]
        states = sorted(self.folder.glob("*.state"))
        states = [path for path in states if path.with_suffix(".npz") in found]
        if states:
            self.state = load_tensors(states[-1], "state")
        self._next = 1 + max((int(path.name[:6]) for path in found), default=-1)
        return entries

    def write(self, entries: list[Entry], state: Callable[[], Any] | None = None) -> None:
        """Append a part. Its state is there before it is, and replaces the one before.

        UsageError where the folder cannot be written.
        """
        try:
            self._write(entries, state)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: {error.strerror or error}; make room there, or take another home, "
                "and run again to go on"
            ) from error
        self._next += 1
        self._written = time.monotonic()

    def _write(self, entries: list[Entry], state: Callable[[], Any] | None) -> None:
        path = self.folder / f"{self._next:06}-{self.rank}.npz"
        mine = path.with_suffix(".state")
        older = [other for other in self.folder.glob("*.state") if other != mine]
        if state is not None:
            # Killed between a state and its part, an earlier attempt leaves one of this name.
            shutil.rmtree(mine, ignore_errors=True)
            save_tensors(mine, {"state": state()})
        windows = concatenate([entry.windows for entry in entries])
        buffer = io.BytesIO()
        np.savez(
            buffer,
            identity=np.array(self.identity),
            spent_s=np.array(self.spent_s + time.monotonic() - self._since),
            kind=np.array([KINDS.index(entry.kind) for entry in entries], np.int8),
            predictions=np.array([entry.predictions for entry in entries], np.int64),
            windows=np.array([len(entry.windows) for entry in entries], np.int64),
            start=windows.start,
            stop=windows.stop,
            scored=windows.scored,
            losses=np.concatenate([entry.losses for entry in entries]),
        )
        write_bytes(path, buffer.getvalue())
        if state is not None:
            for folder in older:
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the folder: the evaluation is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path) -> list[Entry]:
        again = f"remove {self.folder} to score anew"
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as part:
                columns = {name: part[name] for name in part.files}
            owner, spent_s = str(columns["identity"]), float(columns["spent_s"])
            entries = _entries(columns) if owner == self.identity else []
        # The file is foreign bytes: the reader raises whatever it stumbles over.
        except Exception as error:
            raise DataError(f"{path}: altered since it was written; {again}") from error
        if owner != self.identity:
            raise DataError(f"{path}: belongs to another score ({owner[:12]}); {again}")
        self.spent_s = max(self.spent_s, spent_s)
        return entries


def _entries(columns: dict[str, np.ndarray]) -> list[Entry]:
    windows = Windows(columns["start"], columns["stop"], columns["scored"])
    edges = np.concatenate([[0], columns["windows"].cumsum()])
    sealed = np.concatenate([[0], windows.scored.cumsum()])[edges]
    return [
        Entry(
            KINDS[kind],
            int(predictions),
            windows.take(slice(edges[i], edges[i + 1])),
            columns["losses"][sealed[i] : sealed[i + 1]],
        )
        for i, (kind, predictions) in enumerate(
            zip(columns["kind"], columns["predictions"], strict=True)
        )
    ]

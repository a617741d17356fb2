"""The append-only record of what happened to a sweep, and the view that replaying it gives.

events.jsonl, one JSON object a line: `seq` counts from 1, `at` is Unix seconds, `event` names a
fact in the past tense, `crc` is the CRC-32 of the line without it. One writer at a time holds
the file (flock). A torn last line is what a crash leaves: it is cut off when the next writer
opens. A broken line anywhere else is refused by number; a ledger never starts empty over it.

    sweep_started      sweep_id name recipe effective_recipe spec varying axes cap_bytes
                       num_trainings num_finals facts
    training_started   training point seed
    training_finished  training point seed state reason cached result
    final_scored       final training point seed state reason cached result
    sweep_finished     state cache_hits
"""

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from service.states import State
from trainer.errors import DataError, UsageError

PATIENCE_S = 1.0


@dataclass
class SweepView:
    """A sweep as its ledger tells it; `apply` is the only thing that changes it."""

    started: dict[str, Any] = field(default_factory=dict[str, Any])
    trainings: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    finals: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    running: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    state: State = State.QUEUED
    cache_hits: int = 0
    events: int = 0

    def apply(self, event: dict[str, Any]) -> None:
        """Fold one event in. An event of a stage that is already settled changes nothing."""
        self.events += 1
        match event["event"]:
            case "sweep_started":
                self.started, self.state = event, State.RUNNING
                self.running.clear()
            case "training_started":
                self.running[event["training"]] = event
            case "training_finished":
                self.running.pop(event["training"], None)
                _settle(self.trainings, event["training"], event)
            case "final_scored":
                _settle(self.finals, event["final"], event)
            case "sweep_finished":
                self.running.clear()
                self.state, self.cache_hits = State(event["state"]), event["cache_hits"]
            case _:  # a fact that moves nothing
                pass


def _settle(stages: dict[str, dict[str, Any]], key: str, event: dict[str, Any]) -> None:
    """Keep the first settled fact of a stage; only a failure may be followed by another try."""
    known = stages.get(key)
    if known is None or known["state"] == State.FAILED:
        stages[key] = event


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a ledger; DataError names file and line where one is broken."""
    for event, _ in _read_with_ends(path):
        yield event


def replay(path: Path) -> SweepView:
    """Read a whole ledger into a view."""
    view = SweepView()
    for event in read(path):
        view.apply(event)
    return view


def _read_with_ends(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a crash, or still being written
            end += len(line)
            yield _decode(line, path, number), end


def _decode(line: bytes, path: Path, number: int) -> dict[str, Any]:
    event: dict[str, Any] = {}
    try:
        event = json.loads(line)
        crc = event.pop("crc")
        intact = crc == _crc(event) and event["seq"] == number
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DataError(
            f"{path}: line {number} is damaged; restore the file from a copy, or move it away "
            "to rebuild it from the store by running the sweep again"
        )
    return event


def _crc(event: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(event, sort_keys=True, separators=(",", ":")).encode())


def is_held(path: Path) -> bool:
    """Whether a writer has the ledger open now."""
    with path.open("rb") as file:
        return not _lock(file, fcntl.LOCK_SH, 0.0)


def _lock(file: IO[bytes], kind: int, patience_s: float) -> bool:
    """Try to lock a file for so long; a reader's glance at the lock must not turn a writer away."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


class Ledger:
    """The one writer of a sweep's ledger. Opening replays it; a second writer is refused."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab")
        if not _lock(self._file, fcntl.LOCK_EX, PATIENCE_S):
            self._file.close()
            raise UsageError(
                f"{path}: another run of this sweep is writing; wait for it or stop it first"
            )
        self.view = SweepView()
        try:
            self._file.truncate(self._replay())
        except DataError:
            self._file.close()
            raise

    def _replay(self) -> int:
        """Fold the intact events into the view; return how many bytes they take."""
        intact_bytes = 0
        for event, end in _read_with_ends(self._path):
            self.view.apply(event)
            intact_bytes = end
        return intact_bytes

    def append(self, event: str, **facts: Any) -> dict[str, Any]:
        """Write one event through to the disk, fold it into the view and return it."""
        record = {"seq": self.view.events + 1, "at": round(time.time(), 3), "event": event, **facts}
        record = json.loads(json.dumps(record, allow_nan=False))
        line = json.dumps({**record, "crc": _crc(record)}, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.view.apply(record)
        return record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""The append-only record of what happened to a sweep, and the view that replaying it gives.

events.jsonl, one JSON object a line: `seq` counts from 1, `at` is Unix seconds, `event` names a
fact in the past tense, `crc` is the CRC-32 of the line without it. One writer at a time holds
the file (flock). A torn last line is what a crash leaves: it is cut off when the next writer
opens. A broken line anywhere else is refused by number; a ledger never starts empty over it.

    sweep_started      sweep_id name recipe effective_recipe spec varying axes cap_bytes
                       num_trunks num_trainings num_finals plan_cost facts
    waiting            reason: why no gang has started yet
    gang_started       gang workers nodes probe
    trunk_finished     trunk branch states state reason cached steps_computed occupied_s
    training_started   training point seed phase branch
    rung               training step val_bpb verdict reason
    training_finished  training point seed phase state reason cached tries occupied_s result
    final_ranked       final training point seed state reason cached occupied_s result
    final_scored       final training point seed phase state reason cached occupied_s result
                       fitted: its clips and bits were chosen so that it fits the cap
    verdict            gate: what the gate said of the confirmed finals
    sweep_finished     state cache_hits reason order
                       order: pause, stop or cancel, where somebody ended the sweep

phase is search or confirm. occupied_s: the seconds that a stage held its workers; it times the
workers is what a budget counts.
"""

import fcntl
import json
import os
import threading
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
_GLANCE_BYTES = 1 << 14
RETRIED = frozenset({State.FAILED, State.CANCELLED})
"""States that another run of the sweep tries again."""


@dataclass
class SweepView:
    """A sweep as its ledger tells it; `apply` is the only thing that changes it."""

    started: dict[str, Any] = field(default_factory=dict[str, Any])
    trunks: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    trainings: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    ranked: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Finals that were scored on held-out training shards, by id."""
    rungs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    paid: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Every event that says how long its stage held its workers, retries included."""
    verdict: dict[str, Any] | None = None
    finals: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    running: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    begun: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Trainings that were started and never ended, by whichever run of the sweep."""
    state: State = State.QUEUED
    cache_hits: int = 0
    events: int = 0
    first_started_at: float = 0.0
    """Unix seconds of the sweep's first start, 0 before it."""
    reason: str | None = None
    """Why the sweep ended before it was complete."""
    order: str | None = None
    """What somebody asked for that ended it: pause, stop or cancel."""

    def apply(self, event: dict[str, Any]) -> None:
        """Fold one event in. An event of a stage that is already settled changes nothing."""
        self.events += 1
        if event.get("occupied_s"):
            self.paid.append(event)
        match event["event"]:
            case "sweep_started":
                self.started, self.state = event, State.RUNNING
                self.reason = self.order = None
                self.first_started_at = self.first_started_at or event["at"]
                self.running.clear()
            case "training_started":
                self.running[event["training"]] = self.begun[event["training"]] = event
            case "trunk_finished":
                _settle(self.trunks, event["trunk"], event)
            case "rung":
                self.rungs.append(event)
            case "final_ranked":
                _settle(self.ranked, event["final"], event)
            case "verdict":
                self.verdict = event
            case "training_finished":
                self.running.pop(event["training"], None)
                self.begun.pop(event["training"], None)
                _settle(self.trainings, event["training"], event)
            case "final_scored":
                _settle(self.finals, event["final"], event)
            case "sweep_finished":
                self.running.clear()
                self.state, self.cache_hits = State(event["state"]), event["cache_hits"]
                self.reason, self.order = event.get("reason"), event.get("order")
            case _:  # a fact that moves nothing
                pass


def _settle(stages: dict[str, dict[str, Any]], key: str, event: dict[str, Any]) -> None:
    """Keep the first settled fact of a stage. Only what ended without a result may be followed by
    another try, and a confirmation by the same stage counts as one."""
    known = stages.get(key)
    if known is None or known["state"] in RETRIED or _is_confirmed_by(known, event):
        stages[key] = event


def _is_confirmed_by(known: dict[str, Any], event: dict[str, Any]) -> bool:
    return event.get("phase") == "confirm" and known.get("phase") != "confirm"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a ledger; DataError names file and line where one is broken."""
    for event, _ in read_with_ends(path):
        yield event


def replay(path: Path) -> SweepView:
    """Read a whole ledger into a view."""
    view = SweepView()
    for event in read(path):
        view.apply(event)
    return view


def read_with_ends(
    path: Path, *, offset: int = 0, seq: int = 0
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield events with the byte at which each ends, those after byte `offset`, where event `seq`
    ended. DataError as `read`."""
    end = offset
    with path.open("rb") as file:
        file.seek(offset)
        for number, line in enumerate(file, start=seq + 1):
            if not line.endswith(b"\n"):
                return  # torn by a crash, or still being written
            end += len(line)
            yield _decode(line, path, number), end


def last_event(path: Path) -> dict[str, Any]:
    """Read the last whole event of a ledger from the file's end, unchecked: for a glance at how
    far it is. Empty where there is none that can be read."""
    try:
        with path.open("rb") as file:
            end, num_bytes = file.seek(0, 2), _GLANCE_BYTES
            while True:
                start = max(0, end - num_bytes)
                file.seek(start)
                lines = file.read(end - start).split(b"\n")  # the last one is torn, or empty
                if len(lines) > 2 or start == 0:
                    break
                num_bytes *= 4
        event = json.loads(lines[-2])
        return event if isinstance(event["seq"], int) else {}
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return {}


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
        self._turn = threading.Lock()
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
        for event, end in read_with_ends(self._path):
            self.view.apply(event)
            intact_bytes = end
        return intact_bytes

    def append(self, event: str, **facts: Any) -> dict[str, Any]:
        """Write one event through to the disk, fold it into the view and return it. Thread-safe."""
        with self._turn:
            record = {
                "seq": self.view.events + 1,
                "at": round(time.time(), 3),
                "event": event,
                **facts,
            }
            record = json.loads(json.dumps(record, allow_nan=False))
            line = json.dumps({**record, "crc": _crc(record)}, separators=(",", ":"))
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.view.apply(record)
        return record

    def recover(self) -> None:
        """Take up what the file has, after an interrupt that may have met an `append` halfway."""
        with self._turn:
            self._file.flush()
            self.view = SweepView()
            self._file.truncate(self._replay())

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

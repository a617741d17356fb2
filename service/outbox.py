"""The ledgers of a whole home on their way into MLflow, by one process that may die at any time.

    python -m service.outbox --home HOME --uri URI [--parent-pid N] [--once]

The ledgers are the outbox. A pass looks at every sweep by the size of its ledger, and steps the
`Projector` of those with news: under the lock that `tracking` takes, so that a sweep which a run
projects itself is left to it. What is written and over is remembered by its size alone, so a
thousand of them cost as many calls of stat.

MLflow out of reach: everything waits, with backoff, for as long as it takes. What MLflow refuses,
or a damaged ledger, is that sweep's own trouble: it is written to its tracking-refused.jsonl, and
tried again when the ledger grows or after ten minutes. A sweep that is under way though nobody
writes it is closed as KILLED and opened again when it goes on. HOME/outbox.json says how far
behind everything is.
"""

import argparse
import json
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

from service import ledger
from service.mlflow_store import Unreachable, without_credentials
from service.outbox_health import OutboxHealth
from service.paths import Paths, SweepPaths
from service.projector import Projector
from service.tracking import MAX_BACKOFF_S, Parent, default_uri, only_projector
from trainer.errors import BackendError, DataError, FairwayError, UsageError
from trainer.runtime.environment import quiet_mlflow, tracking_uri
from trainer.runtime.files import locked, read_json, write_json

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between passes; meanwhile another process can take a sweep's lock
REFUSED_S = 600.0
HEALTH_S = 5.0
ENOUGH_FAILURES = 2  # sweeps in a row that find MLflow out of reach: the others would too


@dataclass
class _Sweep:
    """What is remembered of a sweep between passes."""

    paths: SweepPaths
    num_bytes: int = -1
    """Size of the ledger when it was looked at last."""
    last: dict[str, Any] = field(default_factory=dict[str, Any])
    """seq and event of its last event."""
    num_written: int = 0
    is_over: bool = False
    """Everything up to that size is written, and every run closed."""
    failures: int = 0
    retry_at: float = 0.0
    refusal: str | None = None
    mark: str | None = None
    projector: Projector | None = None

    @property
    def lag_events(self) -> int:
        return max(0, self.last.get("seq", 0) - self.num_written)


class Outbox:
    """Projects the sweeps of a home into one MLflow. `step` is one pass over all of them."""

    def __init__(self, paths: Paths, uri: str) -> None:
        self._paths, self._uri = paths, uri
        self._sweeps: dict[str, _Sweep] = {}
        self._random = random.Random()
        self._failures = 0
        self._wake_at = 0.0
        self._last_success_at: float | None = None
        self._last_error: str | None = None
        self._last_error_at: float | None = None
        self._out_of_reach_since: float | None = None
        self._tell_at = 0.0

    def run_forever(self, parent: Parent) -> None:
        """Pass over the sweeps about every second until there is nobody to serve."""
        while not parent.is_gone():
            if time.monotonic() >= self._wake_at:
                self.step()
            self._tell()
            time.sleep(POLL_S)

    def step(self) -> bool:
        """Write what is new of every sweep that is due; tell whether none is left behind, be it
        because another process holds its lock and has not written it yet."""
        num_failed = in_a_row = num_written = 0
        for sweep_id in self._due():
            try:
                num_written += self._visit(sweep_id)
                in_a_row = 0
            except Unreachable as error:
                self._postpone(sweep_id, error)
                num_failed, in_a_row = num_failed + 1, in_a_row + 1
            except FairwayError as error:
                self._refuse(sweep_id, str(error))
            except Exception as error:  # one sweep's trouble, whatever it is, is not the others'
                logger.exception("%s: cannot be projected", sweep_id)
                self._refuse(sweep_id, f"{type(error).__name__}: {error}")
            self._tell()
            if in_a_row == ENOUGH_FAILURES:
                break
        has_failed = any(sweep.failures for sweep in self._sweeps.values())
        if num_written or not has_failed:
            self._set_in_reach(True)
        elif num_failed:
            self._set_in_reach(False)
        self._tell()
        return not has_failed and not any(s.refusal or s.lag_events for s in self._sweeps.values())

    def _set_in_reach(self, is_in_reach: bool) -> None:
        has_changed = is_in_reach != (self._failures == 0)
        if is_in_reach:
            self._failures, self._out_of_reach_since = 0, None
        else:
            self._failures += 1
            self._wake_at = time.monotonic() + self._backoff_s(self._failures)
            self._out_of_reach_since = self._out_of_reach_since or round(time.time(), 3)
        self._tell(at_once=has_changed)

    def health(self) -> OutboxHealth:
        """How the projection stands now."""
        sweeps = self._sweeps.items()
        return OutboxHealth(
            at=round(time.time(), 3),
            uri=without_credentials(self._uri),
            last_success_at=self._last_success_at,
            last_error=self._last_error,
            last_error_at=self._last_error_at,
            out_of_reach_since=self._out_of_reach_since,
            lag_events={key: sweep.lag_events for key, sweep in sweeps if sweep.lag_events},
            refused={key: sweep.refusal for key, sweep in sweeps if sweep.refusal},
        )

    def _due(self) -> list[str]:
        """The sweeps to visit, those that have failed before after the others."""
        now, found = time.monotonic(), set[str]()
        for ledger_path, num_bytes in self._ledgers():
            sweep_id = ledger_path.parent.name
            found.add(sweep_id)
            sweep = self._sweeps.setdefault(sweep_id, _Sweep(self._paths.sweep(sweep_id)))
            if num_bytes != sweep.num_bytes:
                self._look(sweep, num_bytes)
                if sweep.refusal:
                    sweep.retry_at = now
        for sweep_id in self._sweeps.keys() - found:  # deleted
            del self._sweeps[sweep_id]
        due = [
            s for s, sweep in self._sweeps.items() if not sweep.is_over and sweep.retry_at <= now
        ]
        return sorted(due, key=lambda s: (self._sweeps[s].failures, not self._is_live(s), s))

    def _is_live(self, sweep_id: str) -> bool:
        return self._sweeps[sweep_id].projector is not None

    def _ledgers(self) -> Iterator[tuple[Path, int]]:
        for path in self._paths.sweeps.glob("*/events.jsonl"):
            with suppress(FileNotFoundError):  # deleted meanwhile
                yield path, path.stat().st_size

    def _look(self, sweep: _Sweep, num_bytes: int) -> None:
        """Take in that a ledger has another size."""
        if num_bytes < sweep.num_bytes:  # restored from a copy, or begun anew
            sweep.projector = None
        is_new = sweep.num_bytes < 0
        last = ledger.last_event(sweep.paths.ledger)
        sweep.last = {key: last[key] for key in ("seq", "event") if key in last}
        sweep.num_bytes, sweep.is_over = num_bytes, False
        if is_new:
            sweep.is_over = self._is_written(sweep)

    def _visit(self, sweep_id: str) -> bool:
        """Project one sweep, if nobody else does; tell whether there was anything to write."""
        sweep = self._sweeps[sweep_id]
        with ExitStack() as stack:
            try:
                turn = stack.enter_context(only_projector(sweep.paths, patience_s=0.0))
            except UsageError:  # a run of its own, or a sync: they write it, and we look again
                sweep.projector = None
                sweep.num_written = self._count_written(sweep)
                return False
            if turn.before != sweep.mark:
                sweep.projector = None
            sweep.mark = turn.mark
            has_news = self._project(sweep_id, sweep)
        if has_news:
            self._last_success_at = round(time.time(), 3)
        sweep.failures, sweep.refusal, sweep.retry_at = 0, None, 0.0
        return has_news

    def _project(self, sweep_id: str, sweep: _Sweep) -> bool:
        is_held = ledger.is_held(sweep.paths.ledger)  # asked before its events are read
        # An error leaves a projector with half a step behind it: it is taken up if all goes well.
        projector, sweep.projector = sweep.projector, None
        if projector is None:
            if self._is_written(sweep):
                sweep.is_over = True
                return False
            projector = Projector(self._paths, sweep_id, self._uri)
        has_news = projector.step()
        sweep.num_written = sweep.last.get("seq", 0)
        if projector.is_finished(after=0):
            sweep.is_over = True
        elif is_held:
            sweep.projector = projector
        else:
            projector.abandon()
            sweep.is_over = True
        return has_news

    def _is_written(self, sweep: _Sweep) -> bool:
        """Whether a finished sweep is in MLflow as a whole, as far as tracking.json knows."""
        sweep.num_written = self._count_written(sweep)
        last = ledger.last_event(sweep.paths.ledger)
        if last and sweep.num_written > last["seq"]:
            # The ledger was begun anew: what was written of the old one may not be skipped.
            sweep.paths.tracking.unlink(missing_ok=True)
            sweep.num_written = 0
        return last.get("event") == "sweep_finished" and sweep.num_written == last["seq"]

    def _count_written(self, sweep: _Sweep) -> int:
        try:
            saved = read_json(sweep.paths.tracking)
            return int(saved["num_events"]) if saved["uri"] == self._uri else 0
        except (DataError, KeyError, TypeError, ValueError):
            return 0  # absent or broken: everything is written again, to the same effect

    def _postpone(self, sweep_id: str, error: Unreachable) -> None:
        sweep = self._sweeps[sweep_id]
        sweep.failures += 1
        sweep.retry_at = time.monotonic() + self._backoff_s(sweep.failures)
        sweep.num_written = self._count_written(sweep)
        self._last_error, self._last_error_at = str(error), round(time.time(), 3)
        logger.warning("%s: %s", sweep_id, error)

    def _refuse(self, sweep_id: str, reason: str) -> None:
        """Write down why a sweep is not projected, once for each state of its ledger."""
        sweep = self._sweeps[sweep_id]
        sweep.failures, sweep.refusal = 0, reason
        sweep.retry_at = time.monotonic() + REFUSED_S
        sweep.num_written = self._count_written(sweep)
        self._last_error, self._last_error_at = f"{sweep_id}: {reason}", round(time.time(), 3)
        entry = {"at": self._last_error_at, "num_bytes": sweep.num_bytes}
        line = json.dumps(entry | {"uri": without_credentials(self._uri), "reason": reason})
        with suppress(OSError), sweep.paths.refused.open("a+", encoding="utf-8") as file:
            file.seek(0)
            *_, known = ("", *file)
            if known.strip().partition(", ")[2] == line.partition(", ")[2]:
                return  # all but the time
            file.write(line + "\n")
        logger.error("%s: not projected: %s", sweep_id, reason)

    def _backoff_s(self, failures: int) -> float:
        longest_s = min(MAX_BACKOFF_S, POLL_S * 2.0 ** min(failures, 16))
        return longest_s * self._random.uniform(0.5, 1.0)  # so that not all come back at once

    def _tell(self, *, at_once: bool = False) -> None:
        """Write outbox.json now and then."""
        if at_once or time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + HEALTH_S
            write_json(self._paths.outbox, asdict(self.health()))


def _take_turn(stack: ExitStack, paths: Paths, parent: Parent) -> bool:
    """Become the one outbox of a home, as soon as another one has let go; False if there is
    nobody to serve before that."""
    while not parent.is_gone():
        try:
            stack.enter_context(locked(paths.outbox.with_suffix(".lock"), wait=False))
            return True
        except BlockingIOError:
            time.sleep(POLL_S / 2)
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Project a home's sweeps as a process of its own; the exit code is 5 if `--once` leaves
    something unwritten, which may be because another process holds the sweep's lock."""
    parser = argparse.ArgumentParser(prog="python -m service.outbox", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    address = parser.add_mutually_exclusive_group()
    address.add_argument("--uri", help="the embedded store when left out")
    address.add_argument("--uri-from-environment", action="store_true", help="MLFLOW_TRACKING_URI")
    parser.add_argument("--parent-pid", type=int, help="end when this process is gone")
    parser.add_argument("--once", action="store_true", help="write what is there and end")
    given = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s")
    quiet_mlflow()
    stop = Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        sys.exit(0)  # in the middle of a step too: it may die at any time

    # Ctrl-C reaches the whole group: the service ends, and ends its outbox by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    paths, parent = Paths(given.home), Parent(given.parent_pid, stop)
    with ExitStack() as stack:
        if _take_turn(stack, paths, parent):
            uri = tracking_uri() if given.uri_from_environment else given.uri
            outbox = Outbox(paths, uri or default_uri(paths))
            if given.once:
                return 0 if outbox.step() else BackendError.exit_code
            outbox.run_forever(parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())

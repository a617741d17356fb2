"""The file by which a sweep under way is told to pause, to stop or to cancel.

    HOME/sweeps/ID/control.json    {"want": "pause", "by": "alice", "at": 1700000000.0}

Whoever may write to the home may write an order; the sweep's driver looks every half second. It
obeys what was written since it began. An older order was meant for an earlier run: it is removed
once this run holds the ledger, so whoever still wants it can see that and write it again.
"""

import logging
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from service.paths import SweepPaths
from service.pump import pumping
from service.states import State
from trainer.errors import DataError, UsageError
from trainer.runtime.files import read_json, write_json

logger = logging.getLogger(__name__)

PAST: Final = {"pause": "paused", "stop": "stopped", "cancel": "cancelled"}
"""What may be wanted, from the mildest to the strongest, and what a sweep then has been."""
INTERRUPTS: Final = (KeyboardInterrupt, SystemExit)
"""What ends a run at once. Ray's own answer to SIGTERM, while it comes up, is SystemExit."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted of a sweep (pause, stop or cancel), by whom, and since when (Unix seconds).

    pause: start nothing new, end what runs at a checkpoint; stop: start nothing new, let what runs
    end by itself; cancel: end at once. What is finished is kept, and another run goes on.
    """

    want: str
    by: str
    at: float

    @property
    def reason(self) -> str:
        """Why the sweep ended, as its ledger says it."""
        return f"{PAST[self.want]} by {self.by}"

    @property
    def state(self) -> State:
        """The state that the sweep ends in."""
        return State.CANCELLED if self.want == "cancel" else State.STOPPED


def write_order(sweep: SweepPaths, want: str, by: str) -> None:
    """Tell the run of a sweep that is under way, if any, what to do. UsageError for another word
    than pause, stop or cancel."""
    if want not in PAST:
        raise UsageError(f"{want!r} cannot be asked of a sweep; ask for {', '.join(PAST)}")
    sweep.root.mkdir(parents=True, exist_ok=True)
    write_json(sweep.control, {"want": str(want), "by": by, "at": time.time()})


def read_order(sweep: SweepPaths) -> Order | None:
    """Return the order that was written last; DataError where the file is not one."""
    return _read(sweep.control)


def clear_order(sweep: SweepPaths) -> None:
    """Forget what was asked of a sweep."""
    sweep.control.unlink(missing_ok=True)


class Orders:
    """The orders for one run of a sweep, which began at `since` (Unix seconds). Thread-safe."""

    def __init__(self, path: Path, since: float) -> None:
        self._path = path
        self._since = since
        self._known: tuple[tuple[int, int] | None, Order | None] = None, None

    def now(self) -> Order | None:
        """Return what this run has been told, None if nothing. Cheap: an unchanged file is not
        read again. A file that is no order is said aloud once and not obeyed."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        seen = status.st_mtime_ns, status.st_ino
        if seen != self._known[0]:
            self._known = seen, self._ours()
        return self._known[1]

    def _ours(self) -> Order | None:
        try:
            order = _read(self._path)
        except DataError as error:
            logger.error("%s", error)
            return None
        return order if order is not None and order.at >= self._since else None

    def cancelled(self) -> Order | None:
        """Return the order to cancel, None if this run has not been told that."""
        order = self.now()
        return order if order is not None and order.want == "cancel" else None

    def forget_older(self) -> None:
        """Remove an order that was meant for an earlier run."""
        if self.now() is None:
            self._path.unlink(missing_ok=True)


def why(cancelled: Order | None) -> str:
    """Say what interrupted a run: somebody's order, else a signal."""
    return "interrupted" if cancelled is None else cancelled.reason


def answer_signals() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt in the main thread, which calls this. A
    SIGINT that is ignored, as in a shell's background, stays so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt_once)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; a second SIGTERM, as Ray's end of a job sends to every process,
    must not cut the orderly end short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def cancellable(orders: Orders) -> Generator[None]:
    """Interrupt the block, which is in the main thread, as Ctrl-C does once cancel is wanted."""
    main = threading.main_thread().ident
    is_told = False

    def look() -> None:
        nonlocal is_told
        if main is not None and not is_told and orders.cancelled() is not None:
            is_told = True  # again would cut the orderly end short
            signal.pthread_kill(main, signal.SIGTERM)

    answer_signals()
    with pumping(look):
        yield


def _read(path: Path) -> Order | None:
    if not path.is_file():
        return None
    found: Any = read_json(path)
    known = isinstance(found, dict) and found.get("want") in list(PAST)
    if not known or not isinstance(found.get("by"), str) or not _is_number(found.get("at")):
        raise DataError(f"{path}: not an order to a sweep; remove the file and ask again")
    return Order(found["want"], found["by"], float(found["at"]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""Ledgers followed as they grow: each event is read once, whoever asks how often.

A tail is shared by threads; what it hands out is to be read, never changed.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from service.ledger import SweepView, is_held, read_with_ends
from service.paths import Paths
from service.states import State

T = TypeVar("T")


class LedgerTail:
    """One sweep's ledger: its events so far and the view that they add up to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._offset = 0
        self._events: list[dict[str, Any]] = []
        self._view = SweepView()

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """The events with a `seq` over `after`, as far as the file has them now."""
        with self._lock:
            self._refresh()
            return self._events[after:]

    def ask(self, question: Callable[[SweepView], T]) -> T:
        """Answer from the view of all events so far, an empty one before the ledger exists. No
        event is folded in meanwhile."""
        with self._lock:
            self._refresh()
            return question(self._view)

    def state(self) -> State:
        """The state that the ledger tells; lost, where it is under way and nobody writes."""
        state = self.ask(lambda view: view.state)
        return State.LOST if state == State.RUNNING and not is_held(self.path) else state

    def _refresh(self) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size < self._offset:  # restored from a copy, or begun anew
            self._offset, self._events, self._view = 0, [], SweepView()
        if size == self._offset:
            return
        for event, end in read_with_ends(self.path, offset=self._offset, seq=len(self._events)):
            self._view.apply(event)
            self._events.append(event)
            self._offset = end


class Tails:
    """The tails of a home's sweeps, the `keep` last used of them."""

    def __init__(self, paths: Paths, keep: int = 64) -> None:
        self._paths = paths
        self._keep = keep
        self._lock = threading.Lock()
        self._tails: OrderedDict[str, LedgerTail] = OrderedDict()

    def of(self, sweep_id: str) -> LedgerTail:
        """The tail of one sweep; the caller has checked that the id is one."""
        with self._lock:
            tail = self._tails.setdefault(sweep_id, LedgerTail(self._paths.sweep(sweep_id).ledger))
            self._tails.move_to_end(sweep_id)
            while len(self._tails) > self._keep:
                self._tails.popitem(last=False)
            return tail

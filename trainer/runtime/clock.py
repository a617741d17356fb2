"""The wall-clock ledger: which second went to which phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Monotonic seconds by phase; exactly one phase runs at a time.

    Only `train` counts against the challenge's training clock. `now` is injectable for tests;
    `settle` is called before every reading, so that queued device work is paid by its phase.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._now = now
        self._settle = settle
        self.seconds: dict[str, float] = {}
        self._phase = "setup"
        self._since = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what runs inside to `name`; what was running before goes on afterwards."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def elapsed_s(self, phase: str) -> float:
        """Return the seconds charged to a phase so far, the running one included."""
        self._settle()
        running = self._now() - self._since if phase == self._phase else 0.0
        return self.seconds.get(phase, 0.0) + running

    def stop(self) -> dict[str, float]:
        """Charge the running phase and return the whole ledger."""
        self._switch(self._phase)
        return dict(self.seconds)

    def _switch(self, phase: str) -> str:
        self._settle()
        now, outer = self._now(), self._phase
        self.seconds[outer] = self.seconds.get(outer, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return outer

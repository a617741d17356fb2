"""The ends of sweeps as the queue tells them.

A sweep that comes to its end by itself says so in its ledger. One that is lost, is killed, fails
before its ledger begins, or is ended while it waits or is paused has nobody who would write there:
its change in the queue is all there is.
"""

from collections.abc import Iterator

from service.queue.queue import Queue
from service.queue.records import QueueEvent
from service.states import State
from service.tails import Tails
from trainer.errors import DataError

_PAGE = 1_000


class QueueEnds:
    """Reads a queue's events for those with which a sweep ended."""

    def __init__(self, queue: Queue, tails: Tails) -> None:
        self._queue, self._tails = queue, tails

    def after(self, event_id: int) -> tuple[list[QueueEvent], int]:
        """The ends with an id over `event_id`, in order, and the id of the last event read."""
        ends: list[QueueEvent] = []
        for event in self._events(event_id):
            event_id = event.id
            if event.event == "changed" and State(event.facts["state"]).is_final():
                ends.append(event)
        return ends, event_id

    def is_in_ledger(self, end: QueueEvent) -> bool:
        """Whether the attempt that an end closed has written `sweep_finished`; a pause that
        somebody made an end of later does not count, and what cannot be read says nothing."""
        began_at = num_events = 0
        is_acting = False
        for event in self._events(0, end.sweep_id):
            if event.id >= end.id:
                break
            if event.event == "summary":
                num_events = event.facts["num_events"]
            elif event.event == "changed":
                was_acting, is_acting = is_acting, event.facts["gangs_held"] > 0
                began_at = num_events if is_acting and not was_acting else began_at
        if not is_acting or num_events == began_at:
            return False
        try:
            last = self._tails.of(end.sweep_id).events(after=num_events - 1)[:1]
        except (DataError, OSError):
            return False
        return any(e["event"] == "sweep_finished" and e.get("order") != "pause" for e in last)

    def _events(self, after: int, sweep_id: str | None = None) -> Iterator[QueueEvent]:
        while page := self._queue.events(after, sweep_id=sweep_id, limit=_PAGE):
            yield from page
            after = page[-1].id

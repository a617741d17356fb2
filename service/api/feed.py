"""Events as they happen, by server-sent events: those of one sweep, and the queue's own.

One feed per app looks at the queue and at the ledgers that somebody listens to, every half second
and for all listeners together. What it finds goes into a window of the newest messages, one per
sweep. A listener carries no messages of its own: it knows how far it has come and reads on there,
from the window, or from queue and ledger where the window has moved past it. So nobody's slowness
costs memory, and a listener of another service, or of this one before a restart, goes on exactly
where it was.

A message's id is that place. In a sweep's stream it has both counters, `q<id>.l<seq>`: the last
event of the queue and the last of the ledger that have been sent. Each counter only goes up.
"""

import asyncio
import heapq
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from service.ledger import SweepView
from service.queue.queue import Queue
from service.queue.records import QueueEvent
from service.tails import LedgerTail, Tails
from trainer.errors import BackendError, DataError

logger = logging.getLogger(__name__)

POLL_S = 0.5
KEEP_ALIVE_S = 15.0
WINDOW = 1_000  # messages of a sweep that are kept for its listeners
BATCH = 50  # messages that a listener takes from there at once
PIECE = 200  # events of either kind that are read at once for a listener who is behind
READ = 1_000  # events of the queue that the feed reads at once


@dataclass(frozen=True, slots=True)
class Place:
    """How far a listener has come: the last event of the queue, and of the ledger, 0 for none."""

    queue: int = 0
    ledger: int = 0

    def after(self, message: "Message") -> "Place":
        """The place behind a message."""
        if message.kind == "queue":
            return Place(message.number, self.ledger)
        return Place(self.queue, message.number)

    def is_behind(self, message: "Message") -> bool:
        """Whether a message is still to come."""
        return message.number > (self.queue if message.kind == "queue" else self.ledger)

    def at_least(self, other: "Place") -> "Place":
        """The further of the two, in each counter."""
        return Place(max(self.queue, other.queue), max(self.ledger, other.ledger))

    def __str__(self) -> str:
        return f"q{self.queue}.l{self.ledger}"


@dataclass(frozen=True, slots=True)
class Message:
    """One event, written once for all listeners. `at` in Unix seconds."""

    kind: Literal["queue", "ledger"]
    number: int
    at: float
    data: str

    @classmethod
    def of_queue(cls, event: QueueEvent) -> "Message":
        return cls("queue", event.id, event.at, json.dumps(asdict(event), separators=(",", ":")))

    @classmethod
    def of_ledger(cls, event: dict[str, Any]) -> "Message":
        return cls("ledger", event["seq"], event["at"], json.dumps(event, separators=(",", ":")))


def _merged(queue: Iterable[Message], ledger: Iterable[Message]) -> list[Message]:
    """Both in their own order, and by time where that leaves a choice."""
    return list(heapq.merge(queue, ledger, key=lambda message: message.at))


class Topic:
    """The newest messages of one sweep, or of the whole queue, and who waits for more."""

    def __init__(self, sweep_id: str | None, tail: LedgerTail | None, base: Place) -> None:
        self.sweep_id = sweep_id
        self.tail = tail
        self.base = base
        """Whoever has come as far as this finds everything after it in the window."""
        self.end = base
        """How far the feed has come."""
        self.window: list[Message] = []
        self.first = 0
        """The number of the window's first message, counted from the topic's beginning."""
        self.num_listeners = 0
        self.is_settled = False
        """Whether `is_over` is known to hold for all that is in the window."""
        self.is_over = False
        """Nothing more will come: the sweep has ended, and all of it is in the window."""
        self.is_closed = False
        """The feed cannot go on; a listener may ask again, and is told why."""
        self._news = asyncio.Event()

    def add(self, messages: Sequence[Message]) -> None:
        """Take messages up behind those that are there, and drop the oldest over WINDOW."""
        for message in messages:
            self.window.append(message)
            self.end = self.end.after(message)
        dropped = self.window[:-WINDOW]
        for message in dropped:
            self.base = self.base.after(message)
        self.first += len(dropped)
        del self.window[: len(dropped)]

    def next(self, position: int) -> list[Message]:
        """Some messages from a position on that the window still has."""
        start = position - self.first
        return self.window[start : start + BATCH]

    def has_all_after(self, place: Place) -> bool:
        """Whether the window holds everything that comes after a place."""
        return place.queue >= self.base.queue and place.ledger >= self.base.ledger

    def tell(self) -> None:
        """Wake whoever waits."""
        self._news.set()
        self._news = asyncio.Event()

    async def wait(self, seconds: float) -> bool:
        """Wait for news, at most so long; False if there was none."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        return True


Piece = Callable[[Topic, Place], tuple[list[Message], bool]]
"""Reads some events behind a place from where they are kept; True if there are no more."""


class _Listener:
    """How far one listener has come in a topic, from a place on."""

    def __init__(self, topic: Topic, piece: Piece, after: Place) -> None:
        self._topic = topic
        self._piece = piece
        self._read = after
        """In the queue it runs ahead of what was sent: other sweeps' events count too."""
        self._position = -1
        """The next message of the window, before which none is missing; behind it when unknown."""

    async def more(self) -> list[Message]:
        """The next messages; none once all that the feed has found has been read."""
        topic = self._topic
        while True:
            if self._position < topic.first and topic.has_all_after(self._read):
                self._position = topic.first
            if self._position >= topic.first:
                found = topic.next(self._position)
                self._position += len(found)
                fresh = self._taken(found)
                if fresh or not found:
                    return fresh
                continue
            end = topic.end  # what the feed has found by now can be read where it is kept
            found, is_all = await asyncio.to_thread(self._piece, topic, self._read)
            fresh = self._taken(found)
            if is_all:
                self._read = self._read.at_least(end)
            if fresh:
                return fresh

    def _taken(self, found: Sequence[Message]) -> list[Message]:
        """Those that have not been read; they are by that."""
        fresh: list[Message] = []
        for message in found:
            if self._read.is_behind(message):
                self._read = self._read.after(message)
                fresh.append(message)
        return fresh


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look found: the queue's events, by sweep the ledger's, whether it has ended where
    that may have changed, and the sweeps whose ledgers are broken."""

    queue: list[QueueEvent]
    ledgers: dict[str, list[dict[str, Any]]]
    is_over: dict[str, bool]
    broken: set[str]


class Feed:
    """The one reader of queue and ledgers for all listeners of an app; lives in its event loop.

    Once the service stops, `stopping`, every stream ends.
    """

    def __init__(self, queue: Queue, tails: Tails, stopping: threading.Event) -> None:
        self._queue = queue
        self._tails = tails
        self._stopping = stopping
        self._topics: dict[str | None, Topic] = {}
        self._joining = asyncio.Lock()
        self._poller: asyncio.Task[None] | None = None
        self._seen = 0  # the queue's last event that every topic has been given
        self.listeners: Counter[str] = Counter()
        """Streams that are open, by user."""

    @property
    def num_listeners(self) -> int:
        """Streams that are open."""
        return self.listeners.total()

    async def reach(self, sweep_id: str | None) -> Place:
        """How far a sweep's events go by now, or the queue's; DataError for a broken ledger."""
        tail = None if sweep_id is None else self._tails.of(sweep_id)
        num = 0 if tail is None else await asyncio.to_thread(tail.ask, _num_events)
        return Place(await asyncio.to_thread(self._queue.last_event_id), num)

    async def messages(
        self, sweep_id: str | None, sent: Place, may_listen: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[bytes]:
        """Everything behind a place as server-sent events, each once; ids tell the place behind
        them. Ends with a sweep, where the feed cannot go on, and for who may not listen any more,
        which is asked every KEEP_ALIVE_S."""
        yield KEEPALIVE_COMMENT  # the listener learns at once that it is heard
        try:
            topic = await self._join(sweep_id)
        except (BackendError, DataError) as error:
            logger.warning("events of %s: %s", sweep_id, error)
            return
        try:
            listener = _Listener(topic, self._piece, sent)
            asked_at = time.monotonic()
            while not topic.is_closed:
                if time.monotonic() - asked_at >= KEEP_ALIVE_S:
                    if not await may_listen():
                        return
                    asked_at = time.monotonic()
                messages = await listener.more()
                for message in messages:
                    sent = sent.after(message)
                    yield _encode(message, sent, is_of_queue=sweep_id is None)
                if messages:
                    continue
                if topic.is_over:
                    yield format_sse_event(event="end", data_str="{}", id=str(sent))
                    return
                if not await topic.wait(KEEP_ALIVE_S):
                    yield KEEPALIVE_COMMENT
        except (BackendError, DataError) as error:  # whoever asks again is told
            logger.warning("events of %s: %s", sweep_id, error)
        finally:
            self._leave(topic)

    def _piece(self, topic: Topic, after: Place) -> tuple[list[Message], bool]:
        """Some events behind a place, from where they are kept; True if there are no more."""
        events = self._queue.events(after.queue, sweep_id=topic.sweep_id, limit=PIECE)
        told = [] if topic.tail is None else topic.tail.events(after.ledger)
        is_all = len(events) < PIECE and len(told) <= PIECE
        return _merged(map(Message.of_queue, events), map(Message.of_ledger, told[:PIECE])), is_all

    async def _join(self, sweep_id: str | None) -> Topic:
        async with self._joining:
            if self._poller is None:
                self._seen = await asyncio.to_thread(self._queue.last_event_id)
            topic = self._topics.get(sweep_id)
            if topic is None or topic.is_closed:
                tail = None if sweep_id is None else self._tails.of(sweep_id)
                num = 0 if tail is None else await asyncio.to_thread(tail.ask, _num_events)
                # No pause from here on: a look that is under way gives its events to this topic.
                topic = self._topics[sweep_id] = Topic(sweep_id, tail, Place(self._seen, num))
            topic.num_listeners += 1
            if self._poller is None:
                self._poller = asyncio.create_task(self._poll(), name="feed")
            return topic

    def _leave(self, topic: Topic) -> None:
        topic.num_listeners -= 1
        if topic.num_listeners == 0 and self._topics.get(topic.sweep_id) is topic:
            del self._topics[topic.sweep_id]

    async def _poll(self) -> None:
        """Look again and again as long as somebody listens."""
        trouble = None
        try:
            while self._topics and not self._stopping.is_set():
                topics = [
                    (topic.sweep_id, topic.tail, topic)
                    for topic in self._topics.values()
                    if topic.sweep_id is not None and topic.tail is not None
                ]
                try:
                    self._give(await asyncio.to_thread(self._look, self._seen, topics))
                    trouble = None
                except BackendError as error:  # the streams wait until it is back
                    if trouble is None:
                        logger.warning("events: %s", error)
                    trouble = error
                await asyncio.sleep(POLL_S)
        finally:
            self._poller = None
            for topic in self._topics.values():
                topic.is_closed = True
                topic.tell()

    def _look(self, seen: int, topics: Sequence[tuple[str, LedgerTail, Topic]]) -> _Look:
        """Look at the queue behind event `seen`, and at the ledgers of topics; in a thread.

        A sweep's state is read before the events that may have led to it and before its ledger: so
        when it has ended, all of it is found.
        """
        events = self._events(seen)
        changed = {event.sweep_id for event in events}
        is_over = {
            sweep_id: self._queue.get(sweep_id).state.is_final()
            for sweep_id, _, topic in topics
            if sweep_id in changed or not topic.is_settled
        }
        if any(is_over.values()):
            later = self._events(events[-1].id if events else seen)
            events += later
            for event in later:  # it may have gone on again
                is_over.pop(event.sweep_id, None)
        ledgers: dict[str, list[dict[str, Any]]] = {}
        broken: set[str] = set()
        for sweep_id, tail, topic in topics:
            try:
                ledgers[sweep_id] = tail.events(topic.end.ledger)
                if tail.ask(_num_events) < topic.end.ledger:
                    raise DataError(f"{tail.path}: shorter than it was; begin the stream again")
            except (DataError, OSError) as error:
                logger.warning("events of %s: %s", sweep_id, error)
                broken.add(sweep_id)
        return _Look(events, ledgers, is_over, broken)

    def _events(self, after: int) -> list[QueueEvent]:
        found: list[QueueEvent] = []
        while True:
            events = self._queue.events(after, limit=READ)
            found += events
            if len(events) < READ:
                return found
            after = events[-1].id

    def _give(self, look: _Look) -> None:
        """Hand what was found to the topics."""
        messages: dict[str | None, list[Message]] = {None: []}
        for event in look.queue:
            if event.sweep_id in self._topics or None in self._topics:
                message = Message.of_queue(event)
                messages[None].append(message)
                messages.setdefault(event.sweep_id, []).append(message)
        for key, topic in self._topics.items():
            told = messages.get(key, ())
            lines = map(Message.of_ledger, look.ledgers.get(key or "", ()))
            new = [m for m in _merged(told, lines) if topic.end.is_behind(m)]
            topic.add(new)
            if told:
                topic.is_settled = topic.is_over = False
            if key in look.is_over:
                topic.is_settled, topic.is_over = True, look.is_over[key]
            topic.is_closed = key in look.broken
            if new or topic.is_over or topic.is_closed:
                topic.tell()
        if look.queue:
            self._seen = look.queue[-1].id


def _num_events(view: SweepView) -> int:
    return view.events


def _encode(message: Message, place: Place, *, is_of_queue: bool) -> bytes:
    where = str(place.queue) if is_of_queue else str(place)
    return format_sse_event(event=message.kind, data_str=message.data, id=where)

"""The routes of events: a sweep's, and the queue's own. What they stream is `feed`'s."""

import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from service.api.auth import LOCAL, Gatekeeper, Reader, is_near
from service.api.feed import Feed, Place
from service.api.problems import Refusal, documented
from service.api.services import SWEEP, In
from service.queue.records import User
from trainer.errors import BackendError

MAX_LISTENERS = 500
MAX_OF_USER = 32
MAX_LOCAL = 200  # of whoever calls an open service: nobody is told from another there
_PLACE: Final = re.compile(r"q(\d{1,18})\.l(\d{1,18})", re.ASCII)
_LATER: Final = {"Retry-After": "30"}
_NUMBER: Final = re.compile(r"\d{1,18}", re.ASCII)
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events. `event`: queue, ledger or end; `data`: JSON; `id`: "
        "where to go on. A comment every 15 seconds.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

LastId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="Go on behind this message.")
]
LastIdQuery = Annotated[
    str | None, Query(alias="last_event_id", description="The same, where no header can be sent.")
]


def router() -> APIRouter:
    """The routes that stream."""
    routes = APIRouter(tags=["events"])

    @routes.get(
        f"{SWEEP}/events", response_class=Response, responses={**_STREAM, **documented(404)}
    )
    async def sweep_events(
        ref: str,
        request: Request,
        services: In,
        user: Reader,
        feed: Heard,
        header: LastId = None,
        query: LastIdQuery = None,
    ) -> Response:
        """Every event of a sweep, of the queue and of its ledger, once and in order.

        From the first one, or behind Last-Event-ID, `q<queue event>.l<ledger event>`. It ends with
        the message `end` once the sweep has ended.
        """
        last = header if header is not None else query
        after = Place() if last is None else place_of(last)
        record = await run_in_threadpool(services.queue.find, ref)
        reach = await feed.reach(record.sweep_id)
        if after.queue > reach.queue or after.ledger > reach.ledger:
            raise Refusal(400, f"Last-Event-ID: {after} is ahead of this sweep; begin without it")
        messages = feed.messages(record.sweep_id, after, _still(request, user))
        return _Stream(feed, user, messages)

    @routes.get("/events", response_class=Response, responses=_STREAM)
    async def queue_events(
        request: Request,
        user: Reader,
        feed: Heard,
        header: LastId = None,
        query: LastIdQuery = None,
    ) -> Response:
        """The queue's events of all sweeps, from now on, or behind Last-Event-ID."""
        last = header if header is not None else query
        reach = await feed.reach(None)
        after = reach if last is None else Place(number_of(last))
        if after.queue > reach.queue:
            raise Refusal(400, f"Last-Event-ID: {last} is ahead of the queue; begin without it")
        return _Stream(feed, user, feed.messages(None, after, _still(request, user)))

    return routes


def place_of(text: str) -> Place:
    """Read the id of a message of a sweep's stream; a 400 where it is none."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise Refusal(400, f"Last-Event-ID: {text[:80]!r} is not q<number>.l<number>")
    return Place(int(found[1]), int(found[2]))


def number_of(text: str) -> int:
    """Read the id of a message of the queue's stream; a 400 where it is none."""
    if _NUMBER.fullmatch(text) is None:
        raise Refusal(400, f"Last-Event-ID: {text[:80]!r} is not a number")
    return int(text)


async def _feed_of(request: Request, services: In) -> Feed:
    """The app's feed, which begins with the first listener; a 503 once the service goes down."""
    state = request.app.state
    if not hasattr(state, "feed"):
        state.feed = Feed(services.queue, services.tails, services.stopping)
    feed: Feed = state.feed
    if services.stopping.is_set():
        raise Refusal(503, "the service is going down; try again later", headers=_LATER)
    return feed


Heard = Annotated[Feed, Depends(_feed_of)]


def _still(request: Request, user: User) -> Callable[[], Awaitable[bool]]:
    """Asks whether the caller of a request is still let in as this user."""
    gatekeeper: Gatekeeper = request.app.state.gatekeeper
    token = request.headers.get("authorization", "").partition(" ")[2].strip()

    def look() -> bool:
        try:
            return gatekeeper.user_of(token, is_near=is_near(request)) == user
        except BackendError:  # streams wait until the database is back, and are asked again
            return True

    return lambda: run_in_threadpool(look)


@contextmanager
def _seat(feed: Feed, user: User) -> Iterator[None]:
    """A seat among the listeners; a 503 where all are taken, a 429 where the user has enough."""
    most = MAX_LOCAL if user is LOCAL else MAX_OF_USER
    if feed.num_listeners >= MAX_LISTENERS:
        raise Refusal(503, f"{MAX_LISTENERS} listen already; try again later", headers=_LATER)
    if feed.listeners[user.name] >= most:
        raise Refusal(429, f"{user.name} listens {most} times; close a stream", headers=_LATER)
    feed.listeners[user.name] += 1
    try:
        yield
    finally:
        feed.listeners -= Counter([user.name])  # keeps only who listens


class _Stream(EventSourceResponse):
    """A stream with its user's seat among the feed's listeners."""

    def __init__(self, feed: Feed, user: User, messages: AsyncGenerator[bytes]) -> None:
        # A proxy that collects what it passes on would hold events back.
        super().__init__(messages, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._feed = feed
        self._user = user
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with _seat(self._feed, self._user):  # where nothing comes between the look and the taking
            async with aclosing(self._messages):
                await super().__call__(scope, receive, send)

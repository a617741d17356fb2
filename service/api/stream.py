"""The routes of events: a sweep's, and the queue's own. What they stream is `feed`'s."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from service.api.auth import Reader
from service.api.feed import Feed, Place
from service.api.problems import Refusal, documented
from service.api.services import SWEEP, In

_PLACE: Final = re.compile(r"q(\d{1,18})\.l(\d{1,18})", re.ASCII)
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
        return _Stream(feed, feed.messages(record.sweep_id, after))

    @routes.get("/events", response_class=Response, responses=_STREAM)
    async def queue_events(
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
        return _Stream(feed, feed.messages(None, after))

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
    """The app's feed, which begins with the first listener; a 503 where nobody more can listen."""
    state = request.app.state
    if not hasattr(state, "feed"):
        state.feed = Feed(services.queue, services.tails, services.stopping)
    feed: Feed = state.feed
    if services.stopping.is_set() or not feed.has_room:
        raise Refusal(
            503,
            f"{feed.num_listeners} listen already, or the service is going down; try again later",
            headers={"Retry-After": "30"},
        )
    return feed


Heard = Annotated[Feed, Depends(_feed_of)]


class _Stream(EventSourceResponse):
    """A stream with its seat among the feed's listeners."""

    def __init__(self, feed: Feed, messages: AsyncGenerator[bytes]) -> None:
        # A proxy that collects what it passes on would hold events back.
        super().__init__(messages, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._feed = feed
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._feed.num_listeners += 1
        try:
            async with aclosing(self._messages):
                await super().__call__(scope, receive, send)
        finally:
            self._feed.num_listeners -= 1

"""The streams of events, over a real server: each listener gets each event once, whatever happens
to its connection or to the service."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.api import feed, lifespan, stream
from service.api.auth import Gatekeeper
from service.api.services import Services
from service.queue.records import Role, Verb
from service.states import State
from tests.api_home import ANN, Home, advance, enqueue
from tests.serving import PATIENCE_S, opened_service, served, token
from trainer.runtime.files import write_bytes

ENOUGH = {"requests_per_second": 1e6, "burst": 1_000_000}
SWEEP = "watched-0a1b2c"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def services(folder: Path) -> Iterator[Services]:
    with opened_service(folder, **ENOUGH) as services:
        enqueue(services, SWEEP)
        yield services


@dataclass
class Heard:
    """What one listener has got: the messages' ids, names and events."""

    ids: list[str] = field(default_factory=list)
    events: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return bool(self.events) and self.events[-1][0] == "end"

    def numbers(self, name: str) -> list[int]:
        key = "id" if name == "queue" else "seq"
        return [event[key] for kind, event in self.events if kind == name]


@asynccontextmanager
async def calling(address: str) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=address, trust_env=False, limits=limits, timeout=PATIENCE_S
    ) as client:
        yield client


async def listen(
    client: httpx2.AsyncClient, heard: Heard, *, most: int | None = None, path: str | None = None
) -> None:
    """Go on listening behind what was heard, to the end, or for so many messages."""
    headers = {"Last-Event-ID": heard.ids[-1]} if heard.ids else {}
    url = path or f"/api/v1/sweeps/{SWEEP}/events"
    async with client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        num = 0
        async for message in httpx2.EventSource(response):
            heard.ids.append(message.id)
            heard.events.append((message.event, json.loads(message.data)))
            num += 1
            if num == most or heard.is_over:
                return


async def _listen_once(address: str, heard: Heard, **options: Any) -> None:
    async with calling(address) as client, asyncio.timeout(PATIENCE_S):
        await listen(client, heard, **options)


def grow(services: Services, num_events: int, *, pause_s: float = 0.0) -> None:
    """Run the sweep in its ledger and in the queue, to its end."""
    home = Home(services)
    sweep = home.sweep(SWEEP)
    advance(services, SWEEP, State.RUNNING)
    with sweep.open() as ledger:
        sweep.start(ledger)
        for step in range(num_events):
            ledger.append("waiting", reason=f"no gang yet {step}")
            time.sleep(pause_s)
        sweep.finish(ledger)
    advance(services, SWEEP, State.SUCCEEDED)


def everything(services: Services) -> tuple[list[int], list[int]]:
    """The ids of the sweep's events in the queue, and those of its ledger."""
    queue = [event.id for event in services.queue.events(sweep_id=SWEEP)]
    return queue, [event["seq"] for event in services.tails.of(SWEEP).events()]


def assert_complete(heard: Heard, services: Services) -> None:
    queue, ledger = everything(services)
    assert heard.numbers("queue") == queue
    assert heard.numbers("ledger") == ledger
    assert heard.events[-1] == ("end", {})
    assert heard.ids[-1] == f"q{queue[-1]}.l{ledger[-1]}"


def test_an_ended_sweep_is_told_from_its_first_event_to_the_end(services: Services) -> None:
    grow(services, 450)  # more than one piece
    heard = Heard()

    with served(services) as http:
        asyncio.run(_listen_once(str(http.base_url), heard))

    assert_complete(heard, services)


def test_a_listener_that_begins_anywhere_gets_the_rest(services: Services) -> None:
    grow(services, 5)
    whole, rests = Heard(), []

    async def ask(address: str) -> None:
        await _listen_once(address, whole)
        for place in whole.ids[:-1]:
            rest = Heard(ids=[place])
            await _listen_once(address, rest)
            rests.append(rest.events)

    with served(services) as http:
        asyncio.run(ask(str(http.base_url)))

    assert rests == [whole.events[number:] for number in range(1, len(whole.events))]


def test_100_listeners_get_every_event_once_also_across_reconnections(services: Services) -> None:
    listeners = [Heard() for _ in range(100)]
    late = [Heard() for _ in range(10)]

    async def follow(client: httpx2.AsyncClient, number: int, heard: Heard) -> None:
        while not heard.is_over:
            breaks = number % 3 == 0
            await listen(client, heard, most=7 + number % 11 if breaks else None)

    async def everybody(address: str) -> None:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            writer = asyncio.to_thread(grow, services, 150, pause_s=0.02)
            tasks = [asyncio.create_task(follow(client, n, h)) for n, h in enumerate(listeners)]
            await asyncio.gather(writer, *tasks)
            await asyncio.gather(*(listen(client, heard) for heard in late))

    with served(services) as http:
        asyncio.run(everybody(str(http.base_url)))

    for heard in (*listeners, *late):
        assert_complete(heard, services)


def test_listeners_share_one_look_at_queue_and_ledger(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    look = feed.Feed._look

    def counted(self: feed.Feed, seen: int, topics: Any) -> Any:
        looks.append(len(topics))
        return look(self, seen, topics)

    monkeypatch.setattr(feed.Feed, "_look", counted)
    listeners = [Heard() for _ in range(30)]

    async def everybody(address: str) -> None:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            writer = asyncio.to_thread(grow, services, 40, pause_s=0.05)
            await asyncio.gather(writer, *(listen(client, heard) for heard in listeners))

    began = time.monotonic()
    with served(services) as http:
        asyncio.run(everybody(str(http.base_url)))

    assert max(looks) == 1  # one topic, however many listen
    assert len(looks) <= (time.monotonic() - began) / feed.POLL_S + 2


def test_a_listener_goes_on_where_it_was_after_a_restart_of_the_service(folder: Path) -> None:
    heard = Heard()
    with opened_service(folder, **ENOUGH) as first:
        enqueue(first, SWEEP)
        advance(first, SWEEP, State.RUNNING)
        sweep = Home(first).sweep(SWEEP)
        with sweep.open() as ledger:
            sweep.start(ledger)
            ledger.append("waiting", reason="no gang yet")
        with served(first) as http:
            asyncio.run(_listen_once(str(http.base_url), heard, most=3))
    with sweep.open() as ledger:  # the sweep outlives the service
        ledger.append("waiting", reason="still none")
        sweep.finish(ledger)
    with opened_service(folder, **ENOUGH) as second:
        advance(second, SWEEP, State.SUCCEEDED)
        with served(second) as http:
            asyncio.run(_listen_once(str(http.base_url), heard))

        assert_complete(heard, second)


def test_a_slow_listener_that_the_window_has_left_behind_misses_nothing(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "WINDOW", 20)
    monkeypatch.setattr(feed, "POLL_S", 0.05)
    slow, quick = Heard(), Heard()

    async def dawdle(client: httpx2.AsyncClient) -> None:
        url = f"/api/v1/sweeps/{SWEEP}/events"
        async with client.stream("GET", url) as response:
            async for message in httpx2.EventSource(response):
                slow.ids.append(message.id)
                slow.events.append((message.event, json.loads(message.data)))
                await asyncio.sleep(0.01 if len(slow.ids) > 3 else 1.0)
                if slow.is_over:
                    return

    async def both(address: str) -> None:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            writer = asyncio.to_thread(grow, services, 400, pause_s=0.001)
            await asyncio.gather(writer, dawdle(client), listen(client, quick))

    with served(services) as http:
        asyncio.run(both(str(http.base_url)))

    assert_complete(slow, services)
    assert_complete(quick, services)


def test_a_sweep_that_is_resumed_while_it_ends_is_told_on(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, turn = Heard(), threading.Lock()
    look = feed.Feed._look

    def look_in_turn(self: feed.Feed, seen: int, topics: Any) -> Any:
        with turn:
            return look(self, seen, topics)

    def end_and_resume() -> None:
        with turn:  # between two looks: the listener must not take the first end for the last
            advance(services, SWEEP, State.FAILED, "no data")
            services.queue.ask(SWEEP, Verb.RESUME, ANN)

    monkeypatch.setattr(feed.Feed, "_look", look_in_turn)

    async def ask(address: str) -> None:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            task = asyncio.create_task(listen(client, heard))
            while len(heard.events) < 1:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(advance, services, SWEEP, State.RUNNING)
            await asyncio.to_thread(end_and_resume)
            await asyncio.sleep(2 * feed.POLL_S + 0.5)
            assert not task.done()
            await asyncio.to_thread(grow, services, 3)
            await task

    with served(services) as http:
        asyncio.run(ask(str(http.base_url)))

    assert_complete(heard, services)


def test_the_queues_stream_begins_now_and_tells_of_every_sweep(services: Services) -> None:
    heard, again = Heard(), Heard(ids=["0"])

    async def ask(address: str) -> None:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            async with client.stream("GET", "/api/v1/events") as response:
                enqueue(services, "other-000002")
                enqueue(services, "third-000003")
                async for message in httpx2.EventSource(response):
                    heard.ids.append(message.id)
                    heard.events.append((message.event, json.loads(message.data)))
                    if len(heard.ids) == 2:
                        break
            await listen(client, again, most=3, path="/api/v1/events")

    with served(services) as http:
        asyncio.run(ask(str(http.base_url)))

    assert [event["sweep_id"] for _, event in heard.events] == ["other-000002", "third-000003"]
    assert heard.ids == [str(event["id"]) for _, event in heard.events]
    assert again.events[0][1]["sweep_id"] == SWEEP
    assert again.events[1:] == heard.events


@pytest.mark.parametrize(
    "last", ["", "x", "q1", "q1.l", "q-1.l0", "q1,l1", "q99999999999999999999.l0", "q9999.l0",
             "q0.l9999", "q１.l0", "1"]
)  # fmt: skip
def test_a_broken_place_in_a_sweeps_stream_is_refused(last: str, services: Services) -> None:
    with served(services) as http:
        url = f"/api/v1/sweeps/{SWEEP}/events"
        by_query = http.get(url, params={"last_event_id": last})
        by_header = http.get(url, headers={"Last-Event-ID": last.encode()})

    for answer in (by_query, by_header):
        assert answer.status_code == 400, answer.text
        assert answer.json()["detail"].startswith("Last-Event-ID: ")


@pytest.mark.parametrize("last", ["q1.l1", "-1", "1e3", "99999"])
def test_a_broken_place_in_the_queues_stream_is_refused(last: str, services: Services) -> None:
    with served(services) as http:
        assert http.get("/api/v1/events", headers={"Last-Event-ID": last}).status_code == 400
        assert http.get("/api/v1/sweeps/nope/events").status_code == 404


def test_more_listeners_than_may_are_told_to_come_back(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_LISTENERS", 2)

    async def ask(address: str) -> tuple[int, int]:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            url = "/api/v1/events"
            async with client.stream("GET", url), client.stream("GET", url):
                full = await client.get(url)
                assert full.json()["status"] == 503
                assert int(full.headers["Retry-After"]) > 0
            while True:  # their seats are free once the server has seen them go
                async with client.stream("GET", url) as later:
                    if later.status_code == 200:
                        return full.status_code, later.status_code
                await asyncio.sleep(0.1)

    with served(services) as http:
        assert asyncio.run(ask(str(http.base_url))) == (503, 200)


def test_one_user_has_some_of_the_seats_and_leaves_the_others_to_the_rest(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_OF_USER", 2)
    ann, ben = token(services, "ann", "reader"), token(services, "ben", "reader")

    async def ask(address: str) -> tuple[int, int]:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            url = "/api/v1/events"
            async with (
                client.stream("GET", url, headers=ann),
                client.stream("GET", url, headers=ann),
                client.stream("GET", url, headers=ben) as other,
            ):
                full = await client.get(url, headers=ann)
                assert int(full.headers["Retry-After"]) > 0
                return full.status_code, other.status_code

    with served(services) as http:
        assert asyncio.run(ask(str(http.base_url))) == (429, 200)


def test_a_stream_ends_soon_after_its_token_is_revoked(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "KEEP_ALIVE_S", 0.2)
    record, secret = services.tokens.create("ann", Role.READER)
    headers = {"Authorization": f"Bearer {secret}"}
    asked_after = 0
    user_of = Gatekeeper.user_of

    def counted(self: Gatekeeper, token: str | None, *, is_near: bool) -> Any:
        nonlocal asked_after
        user = user_of(self, token, is_near=is_near)
        asked_after += user is None
        return user

    monkeypatch.setattr(Gatekeeper, "user_of", counted)

    async def lines(address: str) -> int:
        num = 0
        async with (
            calling(address) as client,
            asyncio.timeout(PATIENCE_S),
            client.stream("GET", "/api/v1/events", headers=headers) as response,
        ):
            async for line in response.aiter_lines():
                num += line.startswith(":")
                if num == 4:
                    await asyncio.to_thread(services.tokens.revoke, record.id)
        return num

    with served(services) as http:
        assert asyncio.run(lines(str(http.base_url))) >= 4
    assert asked_after == 1  # it ended with the first look at the token


def test_a_silent_stream_is_kept_alive(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr(feed, "POLL_S", 0.05)

    async def comments(address: str) -> int:
        num = 0
        async with (
            calling(address) as client,
            asyncio.timeout(PATIENCE_S),
            client.stream("GET", "/api/v1/events") as response,
        ):
            async for line in response.aiter_lines():
                num += line.startswith(":")
                if num == 4:
                    break
        return num

    with served(services) as http:
        assert asyncio.run(comments(str(http.base_url))) == 4


def test_streams_end_when_the_service_goes_down(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifespan, "GRACE_S", 2 * PATIENCE_S)  # nothing is cut off by the server
    ended = threading.Event()
    began = threading.Event()

    def wait(address: str) -> None:
        url = f"{address}/api/v1/sweeps/{SWEEP}/events"
        with httpx2.stream("GET", url, trust_env=False, timeout=PATIENCE_S) as response:
            for _ in response.iter_lines():
                began.set()
        ended.set()

    with served(services) as http:
        listener = threading.Thread(target=wait, args=(str(http.base_url),))
        listener.start()
        assert began.wait(PATIENCE_S)
        stopped_at = time.monotonic()

    assert ended.wait(PATIENCE_S)
    assert time.monotonic() - stopped_at < PATIENCE_S


def test_a_ledger_that_breaks_ends_the_stream_and_is_named_when_asked_again(
    services: Services,
) -> None:
    sweep = Home(services).sweep(SWEEP)
    advance(services, SWEEP, State.RUNNING)
    with sweep.open() as ledger:
        sweep.start(ledger)
    path = services.paths.sweep(SWEEP).ledger
    heard = Heard()

    async def ask(address: str) -> httpx2.Response:
        async with calling(address) as client, asyncio.timeout(PATIENCE_S):
            task = asyncio.create_task(listen(client, heard))
            while "ledger" not in [name for name, _ in heard.events]:
                await asyncio.sleep(0.05)
            write_bytes(path, path.read_bytes() + b'{"seq": 2}\n')
            await task
            return await client.get(f"/api/v1/sweeps/{SWEEP}/events")

    with served(services) as http:
        answer = asyncio.run(ask(str(http.base_url)))

    assert not heard.is_over
    assert "line 2 is damaged" in answer.json()["detail"]

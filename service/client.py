"""Fairway's HTTP service from Python.

    from service.client import Client

    fairway = Client("https://fairway.example", token)
    sweep = fairway.submit("sweep.yaml")
    for event in fairway.events(sweep["id"]):
        print(event.name, event.data)
    sweep = fairway.sweep(sweep["id"])
    print(sweep["state"], sweep["best"])
    for final in fairway.finals(sweep["id"]):
        print(final["val_bpb"], final["artifact_bytes"], final["state"])

What is asked is asked again where the network or the service fails for a moment: submissions
carry a key, so that none is made twice. Documents are the service's JSON, as its OpenAPI says.
"""

import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import httpx2

from service.bundle import Bundle, read_bundle
from trainer.errors import BackendError, FairwayError, InfeasibleError, UsageError

DEFAULT_SERVER = "http://127.0.0.1:7878"
TRIES = 5
PASSING = frozenset({429, 502, 503, 504})
MAX_PAUSE_S = 15.0
PLANNING_S = 75.0  # what the service may take to plan a submission, and some
FOLLOW_S = 600.0  # how long a service that was there may be away from who follows a sweep
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SILENCE_S = 45.0  # three of the service's keep-alives: a stream so long silent is dead
INFEASIBLE = "urn:fairway:infeasible"
Document = dict[str, Any]
Sweep = Bundle | Path | str
"""A sweep file, a shipped sweep's name, or either as already read."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a sweep. `name` is queue, ledger or end; `id` is the place in the
    stream to go on from."""

    id: str
    name: str
    data: Document

    @property
    def is_pause(self) -> bool:
        """Whether it tells that its sweep has been paused."""
        return self.name == "queue" and (self.data.get("facts") or {}).get("state") == "paused"


class Client:
    """One service, as one user; a context manager. Not for several threads at once.

    Raises UsageError for what the service refuses, InfeasibleError where nothing is feasible and
    legal, BackendError where it is out of reach; each in one line.
    """

    def __init__(
        self, server: str = DEFAULT_SERVER, token: str | None = None, *, timeout_s: float = 30.0
    ) -> None:
        address = _address(server)
        is_near = address.host in LOOPBACK
        self.server = str(address).rstrip("/")
        self._token, self._timeout_s = token, timeout_s
        # A token on an open wire is everybody's; on this machine there is no wire.
        if token and address.scheme == "http" and not is_near:
            raise UsageError(
                f"{self.server}: the token would travel in clear; use https, or a tunnel to "
                "loopback"
            )
        self._http = httpx2.Client(
            base_url=f"{self.server}/api/v1/",
            headers={"Authorization": f"Bearer {_checked(token)}"} if token else {},
            timeout=timeout_s,
            trust_env=not is_near,  # no proxy stands before loopback
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def again(self) -> "Client":
        """Another client of the same service and user, for another thread."""
        return Client(self.server, self._token, timeout_s=self._timeout_s)

    def me(self) -> Document:
        """Who we are to the service: user and role."""
        return self._json("GET", "me")

    def submit(
        self,
        sweep: Sweep,
        assignments: Sequence[str] = (),
        *,
        priority: int = 0,
        key: str | None = None,
    ) -> Document:
        """Queue a sweep, or find it there: what asks for the same is the same sweep.

        `key` makes a later call with the same key return what this one did.
        """
        body = {**_body(sweep, assignments), "priority": priority}
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._json("POST", "sweeps", json=body, headers=headers, timeout=PLANNING_S)

    def validate(self, sweep: Sweep, assignments: Sequence[str] = ()) -> Document:
        """What a submission would run and cost; nothing is queued."""
        body = _body(sweep, assignments)
        return self._json("POST", "sweeps:validate", json=body, timeout=PLANNING_S)

    def sweeps(self, **filters: Any) -> Iterator[Document]:
        """The sweeps, the newest first; filters: state, owner, name."""
        return self._pages("sweeps", filters)

    def sweep(self, ref: str) -> Document:
        """One sweep by id, a unique start of it, or its name."""
        return self._json("GET", f"sweeps/{_segment(ref)}")

    def ask(self, ref: str, verb: str) -> Document:
        """pause, resume, stop or cancel a sweep; asking twice is as good as once."""
        return self._json("POST", f"sweeps/{_segment(ref)}:{verb}")

    def trainings(self, ref: str) -> Iterator[Document]:
        """A sweep's trainings."""
        return self._pages(f"sweeps/{_segment(ref)}/trainings", {})

    def finals(self, ref: str, *, per_page: int = 200) -> Iterator[Document]:
        """A sweep's finals, the best first; `per_page` are asked for at once."""
        return self._pages(f"sweeps/{_segment(ref)}/finals", {}, per_page)

    def best(self, ref: str) -> Document:
        """The best feasible, legal final; InfeasibleError where there is none."""
        return self._json("GET", f"sweeps/{_segment(ref)}/best")

    def compare(self, sides: Sequence[str]) -> Document:
        """Hold sweeps, finals or baselines against the first of them."""
        return self._json("POST", "compare", json={"sides": list(sides)})

    def report(self, ref: str) -> str:
        """A sweep's report: one HTML file."""
        return self._answer("GET", f"sweeps/{_segment(ref)}/report").text

    def logs(self, ref: str, source: str = "driver", *, follow: bool = False) -> Iterator[str]:
        """The text of a log as it is; with `follow` also what is added, until the sweep ends."""
        path, offset = f"sweeps/{self._id(ref)}/logs", 0
        while True:
            asked = {"source": source, "offset": offset}
            part = self._json("GET", path, is_followed=follow, params=asked)
            if part["text"]:
                yield part["text"]
            is_at_end = part["next_offset"] == offset
            offset = part["next_offset"]
            if is_at_end and (part["is_over"] or not follow):
                return
            if is_at_end:
                time.sleep(1.0)

    def events(self, ref: str, after: str | None = None) -> Iterator[Event]:
        """Everything that happens to a sweep, each once and in order, until it has ended; `after`
        goes on behind an event's id. A broken stream is taken up again where it broke."""
        path, failures, since = f"sweeps/{self._id(ref)}/events", 0, time.monotonic()
        while True:
            try:
                for event in self._stream(path, after):
                    failures, since, after = 0, time.monotonic(), event.id or after
                    yield event
                    if event.name == "end":
                        return
                raise BackendError(f"{self.server}: the stream ended early")
            except BackendError:
                failures += 1
                if time.monotonic() - since > FOLLOW_S:
                    raise
                _pause(failures)

    def wait(self, ref: str) -> Document:
        """Wait until a sweep has ended, or is paused, and return it."""
        ref = self._id(ref)
        for _ in self.events_until_rest(ref):
            pass
        return self.sweep(ref)

    def events_until_rest(self, ref: str) -> Iterator[Event]:
        """A sweep's events, until it has ended or is paused: an earlier pause is one of them."""
        ref = self._id(ref)
        for event in self.events(ref):
            yield event
            if event.is_pause and self.sweep(ref)["state"] == "paused":
                return

    def _id(self, ref: str) -> str:
        """The id of what a name means now: a newer sweep of that name is another one."""
        return self.sweep(ref)["id"]

    def _stream(self, path: str, after: str | None) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream"}
        if after is not None:
            headers["Last-Event-ID"] = after
        options: dict[str, Any] = {"headers": headers}
        options["timeout"] = httpx2.Timeout(30.0, read=SILENCE_S)
        try:
            with self._http.stream("GET", f"/{path}", **options) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                for message in httpx2.EventSource(response):
                    data = cast(Document, message.json())
                    yield Event(message.id, message.event, data)
        except (httpx2.HTTPError, httpx2.SSEError, httpx2.StreamError) as error:
            raise self._unreachable(error) from error

    def _pages(
        self, path: str, filters: Mapping[str, Any], per_page: int = 200
    ) -> Iterator[Document]:
        asked = {name: value for name, value in filters.items() if value} | {"limit": per_page}
        cursor = None
        while True:
            place = {"cursor": cursor} if cursor else {}
            page = self._json("GET", path, params={**asked, **place})
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def _json(
        self, method: str, path: str, *, is_followed: bool = False, **options: Any
    ) -> Document:
        response = self._answer(method, path, is_followed=is_followed, **options)
        try:
            return response.json()
        except ValueError as error:
            raise BackendError(
                f"{self.server}: the answer to {path} is not JSON; is a Fairway service there?"
            ) from error

    def _answer(
        self, method: str, path: str, *, is_followed: bool = False, **options: Any
    ) -> httpx2.Response:
        """Ask until there is an answer, at most TRIES times, or for FOLLOW_S where a sweep is
        followed. Whatever is asked may be repeated."""
        failures, since = 0, time.monotonic()
        while True:
            wait_s: float | None = None
            try:
                response = self._http.request(method, f"/{path}", **options)
                if response.is_success:
                    return response
                failure = self._refusal(response)
                if response.status_code not in PASSING:
                    raise failure
                wait_s = _retry_after_s(response)
            except httpx2.HTTPError as error:
                failure = self._unreachable(error)
                if isinstance(error, httpx2.ConnectError):
                    failures = max(failures, TRIES - 2)  # nobody there: one more try will do
            failures += 1
            is_patient = is_followed and time.monotonic() - since < FOLLOW_S
            if failures >= TRIES and not is_patient:
                raise failure
            _pause(failures, wait_s)

    def _refusal(self, response: httpx2.Response) -> FairwayError:
        """What the service says against it, as the error that it is to a user."""
        if response.is_redirect:
            there = response.headers.get("Location", "elsewhere")
            return UsageError(f"{self.server}: has moved to {there[:200]}; name that address")
        try:
            problem = response.json()
            detail = str(problem["detail"])
        except (ValueError, KeyError, TypeError):
            problem, detail = {}, f"{response.status_code} {response.reason_phrase}"
        if problem.get("type") == INFEASIBLE:
            return InfeasibleError(detail)
        if response.status_code == 401:
            return UsageError(f"{self.server}: {detail}; set FAIRWAY_TOKEN or give --token")
        if response.status_code in PASSING or response.status_code >= 500:
            return BackendError(f"{self.server}: {detail}; try again later")
        return UsageError(detail)

    def _unreachable(self, error: Exception) -> BackendError:
        reason = str(error) or type(error).__name__
        return BackendError(
            f"{self.server}: {reason}; is the service up? `fairway serve` starts one, --server "
            "names another"
        )


def _body(sweep: Sweep, assignments: Sequence[str]) -> Document:
    bundle = sweep if isinstance(sweep, Bundle) else read_bundle(sweep)
    return {
        "sweep": bundle.sweep,
        "files": dict(bundle.files),
        "assignments": list(assignments),
    }


def _segment(ref: str) -> str:
    """A reference as one piece of a path; what cannot be one would ask for something else."""
    if not ref or not all(char.isascii() and (char.isalnum() or char in "-_.") for char in ref):
        raise UsageError(f"{ref!r} is no sweep: an id, a unique start of one, or a name")
    return ref


def _address(server: str) -> httpx2.URL:
    try:
        address = httpx2.URL(server)
    except httpx2.InvalidURL as error:
        raise UsageError(f"{server!r} is not the address of a service: {error}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise UsageError(f"{server!r} is not the address of a service; write https://HOST[:PORT]")
    return address


def _checked(token: str) -> str:
    """A token that can be sent; one that cannot is not shown, it may be a good one with a typo."""
    if not all("!" <= char <= "~" for char in token):
        raise UsageError("FAIRWAY_TOKEN or --token holds a space, a line break or another sign")
    return token


def _retry_after_s(response: httpx2.Response) -> float | None:
    try:
        return float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        return None


def _pause(failures: int, wait_s: float | None = None) -> None:
    """Wait before the next try, longer each time and not in step with others."""
    pause = min(MAX_PAUSE_S, 0.25 * 2**failures) * random.uniform(0.7, 1.3)
    time.sleep(pause if wait_s is None else min(wait_s, MAX_PAUSE_S))

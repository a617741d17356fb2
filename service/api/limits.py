"""The door: what every request passes before a route sees it, and every answer on its way out.

In this order: the name under which the service was called, the origin of a write, the rate, the
kind and the length of the body, which is counted again as it comes. A token that is not known yet
is looked up before its address is refused: behind a proxy everybody has the same one.
On the way out: security headers, one line of the access log, one count.
"""

import hashlib
import logging
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.metrics import Metrics
from service.api.problems import Refusal, internal, problem
from service.api.settings import LOOPBACK_NAMES, Settings
from service.queue.records import User
from trainer.errors import BackendError

access_log = logging.getLogger("fairway.access")

READS = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_KEYS = 10_000
FAILURE_COST = 10
"""Requests that a wrong token counts for: so nobody tries many."""
NUM_LOOKING = 2  # threads that look up tokens of addresses that have asked too fast
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RateLimiter:
    """A token bucket for each key, of the keys that asked last: `rate` per second, `burst` at once.

    Thread-safe. A key that was forgotten begins anew, so memory is bounded.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        *,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._max_keys = max_keys
        self._clock = clock
        self._lock = threading.Lock()
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._users: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, key: str, cost: float = 1.0) -> float:
        """Take from a bucket and return 0, or the seconds until it holds enough again. What costs
        more than one may leave it in debt."""
        with self._lock:
            now = self._clock()
            level, at = self._levels.pop(key, (float(self._burst), now))
            level = min(self._burst, level + (now - at) * self._rate)
            wait_s = 0.0 if level >= 1.0 else (1.0 - level) / self._rate
            self._levels[key] = (level if wait_s else level - cost, now)
            while len(self._levels) > self._max_keys:
                self._levels.popitem(last=False)
        return wait_s

    def key_of(self, authorization: str | None, address: str) -> str:
        """Whose bucket a request is taken from: the user's whose token is known by now, else the
        address's."""
        with self._lock:
            user = self._users.get(_digest(authorization)) if authorization else None
        return f"address {address}" if user is None else f"user {user}"

    def know(self, authorization: str, user: str) -> None:
        """A token has been found to be this user's."""
        with self._lock:
            self._users[_digest(authorization)] = user
            self._users.move_to_end(_digest(authorization))
            while len(self._users) > self._max_keys:
                self._users.popitem(last=False)

    def fail(self, authorization: str | None, address: str, *, is_write: bool) -> None:
        """A token has been found to be nobody's, or was missing: that costs as much where
        something was to be changed, which enters the audit log."""
        if authorization:
            with self._lock:
                self._users.pop(_digest(authorization), None)
        if authorization or is_write:
            self.take(f"address {address}", FAILURE_COST)


def _digest(authorization: str) -> bytes:
    return hashlib.sha256(authorization.encode(errors="surrogateescape")).digest()


class Door:
    """The middleware around all routes."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        limiter: RateLimiter,
        metrics: Metrics,
        verify: Callable[[str], User | None],
    ) -> None:
        self._app = app
        self._settings = settings
        self._limiter = limiter
        self._metrics = metrics
        self._verify = verify
        self._looking = CapacityLimiter(NUM_LOOKING)
        self._hosts = {
            name.lower() for name in (*LOOPBACK_NAMES, settings.host, *settings.allowed_hosts)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        request = Request(scope)
        try:
            await self._check(request)
            await self._app(scope, self._counted(receive), visit.send)
        except Refusal as refusal:
            answer = problem(
                refusal.status, str(refusal), request_id=visit.id, headers=refusal.headers
            )
            await answer(scope, receive, visit.send)
        except Exception as error:
            if visit.status is not None:
                raise  # too late for another answer: the connection is cut
            await internal(request, error)(scope, receive, visit.send)
        finally:
            self._note(visit)

    async def _check(self, request: Request) -> None:
        headers = request.headers
        host = headers.get("host", "")
        if _name_of(host) not in self._hosts:
            raise Refusal(
                400,
                f"{host!r} is not a name of this service; call it by the name it was given, or "
                "start it with --allowed-host",
            )
        is_write = request.method not in READS
        origin = headers.get("origin")
        if is_write and origin is not None and urlsplit(origin).netloc != host:
            raise Refusal(403, f"{origin!r} is another site; it may not ask for changes here")
        if wait_s := await self._wait_s(headers.get("authorization"), address_of(request)):
            rate = f"{self._settings.requests_per_second:g}"
            raise Refusal(
                429,
                f"more than {rate} requests per second; wait {wait_s:.1f} s",
                headers={"Retry-After": str(math.ceil(wait_s))},
            )
        if is_write:
            self._check_body(headers)

    async def _wait_s(self, authorization: str | None, address: str) -> float:
        """Take a request from its bucket; the seconds that it has to wait."""
        key = self._limiter.key_of(authorization, address)
        wait_s = self._limiter.take(key)
        if wait_s and authorization and key == f"address {address}":
            kind, _, token = authorization.partition(" ")
            try:
                user = await to_thread.run_sync(self._verify, token.strip(), limiter=self._looking)
            except BackendError:  # nobody can be told apart now
                return wait_s
            if kind.lower() == "bearer" and user is not None:
                self._limiter.know(authorization, user.name)
                return self._limiter.take(self._limiter.key_of(authorization, address))
        return wait_s

    def _check_body(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        limit = self._settings.max_body_bytes
        if length.isdecimal() and int(length[:20]) > limit:
            raise Refusal(413, _too_long(limit))
        has_body = length != "0" or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind != "application/json":
            raise Refusal(415, f"content type {kind!r}; send application/json")

    def _counted(self, receive: Receive) -> Receive:
        """The body piece by piece, until it has grown over the limit."""
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._settings.max_body_bytes:
                # Of this kind, so that FastAPI passes it on.
                raise HTTPException(413, _too_long(self._settings.max_body_bytes))
            return message

        return receive_some

    def _note(self, visit: "_Visit") -> None:
        scope = visit.scope
        route = getattr(scope.get("route"), "path_format", None) or "other"
        if route != "other" and scope["path"].startswith("/api/v1/"):
            route = f"/api/v1{route}"  # the template is the included router's
        status = visit.status or 499  # gone before there was an answer
        known = scope["method"] if scope["method"] in (*READS, "POST") else "other"
        self._metrics.count(known, route, status, visit.seconds)
        facts = {
            "request": visit.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(visit.seconds * 1_000, 1),
            "user": scope["state"].get("user"),
            "address": address_of(Request(scope)),
        }
        access_log.info("answered", extra={"facts": facts})


class _Visit:
    """One request: its id, when it came, what it was answered."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.id = secrets.token_hex(8)
        self.status: int | None = None
        self.seconds = 0.0
        self._send = send
        self._came_at = time.perf_counter()
        scope.setdefault("state", {})["request_id"] = self.id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.seconds = time.perf_counter() - self._came_at
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers["X-Request-ID"] = self.id
            if self.scope["path"].startswith("/api/"):
                headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


def address_of(request: Request) -> str:
    """From where a request comes, as far as the connection tells."""
    return request.client.host if request.client else "-"


def _too_long(limit: int) -> str:
    return f"the body is longer than {limit:,} bytes, the most that is taken"


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""

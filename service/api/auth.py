"""Who calls, and what they may do. Handlers take `user: Reader`, `Submitter` or `Admin`.

A service that is bound to this machine, goes by no other name and has never had a token takes
every caller for its administrator. From the first token on it asks for one, for good: a token
that runs out must not open the door. A request that somebody else passed on is not from this
machine, wherever its connection comes from.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.limits import MAX_KEYS, READS, RateLimiter, address_of
from service.api.problems import Refusal, one_line, status_of
from service.api.services import In, Services
from service.api.settings import is_loopback
from service.queue.records import Role, User
from trainer.errors import FairwayError

LOCAL: Final = User("local", Role.ADMIN)
"""Whoever calls an open service."""

MAX_TOKEN = 200  # characters
PASSED_ON = ("forwarded", "x-forwarded-", "x-real-ip", "via")
"""How headers begin that a proxy adds."""
REMEMBERED_S = 1.0
_bearer = HTTPBearer(auto_error=False, description="A token of `fairway token create`.")


class Gatekeeper:
    """Tells callers by their tokens; one for each app. What was found of a token holds for a
    second, so that a page of many requests asks the database once; an open stream asks again every
    15 seconds."""

    def __init__(self, services: Services, limiter: RateLimiter) -> None:
        self._services = services
        self._limiter = limiter
        self._had_token = not services.settings.is_private or bool(services.tokens.list())
        self._known: dict[str, tuple[User, float]] = {}

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        self._had_token = self._had_token or bool(self._services.tokens.list())
        return not self._had_token

    def user_of(self, token: str | None, *, is_near: bool) -> User | None:
        """Whose a token is, None for one that opens nothing; is_near: asked from this machine."""
        if self.is_open:
            return LOCAL if is_near else None
        return self._services.tokens.verify(token) if token and len(token) <= MAX_TOKEN else None

    def remembered(self, token: str | None) -> User | None:
        """Whose a token was a moment ago, without looking anywhere."""
        user, until = self._known.get(token or "", (None, 0.0))
        return user if time.monotonic() < until else None

    def identify(self, request: Request, token: str | None) -> User:
        """The user of a token; 401 without a valid one."""
        header = request.headers.get("authorization")
        user = self.user_of(token, is_near=is_near(request))
        if user is LOCAL:
            return LOCAL
        if user is None or token is None:
            is_write = request.method not in READS
            self._limiter.fail(header, address_of(request), is_write=is_write)
            said = "a token is needed" if header is None else "the token is not valid"
            raise Refusal(
                401,
                f"{said}; `fairway token create` on the service's machine makes one",
                headers={"WWW-Authenticate": "Bearer"},
            )
        self._limiter.know(header or "", user.name)
        if len(self._known) >= MAX_KEYS:
            self._known.clear()
        self._known[token] = user, time.monotonic() + REMEMBERED_S
        return user


def is_near(request: Request) -> bool:
    """Whether a request comes from this machine itself, as far as it tells."""
    is_passed_on = any(name.lower().startswith(PASSED_ON) for name in request.headers)
    return is_loopback(address_of(request)) and not is_passed_on


def caller(role: Role) -> Callable[..., Awaitable[User]]:
    """The dependency that yields the caller if they have this role; 401 or 403 otherwise, and a
    refused write enters the audit log."""

    async def identify(
        request: Request,
        services: In,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> User:
        gatekeeper: Gatekeeper = request.app.state.gatekeeper
        token, name = bearer and bearer.credentials, "-"
        try:
            user = gatekeeper.remembered(token)
            if user is None:
                user = await run_in_threadpool(gatekeeper.identify, request, token)
            name = request.state.user = user.name
            if not user.role.includes(role):
                raise Refusal(403, f"{name} is a {user.role}; this needs a {role}'s token")
        except Refusal as refusal:
            if request.method not in READS:
                what = (name, request.method, request.url.path[:200])
                outcome = f"{refusal.status}: {refusal}"
                await run_in_threadpool(services.queue.audit, *what, outcome, address_of(request))
            raise
        return user

    return identify


Reader = Annotated[User, Depends(caller(Role.READER))]
Submitter = Annotated[User, Depends(caller(Role.SUBMITTER))]
Admin = Annotated[User, Depends(caller(Role.ADMIN))]


@dataclass
class Entry:
    """What a write is about, as far as it is known by now."""

    subject: str


@contextmanager
def audited(
    services: Services, request: Request, user: User, action: str, subject: str
) -> Iterator[Entry]:
    """Enter a write into the audit log: done, or why it was refused."""
    address, entry = address_of(request), Entry(subject)
    try:
        yield entry
    except (Refusal, FairwayError) as error:
        status = error.status if isinstance(error, Refusal) else status_of(error)
        outcome = f"{status}: {one_line(str(error))[:500]}"
        services.queue.audit(user.name, action, entry.subject, outcome, address)
        raise
    services.queue.audit(user.name, action, entry.subject, "done", address)

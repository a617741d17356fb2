"""Who calls, and what they may do. Handlers take `user: Reader`, `Submitter` or `Admin`.

A service that is bound to this machine, goes by no other name and has never had a token takes
every caller for its administrator. From the first token on it asks for one, for good: a token
that runs out must not open the door.
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
from service.queue.records import Role, User
from trainer.errors import FairwayError

LOCAL: Final = User("local", Role.ADMIN)
"""Whoever calls an open service."""

MAX_TOKEN = 200  # characters
REMEMBERED_S = 1.0
_bearer = HTTPBearer(auto_error=False, description="A token of `fairway token create`.")


class Gatekeeper:
    """Tells callers by their tokens; one for each app. What was found of a token holds for a
    second, so that a page of many requests asks the database once."""

    def __init__(self, services: Services, limiter: RateLimiter) -> None:
        self._services = services
        self._limiter = limiter
        self._had_token = not services.settings.is_private or bool(services.tokens.list())
        self._known: dict[str, tuple[User, float]] = {}

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        self._had_token = self._had_token or self._services.tokens.any_active()
        return not self._had_token

    def remembered(self, token: str | None) -> User | None:
        """Whose a token was a moment ago, without looking anywhere."""
        user, until = self._known.get(token or "", (None, 0.0))
        return user if time.monotonic() < until else None

    def identify(self, header: str | None, token: str | None, address: str) -> User:
        """The user of a token; 401 without a valid one."""
        if self.is_open:
            return LOCAL
        user = self._services.tokens.verify(token) if token and len(token) <= MAX_TOKEN else None
        if user is None or token is None:
            self._limiter.fail(header, address)
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


def caller(role: Role) -> Callable[..., Awaitable[User]]:
    """The dependency that yields the caller if they have this role; 401 or 403 otherwise, and a
    refused write enters the audit log."""

    async def identify(
        request: Request,
        services: In,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> User:
        gatekeeper: Gatekeeper = request.app.state.gatekeeper
        header, token = request.headers.get("authorization"), bearer and bearer.credentials
        address, name = address_of(request), "-"
        try:
            user = gatekeeper.remembered(token)
            if user is None:
                user = await run_in_threadpool(gatekeeper.identify, header, token, address)
            name = request.state.user = user.name
            if not user.role.includes(role):
                raise Refusal(403, f"{name} is a {user.role}; this needs a {role}'s token")
        except Refusal as refusal:
            if request.method not in READS:
                what = (name, request.method, request.url.path[:200])
                outcome = f"{refusal.status}: {refusal}"
                await run_in_threadpool(services.queue.audit, *what, outcome, address)
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

"""What the routes work with: the queue and everything around it, made once by `lifespan`.

A router's module offers `router() -> APIRouter`; a handler takes `services: In` and, as the role
asks, `user: Reader`, `Submitter` or `Admin` of `auth`. A sweep's path is written with `SWEEP`,
whose parameter stops at a colon: so the path of a verb is never read as that of a sweep.
"""

import threading
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from sqlalchemy import Engine
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import HTTPConnection

from service.api.heartbeat import WatchedDispatcher
from service.api.metrics import Metrics
from service.api.planner import Planner
from service.api.settings import Settings
from service.api.views import Views
from service.paths import Paths
from service.queue.deliveries import Deliveries
from service.queue.queue import Queue
from service.queue.quotas import Quotas
from service.queue.tokens import Tokens
from service.tails import Tails

SWEEP = "/sweeps/{ref:ref}"
"""The path of one sweep: an id, a unique start of one, or a name."""


@dataclass(frozen=True, slots=True)
class Services:
    """One service's parts. `dispatcher` is None where nothing is to be run; `stopping` is set when
    the service goes down, so that streams end."""

    settings: Settings
    paths: Paths
    engine: Engine
    queue: Queue
    tokens: Tokens
    quotas: Quotas
    deliveries: Deliveries
    tails: Tails
    views: Views
    planner: Planner
    dispatcher: WatchedDispatcher | None = None
    metrics: Metrics = field(default_factory=Metrics)
    stopping: threading.Event = field(default_factory=threading.Event)


async def services_of(connection: HTTPConnection) -> Services:
    """The services of the app that a request came to. Async, so that no thread is asked for it."""
    return connection.app.state.services


In = Annotated[Services, Depends(services_of)]


class _Reference(Convertor[str]):
    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("ref", _Reference())

"""The service about itself: who calls, quotas, health, figures."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.auth import Reader
from service.api.metrics import CONTENT_TYPE
from service.api.services import In, Services
from service.api.shapes import Alive, Me, QuotaUse, Ready
from service.outbox_health import read_health
from service.queue.database import is_reachable
from service.queue.records import Quota, Role

OUTBOX_SILENCE_S = 600.0
DISPATCHER_SILENCE_S = 60.0


def router() -> APIRouter:
    """Routes under /api/v1 that need a token."""
    routes = APIRouter(tags=["service"])

    @routes.get("/me", response_model=Me)
    def me(request: Request, user: Reader) -> Any:
        """Say who the caller is."""
        is_open = request.app.state.gatekeeper.is_open
        return {"user": user.name, "role": user.role, "is_open": is_open}

    @routes.get("/quotas", response_model=list[QuotaUse])
    def quotas(services: In, user: Reader) -> Any:
        """What users may hold and spend, and do: the caller's own; an admin sees everybody's."""
        usage = services.queue.usage(time.time())
        known = {quota.user: quota for quota in services.quotas.list()}
        everybody = sorted({*known, *usage, user.name})
        shown = everybody if user.role == Role.ADMIN else [user.name]
        return [_use(known.get(name, Quota(name)), usage.get(name, (0, 0.0))) for name in shown]

    return routes


def probes() -> APIRouter:
    """/healthz and /readyz, which are open, and /metrics."""
    routes = APIRouter(tags=["service"])

    @routes.get("/healthz", response_model=Alive)
    async def healthz() -> Any:
        """The process answers."""
        return {"status": "ok"}

    @routes.get("/readyz", response_model=Ready, responses={503: {"model": Ready}})
    def readyz(services: In, response: Response) -> Any:
        """Whether what the service needs is there, part by part; 503 where something is not."""
        found = {
            "database": _database(services),
            "jobs": _jobs(services),
            "tracking": _tracking(services),
        }
        response.status_code = 200 if all(part["ok"] for part in found.values()) else 503
        return found

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}},
    )
    def metrics(request: Request, services: In, user: Reader) -> Response:
        """Figures for Prometheus."""
        feed = getattr(request.app.state, "feed", None)  # there is one from the first listener on
        listeners = 0 if feed is None else feed.num_listeners
        text = services.metrics.text(_Figures(services, listeners))
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    return routes


def _use(quota: Quota, used: tuple[int, float]) -> dict[str, Any]:
    gangs, seconds = used
    return {
        "user": quota.user,
        "max_gangs": quota.max_gangs,
        "gpu_hours": quota.gpu_hours,
        "window_days": quota.window_days,
        "gangs_held": gangs,
        "gpu_hours_used": round(seconds / 3_600, 3),
    }


def _part(trouble: str | None) -> dict[str, Any]:
    return {"ok": trouble is None, "detail": trouble or "in reach"}


def _database(services: Services) -> dict[str, Any]:
    return _part(None if is_reachable(services.engine) else "the database does not answer")


def _jobs(services: Services) -> dict[str, Any]:
    if services.dispatcher is None:
        return {"ok": True, "detail": "this service starts nothing"}
    if services.dispatcher.trouble:
        return _part("where sweeps run is out of reach; see the log")
    ticked_at = services.dispatcher.ticked_at
    is_stuck = ticked_at is not None and time.time() - ticked_at > DISPATCHER_SILENCE_S
    return _part(
        "the dispatcher has not come through for a while; see the log" if is_stuck else None
    )


def _tracking(services: Services) -> dict[str, Any]:
    health = read_health(services.paths)
    if health is None or time.time() - health.at > OUTBOX_SILENCE_S:
        return _part("the outbox has said nothing for a while; the ledgers keep everything")
    if health.trouble:
        return _part("MLflow is out of reach; the ledgers keep everything")
    words = ["in reach"]
    if lag := sum(health.lag_events.values()):
        words.append(f"{lag} event{'s' if lag > 1 else ''} behind")
    if refused := len(health.refused):
        words.append(f"{refused} sweep{'s' if refused > 1 else ''} refused")
    return {"ok": True, "detail": ", ".join(words)}


class _Figures:
    """The service's state as `Metrics` asks for it."""

    def __init__(self, services: Services, listeners: int) -> None:
        self._services = services
        self._listeners = listeners

    def sweeps_by_state(self) -> dict[str, int]:
        return {str(state): num for state, num in self._services.queue.counts().items()}

    def gangs_held(self) -> int:
        return sum(record.gangs_held for record in self._services.queue.acting())

    def listeners(self) -> int:
        return self._listeners

    def pending_notices(self) -> int:
        return self._services.deliveries.num_waiting()

    def is_dispatcher_in_trouble(self) -> bool:
        dispatcher = self._services.dispatcher
        return dispatcher is not None and dispatcher.trouble is not None

    def last_tick_at(self) -> float | None:
        dispatcher = self._services.dispatcher
        return None if dispatcher is None else dispatcher.ticked_at

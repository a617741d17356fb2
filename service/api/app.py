"""The app: doors, errors and routes put together. What runs beside it is `lifespan`'s."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from service.api import (
    page,
    problems,
    routes_admin,
    routes_results,
    routes_sweeps,
    routes_views,
    stream,
)
from service.api.auth import Gatekeeper
from service.api.limits import Door, RateLimiter
from service.api.services import Services
from service.api.settings import Settings

PREFIX = "/api/v1"
# FastAPI's own spans and metrics, which an environment variable would send elsewhere.
_NO_TELEMETRY: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def make_app(settings: Settings, *, services: Services) -> FastAPI:
    """The app of one service; it starts nothing and stops nothing."""
    app = FastAPI(
        title="Fairway",
        summary="Sweeps for language models that must fit in a byte budget.",
        version=version("fairway"),
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        telemetry=_NO_TELEMETRY,
        redirect_slashes=False,
    )
    limiter = RateLimiter(settings.requests_per_second, settings.burst)
    app.state.services = services
    app.state.gatekeeper = Gatekeeper(services, limiter)
    app.add_middleware(
        Door,
        settings=settings,
        limiter=limiter,
        metrics=services.metrics,
        verify=services.tokens.verify,
    )
    problems.install(app)
    api = APIRouter(prefix=PREFIX, responses=problems.ANY_ROUTE)
    for routes in (routes_sweeps, routes_admin, routes_views, routes_results, stream):
        api.include_router(routes.router())
    api.include_router(routes_admin.probes())
    app.include_router(api)
    app.include_router(routes_admin.probes(), include_in_schema=False)  # where probes look
    app.include_router(page.router())
    app.openapi = lambda: _openapi(app)
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI with the shape of refusals, which no route returns as its own."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        shape = problems.Problem.model_json_schema()
        schema["components"]["schemas"]["Problem"] = shape
        app.openapi_schema = schema
    return app.openapi_schema

"""Refusals as problem+json (RFC 9457): one line that says what was found and what to do.

Nothing of the inside shows: no traceback, no path of the server that the caller did not give, no
secret. `instance` is the request's id, under which the log has the rest.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.api.planner import PlannerTrouble
from service.api.redaction import redact
from service.queue.records import Conflict, Forbidden, UnknownSweep
from trainer.errors import BackendError, DataError, FairwayError, InfeasibleError, UsageError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
INFEASIBLE = "urn:fairway:infeasible"
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}
MAX_DETAIL = 2_000  # characters
RETRY_S = 5
OUT_OF_REACH = "the database is out of reach; try again later"
_WORDS = {404: "there is nothing here", 405: "this cannot be asked for in this way"}


class Problem(BaseModel):
    """What was refused and why."""

    type: str
    title: str
    status: int
    detail: str
    instance: str


class Refusal(Exception):
    """An answer that a route gives instead of its own."""

    def __init__(
        self, status: int, detail: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers or {})


def problem(
    status: int,
    detail: str,
    *,
    request_id: str,
    kind: str = "about:blank",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer that refuses a request."""
    body = {
        "type": kind,
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": one_line(detail),
        "instance": f"urn:fairway:request:{request_id}",
    }
    return Response(json.dumps(body), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def one_line(text: str) -> str:
    """A text as one line of plain characters, without secrets; several lines are joined."""
    lines = "; ".join(line for line in redact(text).splitlines() if line.strip())
    shown = "".join(char if char.isprintable() else "?" for char in lines)
    return shown if len(shown) <= MAX_DETAIL else f"{shown[: MAX_DETAIL - 3]}..."


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the refusals that a route may answer with."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": PROBLEM_SCHEMA}},
        }
        for status in statuses
    }


ANY_ROUTE = documented(400, 401, 403, 413, 415, 422, 429, 500, 503)
"""The refusals that every route under /api/v1 may answer with."""


def status_of(error: FairwayError) -> int:
    """The status by which a known error is told."""
    known: Iterable[tuple[type[FairwayError], int]] = (
        (UnknownSweep, 404),
        (InfeasibleError, 404),
        (Conflict, 409),
        (Forbidden, 403),
        (DataError, 500),  # a file of ours is damaged: no fault of the caller's
        (UsageError, 422),
        (BackendError, 503),
    )
    return next((status for kind, status in known if isinstance(error, kind)), 500)


def install(app: FastAPI) -> None:
    """Let an app answer every error as a problem."""
    app.add_exception_handler(Refusal, _of_refusal)
    app.add_exception_handler(FairwayError, _of_fairway_error)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)


def request_id_of(request: Request) -> str:
    """The id under which the log has a request."""
    return request.scope.get("state", {}).get("request_id", "-")


def _of_refusal(request: Request, error: Exception) -> Response:
    refusal = cast(Refusal, error)
    return problem(
        refusal.status,
        str(refusal),
        request_id=request_id_of(request),
        headers=refusal.headers,
    )


def _of_fairway_error(request: Request, error: Exception) -> Response:
    status = status_of(cast(FairwayError, error))
    if isinstance(error, DataError):  # which file, as it is called within the home
        home = str(request.app.state.services.paths.home)
        text = str(error).replace(f"{home}/", "").replace(home, "HOME")
        return problem(status, text, request_id=request_id_of(request))
    if status == 500:
        return internal(request, error)
    detail = str(error)
    if isinstance(error, BackendError) and not isinstance(error, PlannerTrouble):
        # Its text has the database's address, and what the driver says of it.
        logger.warning("request %s: %s", request_id_of(request), detail)
        detail = OUT_OF_REACH
    return problem(
        status,
        detail,
        request_id=request_id_of(request),
        kind=INFEASIBLE if isinstance(error, InfeasibleError) else "about:blank",
        headers={"Retry-After": str(RETRY_S)} if status == 503 else {},
    )


def _of_http(request: Request, error: Exception) -> Response:
    found = cast(HTTPException, error)
    detail = _WORDS.get(found.status_code, str(found.detail))
    if found.status_code in _WORDS:
        detail = f"{request.method} {request.url.path}: {detail}; see /api/v1/openapi.json"
    return problem(
        found.status_code, detail, request_id=request_id_of(request), headers=found.headers
    )


def _of_validation(request: Request, error: Exception) -> Response:
    faults = cast(RequestValidationError, error).errors()
    if any(fault["type"] == "json_invalid" for fault in faults):
        detail, status = "the body is not JSON", 400
    else:
        detail, status = "; ".join(_fault(fault) for fault in faults[:5]), 422
    return problem(status, detail, request_id=request_id_of(request))


def _fault(fault: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    return f"{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def internal(request: Request, error: Exception) -> Response:
    """The answer to a fault of ours; the log has its traceback, under the request's id."""
    request_id = request_id_of(request)
    logger.error("request %s failed", request_id, exc_info=error)
    return problem(
        500,
        f"the service failed at this; its log tells more under {request_id}",
        request_id=request_id,
    )

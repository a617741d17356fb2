"""Submitting a sweep, asking what it would be, and the verbs."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.auth import Submitter, audited
from service.api.problems import documented
from service.api.services import SWEEP, In
from service.api.shapes import Checked, SweepDetail
from service.planning import MAX_ASSIGNMENTS, MAX_FILES, Submission
from service.queue.records import SweepRecord, UnknownSweep, User, Verb

MAX_PRIORITY = 1_000


class SubmissionBody(BaseModel):
    """A sweep file as text, the files that it names, and `-S` values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sweep: str = Field(description="The sweep file's YAML.")
    files: dict[str, str] = Field(
        default_factory=dict,
        max_length=MAX_FILES,
        description="YAML texts by file name: recipes, clock policies, baselines.",
    )
    assignments: list[str] = Field(
        default_factory=list,
        max_length=MAX_ASSIGNMENTS,
        description="Laid over the sweep one by one, `path=value` each.",
    )
    priority: int = Field(
        default=0,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="A higher one is started earlier; quotas say how high a user may go.",
    )

    def submission(self) -> Submission:
        return Submission(self.sweep, self.files, tuple(self.assignments))


Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key again returns what the first call did.",
    ),
]


def router() -> APIRouter:
    """The routes that change something."""
    routes = APIRouter(tags=["sweeps"])

    @routes.post(
        "/sweeps",
        response_model=SweepDetail,
        status_code=201,
        responses={
            200: {"model": SweepDetail, "description": "It was there; nothing changed, or it waits "
                  "again with what is new."},
            **documented(409),
        },
    )  # fmt: skip
    def submit(
        body: SubmissionBody,
        request: Request,
        response: Response,
        services: In,
        user: Submitter,
        key: Key = None,
    ) -> Any:
        """Queue a sweep; the same sweep again is found, not made."""
        submission = body.submission()
        with audited(services, request, user, "submit", "-") as entry:
            record, created = _known_by(key, user, submission, services), False
            if record is None:
                new = services.planner.accept(submission, body.priority)
                entry.subject = new.sweep_id
                record, created = services.queue.submit(new, user, key)
            entry.subject = record.sweep_id
        response.status_code = 201 if created else 200
        response.headers["Location"] = f"/api/v1/sweeps/{record.sweep_id}"
        return services.views.detail(record)

    @routes.post("/sweeps:validate", response_model=Checked)
    def validate(body: SubmissionBody, services: In, user: Submitter) -> Any:
        """Say what a submission would run and cost; nothing is queued."""
        planned = services.planner.plan(body.submission())
        return {
            "sweep_id": planned.sweep_id,
            "known": _is_known(services, planned.sweep_id),
            "plan": planned.plan,
            "usd": planned.usd,
        }

    for verb in Verb:
        routes.add_api_route(
            f"{SWEEP}:{verb}",
            _asks(verb),
            methods=["POST"],
            response_model=SweepDetail,
            responses=documented(404, 409),
            summary=f"{verb.capitalize()} a sweep",
            operation_id=f"{verb}_sweep",
        )
    return routes


def _known_by(
    key: str | None, user: User, submission: Submission, services: In
) -> SweepRecord | None:
    """What the same request came to before, which need not be planned again."""
    return None if key is None else services.queue.of_key(user.name, key, submission.digest)


def _is_known(services: In, sweep_id: str) -> bool:
    try:
        services.queue.get(sweep_id)
    except UnknownSweep:
        return False
    return True


def _asks(verb: Verb) -> Any:
    """The handler of one verb."""

    def ask(ref: str, request: Request, services: In, user: Submitter) -> Any:
        return _ask(verb, ref, request, services, user)

    ask.__doc__ = {
        Verb.PAUSE: "Stop its trainings at a checkpoint and free its gangs; it keeps its place.",
        Verb.RESUME: "Queue it again; it goes on from what is finished.",
        Verb.STOP: "Start nothing more; what runs finishes.",
        Verb.CANCEL: "End it at once; what is finished is kept.",
    }[verb]
    return ask


def _ask(verb: Verb, ref: str, request: Request, services: In, user: User) -> Any:
    with audited(services, request, user, str(verb), ref[:200]) as entry:
        record = services.queue.find(ref)
        entry.subject = record.sweep_id
        asked = services.queue.ask(record.sweep_id, verb, user)
    return services.views.detail(asked)

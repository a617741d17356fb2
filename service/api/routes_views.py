"""Reading sweeps: the list, one, and what its ledger tells of its stages."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic_core import to_json

from service.api import documents
from service.api.auth import Reader
from service.api.documents import page_of, sweep_document
from service.api.problems import documented
from service.api.services import SWEEP, In, Services
from service.api.shapes import FinalPage, Pareto, SweepDetail, SweepPage, TrainingPage, Tree
from service.api.views import Question, T
from service.queue.records import SweepRecord
from service.states import State

Limit = Annotated[int, Query(ge=1, le=200, description="Items of one page.")]
Cursor = Annotated[str | None, Query(max_length=512, description="`next_cursor` of a page.")]
States = Annotated[list[State], Query(alias="state", description="Only these; repeatable.")]
Word = Annotated[str | None, Query(max_length=200)]


def router() -> APIRouter:
    """The routes that read sweeps and stages."""
    routes = APIRouter(tags=["sweeps"])
    _add_sweeps(routes)
    _add_stages(routes)
    return routes


def _add_sweeps(routes: APIRouter) -> None:
    @routes.get("/sweeps", response_model=SweepPage)
    def sweeps(
        services: In,
        user: Reader,
        limit: Limit = 50,
        cursor: Cursor = None,
        state: States = [],  # noqa: B006 - FastAPI reads it, nobody writes it
        owner: Word = None,
        name: Word = None,
    ) -> Any:
        """List sweeps, the newest first."""

        def make() -> bytes:
            page = services.queue.page(
                limit=limit, cursor=cursor, states=state, owner=owner, name=name
            )
            items = [sweep_document(record) for record in page.items]
            return to_json({"items": items, "next_cursor": page.next_cursor})

        asked = (limit, cursor, tuple(state), owner, name)
        return _sent(services.views.listed(asked, services.queue.last_event_id(), make))

    @routes.get(SWEEP, response_model=SweepDetail, responses=documented(404))
    def sweep(ref: str, services: In, user: Reader) -> Any:
        """Show one sweep, by its id, a unique start of it, or its name (the newest)."""
        return _sent(to_json(services.views.detail(services.queue.find(ref))))


def _add_stages(routes: APIRouter) -> None:
    @routes.get(f"{SWEEP}/trainings", response_model=TrainingPage, responses=documented(404))
    def trainings(
        ref: str,
        services: In,
        user: Reader,
        limit: Limit = 50,
        cursor: Cursor = None,
        state: States = [],  # noqa: B006
    ) -> Any:
        """List a sweep's trainings, in the order in which they began."""
        record, rows = _told(services, ref, documents.training_documents)
        if not documents.is_live(record):
            rows = documents.without_runners(rows)
        return _sent(to_json(page_of(rows, "id", limit, cursor, state)))

    @routes.get(f"{SWEEP}/finals", response_model=FinalPage, responses=documented(404))
    def finals(
        ref: str,
        services: In,
        user: Reader,
        limit: Limit = 50,
        cursor: Cursor = None,
        state: States = [],  # noqa: B006
    ) -> Any:
        """List a sweep's finals, the best first."""
        _, rows = _told(services, ref, documents.final_documents)
        return _sent(to_json(page_of(rows, "final", limit, cursor, state)))

    @routes.get(f"{SWEEP}/tree", response_model=Tree, responses=documented(404))
    def tree(ref: str, services: In, user: Reader) -> Any:
        """Show a sweep's stages: which trainings share their beginnings, and what came of each."""
        record, found = _told(services, ref, documents.tree_document)
        if not documents.is_live(record):
            found = {**found, "trainings": documents.without_runners(found["trainings"])}
        return _sent(to_json(found))

    @routes.get(f"{SWEEP}/pareto", response_model=Pareto, responses=documented(404))
    def pareto(ref: str, services: In, user: Reader) -> Any:
        """Show a sweep's scored finals in bytes and bits per byte."""
        _, found = _told(services, ref, documents.pareto_document)
        return _sent(to_json(found))


def _sent(document: bytes) -> Response:
    """An answer as it stands: its shape is held by the tests, not checked anew for each reader."""
    return Response(document, media_type="application/json")


def _told(services: Services, ref: str, question: Question[T]) -> tuple[SweepRecord, T]:
    record = services.queue.find(ref)
    return record, services.views.ask(record.sweep_id, question)

"""What a sweep came to: its best final, report, spec, logs, and how sweeps compare."""

from typing import Annotated, Any

from anyio import CapacityLimiter, WouldBlock, to_thread
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.auth import Reader
from service.api.logs import read_piece
from service.api.problems import Refusal, documented
from service.api.services import SWEEP, In
from service.api.shapes import Comparison, Document, LogText
from service.ledger import SweepView
from service.report import best_document
from service.sides import compare_sides

MAX_SIDES = 8
COMPARE_RETRY_S = 2
MAX_PIECE = 65_536  # bytes of a log
MIN_PIECE = 16  # no character is longer
MAX_OFFSET = 2**53  # what a number in JSON can be
DRIVER = "driver"
# A page that is drawn from results may run its own scripts and reach nothing, our token least.
_ALONE = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

Side = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._-]+$")]


class Sides(BaseModel):
    """Sweeps, finals (by their ids) or shipped baselines; the first is what the others are held
    against. Files are not taken."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sides: list[Side] = Field(min_length=2, max_length=MAX_SIDES)


def router() -> APIRouter:
    """The routes that read results."""
    routes = APIRouter(tags=["results"])
    _add_results(routes)
    _add_texts(routes)
    return routes


def _add_results(routes: APIRouter) -> None:
    @routes.get(f"{SWEEP}/best", response_model=Document, responses=documented(404))
    def best(ref: str, services: In, user: Reader) -> Any:
        """Name the best final that is feasible and legal; a 404 of the type
        urn:fairway:infeasible says why there is none. The artifact's path is below the home."""
        record = services.queue.find(ref)
        run_ids = services.views.tracking(record.sweep_id).get("run_ids", {})
        tail = services.tails.of(record.sweep_id)
        return tail.ask(lambda view: best_document(view, run_ids))

    # It may read every ledger of the home: one at a time, and nobody waits in a queue of them.
    comparing = CapacityLimiter(1)

    @routes.post("/compare", response_model=Comparison)
    async def compare(sides: Sides, services: In, user: Reader) -> Any:
        """Hold results against the first of them: mean, spread, gain, interval and p."""
        for side in sides.sides:
            if side.endswith((".yaml", ".yml")):
                raise Refusal(422, f"sides: {side!r} is a file; name what the service has")
        try:
            comparing.acquire_nowait()
        except WouldBlock:
            raise Refusal(
                503,
                "another comparison is being worked out; try again in a moment",
                headers={"Retry-After": str(COMPARE_RETRY_S)},
            ) from None
        try:
            return await to_thread.run_sync(compare_sides, services.paths, sides.sides)
        finally:
            comparing.release()


def _add_texts(routes: APIRouter) -> None:
    # Drawing takes seconds: who waits for it must not hold the threads that others are served by.
    drawing = CapacityLimiter(1)

    @routes.get(f"{SWEEP}/report", response_class=Response, responses=_shown("text/html", "string"))
    async def report(ref: str, services: In, user: Reader) -> Response:
        """Draw the report: one HTML file that needs nothing else."""
        record = await to_thread.run_sync(services.queue.find, ref)
        page = await to_thread.run_sync(services.views.page, record, limiter=drawing)
        headers = {"Content-Security-Policy": _ALONE, "Cache-Control": "private, no-cache"}
        return Response(page, media_type="text/html", headers=headers)

    @routes.get(
        f"{SWEEP}/spec", response_class=Response, responses=_shown("application/yaml", "object")
    )
    def spec(ref: str, services: In, user: Reader) -> Response:
        """Show the sweep file: as it is run, and before it starts as it was submitted."""
        record = services.queue.find(ref)
        files = [
            services.paths.sweep(record.sweep_id).spec,
            services.paths.submissions / record.bundle / "sweep.yaml",
        ]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise Refusal(404, f"{record.sweep_id}: its submission is not in the home any more")
        return Response(found.read_bytes(), media_type="application/yaml")

    @routes.get(f"{SWEEP}/logs", response_model=LogText, responses=documented(404))
    def logs(
        ref: str,
        services: In,
        user: Reader,
        source: Annotated[
            str, Query(max_length=100, description="`driver`, or a training's id: its curve.")
        ] = DRIVER,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET, description="In bytes.")] = 0,
        limit: Annotated[int, Query(ge=MIN_PIECE, le=MAX_PIECE, description="Bytes.")] = MAX_PIECE,
    ) -> Any:
        """Read a piece of a log; ask again from `next_offset` until `is_over`."""
        record = services.queue.find(ref)
        path = services.paths.sweep(record.sweep_id).logs / "driver.log"
        if source != DRIVER:
            if not services.tails.of(record.sweep_id).ask(lambda view: _has_begun(view, source)):
                raise Refusal(404, f"source: {source!r} is neither {DRIVER} nor a training of it")
            path = services.paths.store / "trainings" / source / "metrics.jsonl"
        return read_piece(path, offset, limit, is_ended=record.state.is_final())


def _shown(media_type: str, kind: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": {"type": kind}}}
    return {200: {"description": "As it is.", "content": content}, **documented(404)}


def _has_begun(view: SweepView, training: str) -> bool:
    return training in view.trainings or training in view.begun

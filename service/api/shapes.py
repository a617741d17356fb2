"""The shapes of the API's answers, as OpenAPI publishes them.

Times are Unix seconds, durations seconds, sizes bytes, scores bits per byte. A worker-second is a
second of one worker of a stage, what budgets count; a GPU-second counts its GPUs. A point is the
values of the knobs that a sweep varies, by their paths.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.queue.records import Role, Want
from service.states import State

Point = dict[str, Any]
Document = dict[str, Any]
"""What the command line prints with `-o json`, shape and all."""
Count = Annotated[int, Field(ge=0)]
Cursor = Annotated[
    str | None, Field(description="Where the next page begins; null after the last.")
]


class Shape(BaseModel):
    """Nothing is converted and nothing is left over: what does not fit is a bug."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Progress(Shape):
    """How many stages a sweep has and how many have come through; totals are those planned."""

    trainings_total: Count
    trainings_done: Count
    finals_total: Count
    finals_done: Count


class Best(Shape):
    """The best final so far that is feasible and legal."""

    final: str
    val_bpb: float
    artifact_bytes: int


class Sweep(Shape):
    """A sweep in the list."""

    id: str
    name: str
    recipe: str
    owner: str
    priority: int
    state: State
    reason: str | None = Field(description="Why it waits, or ended as it did.")
    want: Want = Field(description="What it has been told and has not obeyed yet.")
    attempt: Count = Field(description="How often it was started; 0: not yet.")
    gangs: Count = Field(description="Gangs that it asks for.")
    gangs_held: Count = Field(description="Gangs that it holds now.")
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    progress: Progress
    best: Best | None
    cap_bytes: int | None
    worker_seconds: float
    gpu_seconds: float


class SweepPage(Shape):
    """Sweeps, the newest first."""

    items: list[Sweep]
    next_cursor: Cursor


class BudgetUse(Shape):
    """What a sweep may spend and has spent, in worker-seconds."""

    limit_worker_s: float
    spent_worker_s: float


class Links(Shape):
    """Where MLflow shows the sweep, as charts and as a table."""

    mlflow: str | None
    mlflow_table: str | None


class SweepDetail(Sweep):
    """One sweep."""

    plan: Document = Field(description="What it runs and costs, as `fairway validate` prints it.")
    status: Document | None = Field(
        description="What came out so far, as `fairway status` prints it; null before it starts."
    )
    axes: dict[str, str] = Field(description="What varies, and the phase in which it acts.")
    varying: list[str] = Field(description="The paths that vary, in the sweep's order.")
    budget: BudgetUse | None = Field(description="Null where it has no limit, or has not started.")
    waiting: str | None = Field(description="What it waits for.")
    links: Links


class Training(Shape):
    """A training. `branch`: the state of a trunk that it started from, null from step 0."""

    id: str
    point: Point
    seed: int
    phase: str = Field(description="search or confirm")
    state: State
    reason: str | None
    steps: int | None = Field(description="Taken so far, as far as is known.")
    val_bpb: float | None = Field(description="By the training's own validation at its end.")
    occupied_s: float = Field(description="How long it held its workers.")
    branch: str | None
    cached: bool


class TrainingPage(Shape):
    """Trainings, in the order in which they began."""

    items: list[Training]
    next_cursor: Cursor


class Final(Shape):
    """An artifact and its score on validation; measurements are null where it failed."""

    final: str
    training: str
    seed: int
    state: State
    reason: str | None
    val_bpb: float | None
    artifact_bytes: int | None
    overshoot_bytes: int | None = Field(description="Over the cap; negative: bytes to spare.")
    entry: str | None = Field(description="The weights of the bank that it was made from.")
    eval_clock_s: float | None
    point: Point


class FinalPage(Shape):
    """Finals, the best first."""

    items: list[Final]
    next_cursor: Cursor


class TrunkNode(Shape):
    """A beginning that trainings share. `branch`: the trunk that it leaves, null from step 0;
    `states`: what trainings and other trunks start from."""

    id: str
    state: State
    branch: str | None
    states: list[str]
    steps: int = Field(description="Computed by this sweep, 0 where they were there.")


class TrainingNode(Shape):
    """A training and how many of its finals stand where. `branch`: the trunk that it leaves; null
    from step 0, and while that trunk has not left all of its states."""

    id: str
    label: str
    state: State
    branch: str | None
    finals: dict[State, int]


class Totals(Shape):
    """Stages by how they stand, as `fairway status` counts them."""

    trunks: dict[str, int]
    trainings: dict[str, int]
    finals: dict[str, int]


class Tree(Shape):
    """The stages of a sweep: trunks, the trainings that go on from their states, finals."""

    trunks: list[TrunkNode]
    trainings: list[TrainingNode]
    totals: Totals


class ParetoPoint(Shape):
    """A scored final; on the front, no other is both smaller and better."""

    final: str
    val_bpb: float
    artifact_bytes: int
    state: State
    point: Point
    is_front: bool


class Pareto(Shape):
    """Every scored final in bytes and bpb, with those that are infeasible or illegal."""

    cap_bytes: int | None
    points: list[ParetoPoint]


class LogText(Shape):
    """A piece of a log. Ask on from `next_offset` (bytes); `is_over`: nothing more will come."""

    text: str
    next_offset: Count
    is_over: bool


class Comparison(Shape):
    """What `fairway compare -o json` prints."""

    sides: list[Document]
    contrasts: list[Document]


class Me(Shape):
    """Who the caller is. `is_open`: the service asks nobody for a token."""

    user: str
    role: Role
    is_open: bool


class Checked(Shape):
    """What a submission would run. `usd`: null where no price is named."""

    sweep_id: str
    known: bool
    plan: Document
    usd: float | None


class QuotaUse(Shape):
    """What a user may hold and spend, and holds and has spent; null is no limit."""

    user: str
    max_gangs: int | None
    gpu_hours: float | None
    window_days: float
    gangs_held: Count
    gpu_hours_used: float


class Part(Shape):
    """Whether a part that the service needs is there."""

    ok: bool
    detail: str


class Ready(Shape):
    """What the service needs, part by part."""

    database: Part
    jobs: Part
    tracking: Part


class Alive(Shape):
    """The process answers."""

    status: Literal["ok"]

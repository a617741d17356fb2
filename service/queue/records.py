"""What the queue holds, as plain values. Times are Unix seconds."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from service.states import State
from trainer.errors import FairwayError, UsageError


class Role(StrEnum):
    """What a token's owner may do; each may also do what those before it may."""

    READER = "reader"
    SUBMITTER = "submitter"
    """Submits sweeps and controls their own."""
    ADMIN = "admin"
    """Controls every sweep."""

    def includes(self, other: "Role") -> bool:
        """Whether this role may do what `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


class Verb(StrEnum):
    """What can be asked of a sweep."""

    PAUSE = "pause"
    """Stop trainings at a checkpoint, free the gangs, keep the place in the queue."""
    RESUME = "resume"
    STOP = "stop"
    """Let what runs finish, start nothing more."""
    CANCEL = "cancel"
    """End at once; what is finished is kept."""


class Want(StrEnum):
    """What an active sweep has been told; the job obeys, the dispatcher waits for it."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class User:
    """Who calls."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class NewSweep:
    """A checked submission. `bundle` is the folder under HOME/submissions that holds sweep.yaml
    and the files it names; `assignments` are its `-S` values; `gangs` is how many it asks for."""

    sweep_id: str
    name: str
    recipe: str
    bundle: str
    assignments: tuple[str, ...]
    digest: str
    """sha256 over sweep.yaml, files and assignments: the same request, byte for byte."""
    plan: dict[str, Any]
    gangs: int = 1
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """How far a sweep is, as its ledger told last. Counts are those of `status_document`."""

    trainings_total: int = 0
    trainings_done: int = 0
    finals_total: int = 0
    finals_done: int = 0
    num_events: int = 0
    best_final: str | None = None
    best_bpb: float | None = None
    best_bytes: int | None = None
    cap_bytes: int | None = None
    worker_seconds: float = 0.0
    gpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """A row of the queue. `seq` is its place by submission; attempt 0 has never been started.

    Lists are read without plans: `plan` is empty there, and whole in what `submit`, `get`, `find`
    and `ask` return.
    """

    seq: int
    sweep_id: str
    name: str
    recipe: str
    owner: str
    priority: int
    gangs: int
    """Asked for; `gangs_held` is what the running attempt was given."""
    bundle: str
    assignments: tuple[str, ...]
    digest: str
    plan: dict[str, Any]
    state: State
    reason: str | None
    want: Want
    wanted_by: str | None
    attempt: int
    restarts: int
    """How often it was started again after its job was lost, since somebody last asked for it
    or a stage of it finished."""
    gangs_held: int
    submitted_at: float
    started_at: float | None
    """When its first attempt started."""
    ended_at: float | None
    """When it ended; None again once it is resumed."""
    summary: Summary = field(default_factory=Summary)


@dataclass(frozen=True, slots=True)
class QueueEvent:
    """One change of one sweep in the queue; `id` counts up over all sweeps without end."""

    id: int
    at: float
    sweep_id: str
    event: str
    """submitted, changed (of state or reason), asked (a verb), summary."""
    by: str | None
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quota:
    """What a user may hold and spend; None is no limit. GPU-hours count workers, as budgets do,
    over the last `window_days`, by the hour in which the queue learned of them."""

    user: str
    max_gangs: int | None = None
    gpu_hours: float | None = None
    window_days: float = 30.0
    max_priority: int = 10


@dataclass(frozen=True, slots=True)
class Page:
    """Some sweeps, the newest first, and where the next page begins; None after the last."""

    items: tuple[SweepRecord, ...]
    next_cursor: str | None


class UnknownSweep(UsageError):
    """No sweep of the queue has this id."""


class Conflict(FairwayError):
    """What was asked does not go with the state of things; nothing was changed."""

    exit_code = 2


class Forbidden(FairwayError):
    """The caller is known and may not do this."""

    exit_code = 2

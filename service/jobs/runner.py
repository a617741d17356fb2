"""What runs a sweep's job: a process that outlives the service and is found again by its id."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from service.paths import Paths, SweepPaths

Phase = Literal["absent", "running", "ended"]
STOP_S = 20.0
"""Between the request to end and the kill."""


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt at a sweep. `home` and `bundle` are absolute; the assignments are `-S` values."""

    sweep_id: str
    attempt: int
    home: Path
    bundle: Path
    assignments: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The same for the same attempt, whoever asks: what makes starting it again harmless."""
        return f"{self.sweep_id}.{self.attempt}"

    @property
    def sweep(self) -> SweepPaths:
        return Paths(self.home).sweep(self.sweep_id)

    @property
    def log(self) -> Path:
        """What all attempts have said, one after the other."""
        return self.sweep.logs / "driver.log"


@dataclass(frozen=True, slots=True)
class JobState:
    """Where a job stands. `absent`: it has never begun, and may yet be started."""

    phase: Phase
    exit_code: int | None = None
    """None of an ended job: it was killed, or its node is gone."""
    message: str = ""


class Runner(Protocol):
    """Where jobs run. BackendError from any method: it is out of reach, and nothing is known."""

    name: str

    def check(self) -> None:
        """BackendError when out of reach."""
        ...

    def start(self, job: Job) -> None:
        """Start a job, unless one of this id runs or has run."""
        ...

    def state(self, job: Job) -> JobState:
        """Where a job stands, whichever service started it."""
        ...

    def stop(self, job: Job) -> None:
        """Ask a job to end, and kill it after `STOP_S`; returns at once. One that has not begun
        never will."""
        ...

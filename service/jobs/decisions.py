"""What becomes of a sweep that has been started, from what is seen of it. Pure."""

from dataclasses import dataclass
from typing import Any, Literal

from service.control import PAST
from service.jobs.runner import JobState
from service.ledger import SweepView
from service.queue.records import Summary, SweepRecord, Want
from service.report import status_document
from service.states import State

MAX_RESTARTS = 2
"""After so many losses in a row somebody has to look at it."""
_RESULTS = (State.SUCCEEDED, State.INFEASIBLE, State.ILLEGAL, State.FAILED)
_AS_WANTED = {
    Want.PAUSE: State.PAUSED,
    Want.STOP: State.STOPPED,
    Want.CANCEL: State.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Progress:
    """What one attempt has written into the ledger, and how far the sweep is by it."""

    num_events: int = 0
    ended_as: State | None = None
    reason: str | None = None
    """Why it ended, as the ledger says it."""
    waits_for: str | None = None
    is_finalizing: bool = False


@dataclass(frozen=True, slots=True)
class Sight:
    """All that is known of a sweep under way. `fault`: why its ledger cannot be read;
    `last_words`: the last line of its log; `is_overdue`: it should have ended some time ago."""

    record: SweepRecord
    job: JobState
    progress: Progress
    fault: str | None = None
    last_words: str = ""
    is_overdue: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The state that the queue shall tell, and what to do to the job."""

    state: State
    reason: str | None = None
    does: Literal["nothing", "start", "stop"] = "nothing"


def decide(sight: Sight) -> Decision:
    """Say where a sweep stands and what is to be done."""
    record, job = sight.record, sight.job
    if job.phase == "ended":
        return _after_its_end(sight)
    if job.phase == "absent":  # claimed, and we or the job were killed before it began
        does = "start" if record.want == Want.RUN else "stop"
        return Decision(record.state, record.reason, does)
    does = "stop" if sight.is_overdue else "nothing"
    if sight.fault is not None:
        return Decision(record.state, sight.fault, does)
    progress = sight.progress
    if progress.ended_as is not None:  # it has still to draw the report and to let go of Ray
        return Decision(record.state, record.reason, does)
    if progress.waits_for is not None:
        return Decision(State.WAITING, progress.waits_for, does)
    if progress.num_events == 0:
        return Decision(State.STARTING, None, does)
    return Decision(State.FINALIZING if progress.is_finalizing else State.RUNNING, None, does)


def _after_its_end(sight: Sight) -> Decision:
    record, progress = sight.record, sight.progress
    wanted = _AS_WANTED.get(record.want)
    ended_as, reason = progress.ended_as, progress.reason or ""
    if ended_as is not None and ended_as in _RESULTS:
        return Decision(ended_as, progress.reason)
    if sight.fault is not None:
        return Decision(State.FAILED, sight.fault)
    is_ordered = reason.startswith(tuple(f"{word} by " for word in PAST.values()))
    if ended_as == State.STOPPED and not is_ordered:
        return Decision(State.STOPPED, progress.reason)  # its budget, whoever wanted what besides
    if ended_as is None and sight.job.exit_code == 2 and wanted != State.CANCELLED:
        return Decision(State.FAILED, sight.last_words or sight.job.message)
    if wanted is not None:
        return Decision(wanted, f"{wanted} by {record.wanted_by}")
    if ended_as is not None and is_ordered:
        # Nobody wants the pause any more: it was resumed while the job was still pausing.
        resumed = reason.startswith(f"{PAST['pause']} by ")
        return Decision(State.QUEUED) if resumed else Decision(ended_as, progress.reason)
    return _after_a_loss(sight)


def _after_a_loss(sight: Sight) -> Decision:
    """It ended without a word, or was interrupted by somebody who is not the service."""
    record, why = sight.record, sight.progress.reason or sight.job.message
    if record.restarts < MAX_RESTARTS:
        return Decision(
            State.QUEUED,
            f"its job was lost ({why}); restart {record.restarts + 1} of {MAX_RESTARTS}",
        )
    return Decision(
        State.LOST,
        f"its job was lost {record.restarts + 1} times, last: {why}; see its log, then resume it",
    )


def progress_of(view: SweepView, events: list[dict[str, Any]]) -> Progress:
    """How far a sweep is: `events` are those of this attempt, the view is of all attempts."""
    if not events:
        return Progress()
    last = events[-1]
    if last["event"] == "sweep_finished":
        return Progress(len(events), State(last["state"]), last.get("reason"))
    planned = view.started.get("num_trainings", 0)
    return Progress(
        num_events=len(events),
        waits_for=last["reason"] if last["event"] == "waiting" else None,
        # A confirmation that trains is running again.
        is_finalizing=len(view.trainings) >= planned > 0 and not view.running,
    )


def summary_of(view: SweepView) -> Summary:
    """The figures of a sweep that a list of sweeps shows."""
    status = status_document(view)
    best = status["best"] or {}
    return Summary(
        trainings_total=status["trainings"]["total"],
        trainings_done=status["trainings"]["done"],
        finals_total=status["finals"]["total"],
        finals_done=status["finals"]["done"],
        num_events=view.events,
        best_final=best.get("final"),
        best_bpb=best.get("val_bpb"),
        best_bytes=best.get("artifact_bytes"),
        cap_bytes=view.started.get("cap_bytes"),
        worker_seconds=status["worker_seconds"],
        gpu_seconds=status["gpu_seconds"],
    )

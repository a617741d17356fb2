"""What a sweep of the queue becomes when somebody asks something of it or its job gets on: pure.

A sweep that holds gangs has a job under way, and what is asked of it is only noted (`want`) until
the job has obeyed. Any other sweep obeys at once.

    queued ⇄ waiting ─ claim → starting → running → finalizing → succeeded, infeasible, ...
       ↑  ⇅ pause, resume        └───┬──── pause, stop, cancel, loss ────┘
       │  paused  ←──────────────────┤
       └─────────── resume ←─ stopped, cancelled, failed, lost
"""

from collections.abc import Mapping
from typing import Any

from service.queue.records import Conflict, Summary, SweepRecord, Verb, Want
from service.states import ACTS, WAITS, State

Changes = Mapping[str, Any]
"""Fields of a SweepRecord and their new values."""

_ENDS = {Verb.PAUSE: State.PAUSED, Verb.STOP: State.STOPPED, Verb.CANCEL: State.CANCELLED}
_WANTS = {Verb.PAUSE: Want.PAUSE, Verb.STOP: Want.STOP, Verb.CANCEL: Want.CANCEL}
_LANDINGS = {
    Want.PAUSE: State.PAUSED,
    Want.STOP: State.STOPPED,
    Want.CANCEL: State.CANCELLED,
}


def is_acting(record: SweepRecord) -> bool:
    """Whether an attempt is under way, by what the queue knows."""
    return record.gangs_held > 0


def asked(record: SweepRecord, verb: Verb, by: str, now: float) -> Changes:
    """What `verb` makes of the sweep; nothing where it is so already. Conflict where it makes no
    sense: of a sweep that has succeeded, or less than was asked before."""
    if verb == Verb.RESUME:
        return _resumed(record, by)
    goal = _ENDS[verb]
    if is_acting(record):
        want = _WANTS[verb]
        if record.want == want:
            return {}
        if list(Want).index(record.want) > list(Want).index(want):
            raise Conflict(
                f"{record.sweep_id} has been told to {record.want} by {record.wanted_by}; "
                f"that cannot be lowered to {verb}"
            )
        return {"want": want, "wanted_by": by}
    if record.state == goal:
        return {}
    if record.state.is_final():
        raise Conflict(f"{record.sweep_id} has ended already: {record.state}")
    return _at_rest(goal, f"{goal} by {by}", now)


def _resumed(record: SweepRecord, by: str) -> Changes:
    if is_acting(record):
        if record.want == Want.RUN:
            return {}
        if record.want == Want.PAUSE:
            return {"want": Want.RUN, "wanted_by": by}
        raise Conflict(
            f"{record.sweep_id} has been told to {record.want} by {record.wanted_by}; "
            "resume it once it has ended"
        )
    if record.state in WAITS:
        return {}
    if record.state == State.SUCCEEDED:
        raise Conflict(f"{record.sweep_id} has succeeded; there is nothing left to do")
    return requeued()


def requeued() -> Changes:
    """The sweep waits for its turn as if it had never been started."""
    return {
        "state": State.QUEUED,
        "reason": None,
        "want": Want.RUN,
        "wanted_by": None,
        "restarts": 0,
        "gangs_held": 0,
        "ended_at": None,
    }


def has_got_on(before: Summary, after: Summary) -> bool:
    """Whether stages have finished between the two: what is lost then is not lost in a row."""
    done = after.trainings_done + after.finals_done
    return done > before.trainings_done + before.finals_done


def claimed(record: SweepRecord, gangs: int, now: float) -> Changes:
    """A new attempt, with so many gangs."""
    return {
        "state": State.STARTING,
        "reason": None,
        "want": Want.RUN,
        "wanted_by": None,
        "attempt": record.attempt + 1,
        "gangs_held": gangs,
        "started_at": now if record.started_at is None else record.started_at,
        "ended_at": None,
    }


def may_advance(seen: SweepRecord, record: SweepRecord, state: State) -> bool:
    """Whether a sweep that is `record` now may become what was decided when it was `seen` in the
    same attempt. Not once it rests (paused, ended) or waits again, and what holds no gangs cannot
    run."""
    if is_acting(seen) != is_acting(record):
        return False
    if is_acting(record):
        return True
    return record.state in WAITS and state not in ACTS


def advanced(record: SweepRecord, state: State, reason: str | None, now: float) -> Changes:
    """What the sweep becomes when its job, or the wait for one, has come to `state`.

    What was asked meanwhile is kept: a job lost while it should pause leaves a paused sweep, one
    that has paused and should go on by now is queued.
    """
    if not is_acting(record):
        if state in WAITS:
            return {"state": state, "reason": reason}
        return _at_rest(state, reason, now)
    if state in (State.QUEUED, State.PAUSED):
        state, reason = _landing(record, state, reason)
    if state == State.QUEUED:
        # Whoever resumed it while it paused has asked for the next start; a loss has not been.
        is_loss = record.want == Want.RUN and record.wanted_by is None
        restarts = record.restarts + is_loss
        return {**requeued(), "reason": reason, "restarts": restarts}
    if state == State.PAUSED or state.is_final():
        return _at_rest(state, reason, now)
    return {"state": state, "reason": reason}


def _landing(record: SweepRecord, state: State, reason: str | None) -> tuple[State, str | None]:
    if record.want == Want.RUN:
        was_resumed = record.wanted_by is not None
        return (State.QUEUED, None) if was_resumed else (state, reason)
    landing = _LANDINGS[record.want]
    return landing, f"{landing} by {record.wanted_by}"


def _at_rest(state: State, reason: str | None, now: float) -> Changes:
    return {
        "state": state,
        "reason": reason,
        "want": Want.RUN,
        "wanted_by": None,
        "gangs_held": 0,
        "ended_at": now if state.is_final() else None,
    }

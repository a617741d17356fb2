"""The states of a stage and of a sweep."""

from enum import StrEnum


class State(StrEnum):
    """Where a training, a final or a sweep stands."""

    QUEUED = "queued"
    WAITING = "waiting"
    """Queued, with the reason why it cannot start yet; or started, and its gang has no place."""
    STARTING = "starting"
    RUNNING = "running"
    FINALIZING = "finalizing"
    """Every training has ended, finals are under way."""
    PAUSED = "paused"
    """Not running, on somebody's word; resuming goes on where it stopped."""
    SUCCEEDED = "succeeded"
    INFEASIBLE = "infeasible"
    """Finished, but over a byte or value limit of the sweep: visible, never best."""
    ILLEGAL = "illegal"
    """Finished, but over a clock or against an audit rule: visible, never best."""
    STOPPED = "stopped"
    """Ended early on purpose, with the reason: a training that a rung or the budget stopped, a
    final that was ranked on held-out shards and not among those scored on validation."""
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"
    """A sweep whose driver is gone before its end; the same command goes on."""

    def is_final(self) -> bool:
        """Whether nothing more happens to what is in this state by itself."""
        return self not in (*WAITS, *ACTS, State.PAUSED)


WAITS = (State.QUEUED, State.WAITING)
ACTS = (State.STARTING, State.RUNNING, State.FINALIZING)

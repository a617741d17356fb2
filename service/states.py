"""The states of a stage and of a sweep."""

from enum import StrEnum


class State(StrEnum):
    """Where a training, a final or a sweep stands."""

    QUEUED = "queued"
    RUNNING = "running"
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
        """Whether nothing more happens to a stage in this state."""
        return self not in (State.QUEUED, State.RUNNING)

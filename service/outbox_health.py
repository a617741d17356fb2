"""How the projection into MLflow stands, as the outbox wrote it down; for whoever only asks."""

from dataclasses import dataclass, field

from service.paths import Paths
from trainer.errors import DataError
from trainer.runtime.files import read_json


@dataclass(frozen=True, slots=True)
class OutboxHealth:
    """How the projection stands; times are Unix seconds."""

    at: float
    uri: str = ""
    """Without user and password."""
    last_success_at: float | None = None
    """When MLflow last took something."""
    last_error: str | None = None
    last_error_at: float | None = None
    out_of_reach_since: float | None = None
    """Set while MLflow does not answer."""
    lag_events: dict[str, int] = field(default_factory=dict[str, int])
    """Events that are not in MLflow yet, of each sweep that has such."""
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """Why a sweep is not projected though MLflow answers, by sweep."""

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written now; None while all is well."""
        return None if self.out_of_reach_since is None else self.last_error


def read_health(paths: Paths) -> OutboxHealth | None:
    """What the outbox said of itself last; None before it said anything, or in an older form."""
    try:
        return OutboxHealth(**read_json(paths.outbox))
    except (DataError, TypeError):
        return None

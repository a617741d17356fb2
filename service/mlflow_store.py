"""Reaching MLflow: errors in one line, a SQLite store made by one process, the experiment.

Knows nothing of sweeps' ledgers. MLflow takes seconds to import, so functions import it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.paths import Paths
from trainer.errors import BackendError
from trainer.runtime.files import locked

# The page of an experiment opens for training runs, not for traces.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# Error codes of a server that may answer later; anything else is a refusal.
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")


class Unreachable(BackendError):
    """The server does not answer, or not now; it may be back later."""


@contextmanager
def talking(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into one line of BackendError."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in _PASSING:
            raise Unreachable(_explain(uri, error)) from error
        raise BackendError(_explain(uri, error)) from error
    except (requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise Unreachable(_explain(uri, error)) from error


def _explain(uri: str, error: Exception) -> str:
    place = without_credentials(uri)
    reason = (str(error).splitlines() or [type(error).__name__])[0].replace(uri, place)
    fix = "check the file and its disk" if is_embedded(uri) else "check the server"
    return f"{place}: {reason[:300]}; {fix}, then sync the sweep: nothing is lost"


def without_credentials(uri: str) -> str:
    """Cut user and password out of a URI: exceptions and links show it."""
    return re.sub(r"//[^/@]*@", "//", uri)


def is_embedded(uri: str) -> bool:
    """Whether the store is a SQLite file that no server stands before."""
    return uri.startswith("sqlite:")


def connect(paths: Paths, uri: str) -> Any:
    """Open a client, making a new SQLite file first."""
    from mlflow import MlflowClient

    with talking(uri):
        if is_embedded(uri):
            _make_database(Path(uri.partition(":///")[2]))
        return MlflowClient(uri)


def _make_database(database: Path) -> None:
    """Create the file whole or not at all, by one process.

    Several at once destroy it, and one that is killed over its schema leaves a file that every
    later MLflow refuses.
    """
    from mlflow import MlflowClient

    with locked(database.with_name(f"{database.name}.lock")):
        if database.is_file():
            return
        draft = database.with_name(f"{database.name}.draft")
        draft.unlink(missing_ok=True)
        draft.with_name(f"{draft.name}-journal").unlink(missing_ok=True)
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        draft.replace(database)


def experiment(client: Any, paths: Paths, uri: str, name: str) -> str:
    """Find or create the experiment of a sweep family; return its id."""
    from mlflow.exceptions import MlflowException

    with talking(uri):
        found = client.get_experiment_by_name(name)
        if found is None:
            location = paths.mlflow_artifacts.resolve().as_uri() if is_embedded(uri) else None
            try:
                return client.create_experiment(name, location, tags=_EXPERIMENT_TAGS)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another sweep was quicker
                if found is None:
                    raise
    if found.lifecycle_stage != "active":
        raise BackendError(
            f"experiment {name!r} is deleted in MLflow; restore it with `mlflow experiments "
            f"restore -x {found.experiment_id}`, or rename the sweep"
        )
    own = paths.mlflow_artifacts.resolve().as_uri()
    if found.artifact_location.startswith(("file:", "/")) and (
        not found.artifact_location.startswith(own)
    ):
        # Anyone may create an experiment on an open server, and we would write where it says.
        raise BackendError(
            f"experiment {name!r} keeps its artifacts in {found.artifact_location}, outside of "
            "this home; rename the sweep, or serve artifacts through the server"
        )
    return found.experiment_id

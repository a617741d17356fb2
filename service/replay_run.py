"""MLflow and replays: a replay as a run, beside those of the sweep that it repeats, and the sheet
that a final's run carries."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from service import mlflow_store, runs
from service.paths import Paths
from service.sheet import SHEET_FILE, Sheet, read_sheet, sheet_document
from trainer.errors import UsageError
from trainer.runtime.environment import quiet_mlflow

MLFLOW = "mlflow:"  # how a reference to a run begins
OF_TAG = "replay.of"
REPLAYS = "replays"  # the experiment of what came from no sweep


def open_experiment(paths: Paths, uri: str, sheet: Sheet) -> tuple[Any, str]:
    """Reach the server; a client, and the experiment that a replay of the sheet belongs to.
    BackendError where it does not answer."""
    quiet_mlflow()
    client = mlflow_store.connect(paths, uri)
    family = REPLAYS if sheet.sweep is None else sheet.sweep.rpartition("-")[0]
    return client, mlflow_store.experiment(client, paths, uri, family)


def write_run(paths: Paths, uri: str, sheet: Sheet, document: dict[str, Any]) -> str:
    """Write what a replay came to as a run of its own; return the run's id."""
    client, experiment = open_experiment(paths, uri, sheet)
    from mlflow.entities import Metric, RunTag

    at_ms = round(time.time() * 1_000)
    replayed = document["replayed"]
    values = {
        "final/val_bpb": replayed["val_bpb"],
        "final/artifact_bytes": replayed["artifact_bytes"],
        "train/steps": replayed["steps"],
    }
    tags = {
        runs.KIND_TAG: "replay",
        OF_TAG: sheet.final,
        "fairway.replay.same": "true" if document["same"] else "false",
        "fairway.reason": document["verdict"][: runs.MAX_TAG_CHARS],
        "mlflow.source.name": "fairway",
    }
    metrics = [Metric(n, float(v), at_ms, 0) for n, v in values.items() if v is not None]
    with mlflow_store.talking(uri):
        run = client.create_run(experiment, at_ms, {}, f"replay of {sheet.final[:12]}")
        run_id = run.info.run_id
        labels = [RunTag(key, value) for key, value in tags.items()]
        client.log_batch(run_id, metrics=metrics, tags=labels)
        client.log_dict(run_id, document, "replay.json")
        client.log_dict(run_id, sheet_document(sheet), SHEET_FILE)
        client.set_terminated(run_id, "FINISHED")
    return run_id


def sheet_of_run(paths: Paths, ref: str, uri: str | None) -> Sheet:
    """Fetch the sheet that the run `mlflow:RUN_ID` of a final carries; from this home's own store
    without a URI."""
    quiet_mlflow()
    run_id = ref.removeprefix(MLFLOW)
    if uri is None:
        if not paths.mlflow_db.is_file():
            raise UsageError(
                f"{MLFLOW}{run_id}: {paths.mlflow_db} does not exist; name the server with "
                "--tracking-uri"
            )
        uri = f"sqlite:///{paths.mlflow_db.resolve()}"
    client = mlflow_store.connect(paths, uri)
    with TemporaryDirectory() as folder:
        with mlflow_store.talking(uri):
            names = {each.path for each in client.list_artifacts(run_id)}
            if SHEET_FILE not in names:
                raise UsageError(
                    f"{MLFLOW}{run_id}: has no {SHEET_FILE}; name the run of a final that was "
                    "scored"
                )
            path = client.download_artifacts(run_id, SHEET_FILE, folder)
        return read_sheet(Path(path))

"""A replay as a run in MLflow, beside those of the sweep that it repeats."""

import time
from typing import Any

from service import mlflow_store, runs
from service.paths import Paths
from service.sheet import SHEET_FILE, Sheet, sheet_document
from trainer.runtime.environment import quiet_mlflow

OF_TAG = "replay.of"
REPLAYS = "replays"  # the experiment of what came from no sweep


def write_run(paths: Paths, uri: str, sheet: Sheet, document: dict[str, Any]) -> str:
    """Write what a replay came to as a run of its own; return the run's id."""
    quiet_mlflow()
    from mlflow.entities import Metric, RunTag

    client = mlflow_store.connect(paths, uri)
    family = REPLAYS if sheet.sweep is None else sheet.sweep.rpartition("-")[0]
    experiment = mlflow_store.experiment(client, paths, uri, family)
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

"""One sweep on its way from its ledger into MLflow: which run stands for what, what is written.

Nothing is stored twice, because a run is looked up by its `fairway.id` before it is created, and
because every point carries the timestamp of the ledger or of the curve: MLflow's key of a point
includes it (MLflow 3.17, tested). tracking.json only says what may be skipped.

`tracking` decides when to step; `runs` says what a run carries, `mlflow_view` what the page shows.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from service import ledger, mlflow_store, mlflow_view, runs
from service.curves import Curve, Point
from service.paths import Paths
from service.states import State
from trainer.errors import BackendError, DataError, UsageError
from trainer.runtime.files import read_json, write_json

logger = logging.getLogger(__name__)

MAX_BATCH = 1_000  # metrics that MLflow takes in one request, runs that it lists
SAVE_EVERY = 50  # events: what a projector that dies in a long step writes again, to no effect
DEFAULT_PORT = 5000


@dataclass(frozen=True, slots=True)
class Projection:
    """Where a sweep stands in MLflow; `run_ids` maps training and final ids to runs."""

    experiment_id: str
    parent_run_id: str
    run_ids: dict[str, str]
    link: str
    table_link: str


def _ms(at_s: float) -> int:
    return round(at_s * 1_000)


def _no_infinity(value: float) -> float:
    # MLflow stores 1.8e308 for an infinity, which flattens every chart; it keeps NaN.
    return value if math.isfinite(value) else math.nan


class Projector:
    """Writes one sweep to one MLflow, step by step. Connects at the ledger's first event."""

    def __init__(self, paths: Paths, sweep_id: str, uri: str) -> None:
        self._paths, self._sweep_id, self._uri = paths, sweep_id, uri
        self._sweep = paths.sweep(sweep_id)
        self._view = ledger.SweepView()
        self._last_event: dict[str, Any] = {}
        self._ledger_bytes = 0
        self._curves: dict[str, Curve] = {}
        self._run_ids: dict[str, str] = {}
        self._is_open = False
        self._num_written = 0
        self._client: Any = None
        self._experiment_id = ""

    @property
    def is_connected(self) -> bool:
        return self._client is not None

    def again(self) -> "Projector":
        """A fresh projector of the same sweep: what is written already is found there."""
        return Projector(self._paths, self._sweep_id, self._uri)

    def is_finished(self, after: int) -> bool:
        last = self._last_event
        return last.get("event") == "sweep_finished" and last["seq"] > after

    def projection(self) -> Projection:
        """Say where the sweep stands in MLflow; UsageError before it has started."""
        parent = self._run_ids.get(self._sweep_id, "")
        if not parent:
            raise UsageError(f"{self._sweep.ledger}: the sweep has not started; nothing to show")
        page = mlflow_store.without_credentials(self._uri).rstrip("/")
        if mlflow_store.is_embedded(self._uri):
            page = f"http://127.0.0.1:{DEFAULT_PORT}"
        return Projection(
            experiment_id=self._experiment_id,
            parent_run_id=parent,
            run_ids={key: run for key, run in self._run_ids.items() if key != self._sweep_id},
            link=f"{page}/{mlflow_view.chart_link(self._experiment_id, parent)}",
            table_link=f"{page}/{mlflow_view.table_link(self._experiment_id, parent)}",
        )

    def step(self) -> bool:
        """Write what is new; tell whether anything was."""
        events = self._new_events()
        for event in events:
            self._view.apply(event)
            self._last_event = event
            if not self._view.started:
                raise DataError(f"{self._sweep.ledger}: does not begin with sweep_started")
            if not self.is_connected:
                self._open_server()
            if event["seq"] > self._num_written:
                self._write(event)
                self._num_written = event["seq"]
                if self._num_written % SAVE_EVERY == 0:
                    self._save()
        num_points = sum(self._write_curve(training) for training in self._view.running)
        if self.is_connected and (events or num_points):
            self._save()
        return bool(events or num_points)

    def abandon(self) -> None:
        """Close the runs of a sweep whose process is gone; going on with it opens them again."""
        if self._view.state == State.RUNNING and self.is_connected:
            self._close_runs(State.LOST)

    def _close_runs(self, state: State) -> None:
        """Close every run of the sweep that is still open, whoever opened it, in `state`. One that
        ended before, and was begun once more, keeps the state that it had."""
        running = f"tags.`{runs.SWEEP_TAG}` = '{self._sweep_id}' and attributes.status = 'RUNNING'"
        for key, run in self._search(running):
            ended = self._view.trainings.get(key, {**self._last_event, "state": state})
            self._call("set_tag", run.info.run_id, runs.STATE_TAG, str(ended["state"]))
            status = runs.run_status(State(ended["state"]))
            self._call("set_terminated", run.info.run_id, status, _ms(ended["at"]))

    def _new_events(self) -> list[dict[str, Any]]:
        path = self._sweep.ledger
        if not path.is_file() or path.stat().st_size == self._ledger_bytes:
            return []
        self._ledger_bytes = path.stat().st_size
        return list(islice(ledger.read(path), self._view.events, None))

    def _open_server(self) -> None:
        client = mlflow_store.connect(self._paths, self._uri)
        name = self._view.started["name"]
        self._experiment_id = mlflow_store.experiment(client, self._paths, self._uri, name)
        self._client = client
        ours = self._search(f"tags.`{runs.SWEEP_TAG}` = '{self._sweep_id}'")
        self._run_ids = {key: run.info.run_id for key, run in ours}
        self._recall()

    def _search(self, where: str) -> list[tuple[str, Any]]:
        """The runs that a filter of MLflow's finds, each with the id of its stage."""
        found: list[tuple[str, Any]] = []
        token = None
        while True:
            page = self._call(
                "search_runs",
                [self._experiment_id],
                where,
                max_results=MAX_BATCH,
                page_token=token,
            )
            found += [(run.data.tags[runs.ID_TAG], run) for run in page]
            token = page.token
            if not token:
                return found

    def _recall(self) -> None:
        """Take up what tracking.json says is written, if it speaks of this very parent run."""
        try:
            saved = read_json(self._sweep.tracking)
        except DataError:
            return  # absent or broken: everything is written again, to the same effect
        known = (saved.get("uri"), saved.get("parent_run_id"))
        if known != (self._uri, self._run_ids.get(self._sweep_id)):
            return
        self._num_written = saved["num_events"]
        for training, num_bytes in saved["curve_bytes"].items():
            curve = self._curves[training] = Curve()
            curve.read(self._curve_path(training), until=num_bytes)

    def _save(self) -> None:
        projection = self.projection()
        write_json(
            self._sweep.tracking,
            {
                "uri": self._uri,
                "experiment_id": projection.experiment_id,
                "parent_run_id": projection.parent_run_id,
                "link": projection.link,
                "table_link": projection.table_link,
                "num_events": self._num_written,
                "curve_bytes": {key: curve.num_bytes for key, curve in self._curves.items()},
                "run_ids": projection.run_ids,
            },
        )

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        with mlflow_store.talking(self._uri):
            return getattr(self._client, method)(*args, **options)

    def _write(self, event: dict[str, Any]) -> None:
        name = event["event"]
        is_going_on = not self._is_open and name != "sweep_finished"
        if name == "sweep_started" or is_going_on:
            diff = (self._view.started.get("facts") or {}).get("git_diff_sha256")
            changed = (self._sweep.diff(diff),) if diff else ()
            self._put(runs.sweep_run(self._view, (self._sweep.spec, *changed)))
            self._write_view(event)
            self._is_open = True
        match name:
            case "training_started":
                self._put(runs.training_run(self._view, event, self._paths))
            case "training_finished" if self._settles(self._view.trainings, "training", event):
                run = runs.training_run(self._view, event, self._paths)
                self._find_or_create(run)
                self._write_curve(event["training"])
                self._put(run)
            case "final_scored" if self._settles(self._view.finals, "final", event):
                self._put(runs.final_run(self._view, event, self._paths))
            case "sweep_finished":
                self._put(runs.finished_sweep_run(self._view, event, self._write_report()))
                left = self._view.state
                self._close_runs(left if left == State.FAILED else State.CANCELLED)
                self._write_view(event)
                self._is_open = False

    @staticmethod
    def _settles(stages: dict[str, dict[str, Any]], kind: str, event: dict[str, Any]) -> bool:
        return stages[event[kind]] is event

    def _find_or_create(self, run: runs.RunFacts) -> str:
        if run.id not in self._run_ids:
            parent = self._run_ids.get(self._sweep_id)
            tags = run.tags | ({runs.PARENT_TAG: parent} if parent else {})
            created = self._call(
                "create_run", self._experiment_id, _ms(run.started_at_s), tags, run.name
            )
            self._run_ids[run.id] = created.info.run_id
        return self._run_ids[run.id]

    def _put(self, run: runs.RunFacts) -> None:
        """Bring one run to what it should be; doing it again changes nothing."""
        run_id = self._find_or_create(run)
        at_s = run.started_at_s if run.ended_at_s is None else run.ended_at_s
        self._log(
            run_id,
            (Point(key, value, at_s, 0) for key, value in run.metrics.items()),
            tags=run.tags,
            params=run.params,
        )
        self._log_inputs(run_id)
        for path in run.files:
            if path.is_file():  # a failed stage leaves only some of them
                self._call("log_artifact", run_id, str(path))
        told = dict(self._view.started.get("facts") or {})
        told |= {"worker": run.worker} if run.worker else {}
        self._call("log_dict", run_id, told, "environment.json")
        if run.ended_at_s is None:
            self._call("update_run", run_id, status=run.status)
        else:
            self._call("set_terminated", run_id, run.status, _ms(run.ended_at_s))

    def _log(
        self,
        run_id: str,
        points: Iterable[Point],
        *,
        tags: Mapping[str, str],
        params: Mapping[str, str],
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(p.metric, _no_infinity(p.value), _ms(p.at_s), p.step) for p in points]
        first, *rest = [metrics[i : i + MAX_BATCH] for i in range(0, len(metrics), MAX_BATCH)] or [
            []
        ]
        labels = [RunTag(key, value) for key, value in tags.items()]
        knobs = [Param(key, value) for key, value in params.items()]
        self._call("log_batch", run_id, metrics=first, params=knobs, tags=labels)
        for batch in rest:
            self._call("log_batch", run_id, metrics=batch)

    def _log_inputs(self, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        facts = self._view.started.get("facts") or {}
        if not facts.get("data_name") or not facts.get("data_digest"):
            return
        digest = runs.short_digest(facts["data_digest"])  # MLflow's column holds 36 characters
        data = Dataset(facts["data_name"], digest, source_type="code", source='{"tags": {}}')
        tags = [InputTag("mlflow.data.context", "training")]
        self._call("log_inputs", run_id, [DatasetInput(data, tags)])

    def _curve_path(self, training: str) -> Path:
        return self._paths.store / "trainings" / training / "metrics.jsonl"

    def _write_curve(self, training: str) -> int:
        points = self._curves.setdefault(training, Curve()).read(self._curve_path(training))
        if points:
            self._log(self._run_ids[training], points, tags={}, params={})
        return len(points)

    def _write_view(self, event: dict[str, Any]) -> None:
        view = mlflow_view.saved_view(
            self._run_ids[self._sweep_id],
            list(runs.param_names(self._view).values()),
            num_finals=self._view.started["num_finals"],
            title=self._sweep_id,
            at_ms=_ms(event["at"]),
        )
        try:
            self._call("set_experiment_tag", self._experiment_id, view.tag, view.value)
        except mlflow_store.Unreachable:
            raise
        except BackendError as error:
            logger.warning("the saved view is not written: %s", error)

    def _write_report(self) -> tuple[Path, ...]:
        from service import plots

        return plots.write_report(self._view, self._sweep.report, self._paths).files()

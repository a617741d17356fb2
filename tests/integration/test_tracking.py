"""The ledger in a real MLflow store: layout, replay, resume, failure."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from service import tracking
from service.mlflow_store import locked
from service.projector import Projection, Projector
from tests.ledgers import CLIP, EMA, PRUNE, START, WARMDOWN, Sweep
from trainer.errors import BackendError, UsageError
from trainer.runtime.environment import quiet_mlflow

quiet_mlflow()
mlflow = pytest.importorskip("mlflow")

# MLflow 3.17 uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = {WARMDOWN: [2500], EMA: [0.997], CLIP: ["none", "p5"], PRUNE: [0.0, 0.05]}
NOT_A_PROCESS = 2**22 + 1  # above the kernel's highest pid


def small(home: Path, sweep_id: str) -> Sweep:
    return Sweep(home, sweep_id=sweep_id, space=SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose database two processes touched first, at the same time.

    One projects a finished sweep once; the other follows a sweep whose process is gone.
    """
    home = tmp_path_factory.mktemp("home")
    small(home, "done-1").write()
    lost = small(home, "lost-1")
    with lost.open() as ledger:
        lost.start(ledger)
        lost.begin(ledger, lost.train_points()[0])
    options = {"done-1": ["--once"], "lost-1": ["--parent-pid", str(NOT_A_PROCESS)]}
    command = [sys.executable, "-m", "service.tracking", "--home", str(home), "--sweep"]
    started = [
        subprocess.Popen([*command, sweep, *rest], stderr=subprocess.PIPE, text=True)
        for sweep, rest in options.items()
    ]
    said = [process.communicate(timeout=480)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return home


@pytest.fixture
def client(store: Path) -> Any:
    return mlflow.MlflowClient(uri_of(store))


def uri_of(home: Path) -> str:
    return tracking.default_uri(Sweep(home).paths)


def project(home: Path, sweep_id: str) -> Projection:
    return tracking.sync(Sweep(home).paths, sweep_id, uri_of(home))


def runs_of(client: Any, projection: Projection) -> dict[str, Any]:
    """Every run of a sweep, by the id of its stage."""
    runs = client.search_runs(
        [projection.experiment_id],
        f"tags.`fairway.sweep` = '{sweep_of(client, projection)}'",
        max_results=1_000,
    )
    assert len({run.data.tags["fairway.id"] for run in runs}) == len(runs)
    return {run.data.tags["fairway.id"]: run for run in runs}


def sweep_of(client: Any, projection: Projection) -> str:
    return client.get_run(projection.parent_run_id).data.tags["fairway.sweep"]


def contents(client: Any, projection: Projection) -> Any:
    """Everything that a replay could change."""
    return {
        key: (
            run.info.run_id,
            run.info.status,
            run.info.end_time,
            run.data.params,
            run.data.tags,
            [dataset.dataset.name for dataset in run.inputs.dataset_inputs],
            {
                name: [(p.step, p.timestamp, p.value) for p in history(client, run, name)]
                for name in run.data.metrics
            },
        )
        for key, run in runs_of(client, projection).items()
    }


def history(client: Any, run: Any, metric: str) -> list[Any]:
    return client.get_metric_history(run.info.run_id, metric)


def test_parent_has_trainings_and_finals_as_children(store: Path, client: Any) -> None:
    projection = project(store, "done-1")

    kinds = [run.data.tags["fairway.kind"] for run in runs_of(client, projection).values()]
    parents = {
        run.data.tags.get("mlflow.parentRunId") for run in runs_of(client, projection).values()
    }
    assert sorted(kinds) == ["final"] * 4 + ["sweep", "training"]
    assert parents == {None, projection.parent_run_id}


def test_final_has_what_varies_as_params_and_every_metric_at_step_0(
    store: Path, client: Any
) -> None:
    projection = project(store, "done-1")
    runs = runs_of(client, projection)

    final = next(run for run in runs.values() if run.data.tags["fairway.kind"] == "final")

    knobs = {"warmdown_iters", "ema_decay", "clip", "prune.ratio"}
    assert set(final.data.params) == {*knobs, "recipe", "seed"}
    assert {p.step for name in final.data.metrics for p in history(client, final, name)} == {0}
    metrics = final.data.metrics
    assert metrics["final/val_mbpb"] == pytest.approx(metrics["final/val_bpb"] * 1_000)
    assert metrics["final/artifact_mb"] == metrics["final/artifact_bytes"] / 1e6
    assert {"final/bytes_headroom", "clock/train_s", "size/code_bytes"} <= set(metrics)


def test_run_names_start_with_the_point_and_differ(store: Path, client: Any) -> None:
    projection = project(store, "done-1")

    finals = [r for r in runs_of(client, projection).values() if "fairway.training" in r.data.tags]

    names = {run.info.run_name for run in finals}
    assert len(names) == 4
    assert all(name.startswith("wd2500 ema.997 c") for name in names)


def test_training_has_its_whole_curve_with_the_curves_own_times(store: Path, client: Any) -> None:
    projection = project(store, "done-1")
    runs = runs_of(client, projection).values()
    training = next(run for run in runs if run.data.tags["fairway.kind"] == "training")

    losses = history(client, training, "train/loss")
    scores = history(client, training, "val/bpb")

    assert [point.step for point in losses] == list(range(0, 7_001, 100))
    assert len(scores) == 8
    assert losses[1].timestamp - losses[0].timestamp == 8_500
    assert START * 1_000 < losses[0].timestamp < (START + 60) * 1_000


def test_artifacts_dataset_and_digests_are_kept(store: Path, client: Any) -> None:
    projection = project(store, "done-1")
    runs = runs_of(client, projection).values()
    final = next(run for run in runs if run.data.tags["fairway.kind"] == "final")

    files = {file.path for file in client.list_artifacts(final.info.run_id)}
    report = {file.path for file in client.list_artifacts(projection.parent_run_id)}

    wanted = {"task.json", "score.json", "audit.json", "result.json", "environment.json"}
    assert files == wanted
    assert {"bpb_by_bytes.png", "report.html", "finals.csv", "environment.json"} <= report
    assert final.inputs.dataset_inputs[0].dataset.name == "fineweb10B_sp1024"
    assert final.data.tags["fairway.spec_digest"] == "c4" * 6


def test_parent_carries_the_best_feasible_score(store: Path, client: Any) -> None:
    projection = project(store, "done-1")
    runs = runs_of(client, projection).values()

    feasible = [
        run.data.metrics["final/val_bpb"]
        for run in runs
        if run.data.tags.get("fairway.feasible") == "true"
    ]

    parent = client.get_run(projection.parent_run_id)
    assert len(feasible) == 2
    assert parent.data.metrics["best/val_bpb"] == min(feasible)
    assert parent.info.status == "FINISHED"


def test_projecting_again_from_nothing_changes_nothing(store: Path, client: Any) -> None:
    projection = project(store, "done-1")
    before = contents(client, projection)
    Sweep(store).paths.sweep("done-1").tracking.unlink()

    again = project(store, "done-1")

    assert again == projection
    assert contents(client, again) == before


def test_live_projection_ends_up_as_a_late_one_does(store: Path, client: Any) -> None:
    sweep = small(store, "live-1")
    point = sweep.train_points()[0]
    projector = Projector(sweep.paths, "live-1", uri_of(store))
    with sweep.open() as ledger:
        sweep.start(ledger)
        training = sweep.begin(ledger, point)
        projector.step()
        live = runs_of(client, projector.projection())[training]
        sweep.end(ledger, point)
        for final_point in sweep.final_points(point):
            sweep.score(ledger, final_point)
            projector.step()
        sweep.finish(ledger)
    projector.step()
    before = contents(client, projector.projection())
    sweep.paths.sweep("live-1").tracking.unlink()

    late = project(store, "live-1")

    assert live.info.status == "RUNNING"
    assert live.data.metrics["train/loss"] > 0
    assert contents(client, late) == before


def test_every_state_is_told_by_status_and_tags(store: Path, client: Any) -> None:
    sweep = small(store, "states-1")
    sweep.space = {**SMALL, PRUNE: [0.05]}
    wanted = {
        "illegal": ("FINISHED", "true", "false"),
        "failed": ("FAILED", None, None),
        "infeasible": ("FINISHED", "false", "true"),
    }
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.train(ledger, sweep.train_points()[0])
        first, second = sweep.final_points(sweep.train_points()[0])
        keys = {
            "illegal": sweep.score(ledger, first, state="illegal", reason="clock"),
            "failed": sweep.score(ledger, second, state="failed", reason="gone", result=None),
            "infeasible": sweep.score(ledger, {**first, PRUNE: 0.0}),
        }

    runs = runs_of(client, project(store, "states-1"))

    told = {state: runs[key] for state, key in keys.items()}
    assert {
        state: (
            r.info.status,
            r.data.tags.get("fairway.feasible"),
            r.data.tags.get("fairway.legal"),
        )
        for state, r in told.items()
    } == wanted
    assert {state: r.data.tags["fairway.state"] for state, r in told.items()} == {
        s: s for s in told
    }


def test_sweep_whose_process_is_gone_is_closed_and_goes_on_in_the_same_runs(
    store: Path, client: Any
) -> None:
    sweep = small(store, "lost-1")
    point = sweep.train_points()[0]
    lost_runs = runs_of(client, project(store, "lost-1"))
    sweep.tick(5_000.0)
    with sweep.open() as ledger:
        sweep.end(ledger, point)
        for final_point in sweep.final_points(point):
            sweep.score(ledger, final_point)
        sweep.finish(ledger)

    runs = runs_of(client, project(store, "lost-1"))

    assert {run.info.status for run in lost_runs.values()} == {"KILLED"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert all(runs[key].info.run_id == run.info.run_id for key, run in lost_runs.items())


@pytest.mark.parametrize(
    ("state", "status"), [("cancelled", "KILLED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_no_run_is_left_open_by_a_sweep_that_ended_before_its_trainings(
    store: Path, client: Any, state: str, status: str
) -> None:
    sweep = small(store, f"{state}-1")
    point = sweep.train_points()[0]
    with sweep.open() as ledger:
        sweep.start(ledger)
        training = sweep.begin(ledger, point)
        sweep.finish(ledger, state)
    closed = runs_of(client, project(store, sweep.sweep_id))
    projector = Projector(sweep.paths, sweep.sweep_id, uri_of(store))
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.begin(ledger, point)
        projector.step()
        going_on = runs_of(client, projector.projection())

    assert {key: run.info.status for key, run in closed.items()} == {
        training: status,
        sweep.sweep_id: status,
    }
    assert {run.info.status for run in going_on.values()} == {"RUNNING"}
    assert {key: run.info.run_id for key, run in going_on.items()} == {
        key: run.info.run_id for key, run in closed.items()
    }


def test_a_lost_sweep_that_is_written_twice_has_what_its_ledger_has_and_no_open_run(
    store: Path, client: Any
) -> None:
    sweep = small(store, "left-1")
    first = sweep.train_points()[0]
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.train(ledger, first)
        final = sweep.score(ledger, sweep.final_points(first)[0])
        sweep.begin(ledger, first)  # its bank is gone: trained again, and lost meanwhile
        told = {"left-1", *ledger.view.trainings, final}
    once = contents(client, project(store, "left-1"))
    sweep.paths.sweep("left-1").tracking.unlink()

    projection = project(store, "left-1")

    assert contents(client, projection) == once
    left = runs_of(client, projection)
    assert set(left) == told
    assert left.pop("left-1").info.status == "KILLED"
    assert {run.info.status for run in left.values()} == {"FINISHED"}


def test_failed_final_that_is_tried_again_keeps_its_run(store: Path, client: Any) -> None:
    sweep = small(store, "again-1")
    point = sweep.train_points()[0]
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.train(ledger, point)
        final = sweep.score(
            ledger, sweep.final_points(point)[1], state="failed", reason="gone", result=None
        )
        failed = runs_of(client, project(store, "again-1"))[final]
        sweep.score(ledger, sweep.final_points(point)[1])

    again = runs_of(client, project(store, "again-1"))[final]

    assert (failed.info.status, again.info.status) == ("FAILED", "FINISHED")
    assert again.info.run_id == failed.info.run_id
    assert again.data.metrics["final/val_bpb"] > 0


def test_sweeps_of_one_family_share_an_experiment_but_no_run(store: Path) -> None:
    first = project(store, "done-1")
    small(store, "done-2").write()

    second = project(store, "done-2")

    assert second.experiment_id == first.experiment_id
    assert not set(second.run_ids.values()) & set(first.run_ids.values())
    assert set(second.run_ids) == set(first.run_ids)  # the same stages, found in the store


def test_view_that_mlflow_refuses_costs_only_the_view(
    store: Path, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = small(store, "wide-1")
    with sweep.open() as ledger:
        sweep.start(ledger)
        started = {key: ledger.view.started[key] for key in ledger.view.started}
        noise = [os.urandom(40).hex() for _ in range(500)]
        started |= {"varying": [*SMALL, *(f"train.{name}" for name in noise)]}
        ledger.append(
            "sweep_started", **{k: started[k] for k in started if k not in ("seq", "event")}
        )
        projection = project(store, "wide-1")

    assert "saved view is not written" in caplog.text
    assert client.get_run(projection.parent_run_id).info.status == "RUNNING"


def test_only_one_process_projects_a_sweep(store: Path) -> None:
    lock = Sweep(store).paths.sweep("done-1").tracking.with_suffix(".lock")

    with locked(lock, wait=False), pytest.raises(UsageError, match="another process"):
        project(store, "done-1")


def test_unknown_sweep_is_refused_by_name(store: Path) -> None:
    with pytest.raises(UsageError, match="nope"):
        project(store, "nope")


def test_server_out_of_reach_is_one_line_without_credentials(tmp_path: Path) -> None:
    sweep = small(tmp_path, "done-1")
    sweep.write()

    with pytest.raises(BackendError) as caught:
        tracking.sync(sweep.paths, "done-1", "http://ann:secret@127.0.0.1:9")

    assert str(caught.value).startswith("http://127.0.0.1:9: ")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_experiment_that_writes_outside_of_the_home_is_refused(store: Path, client: Any) -> None:
    small(store, "trap-1").write()
    client.create_experiment("trap", "file:///etc/elsewhere")

    with pytest.raises(BackendError, match="outside of this home"):
        project(store, "trap-1")


def test_following_a_finished_sweep_ends(store: Path) -> None:
    sweep = Sweep(store)

    projection = tracking.project(sweep.paths, "done-1", uri_of(store), follow=True)

    assert projection == project(store, "done-1")


def test_following_ends_in_order_when_told_to_stop(store: Path, client: Any) -> None:
    sweep = small(store, "stopped-1")
    with sweep.open() as ledger:
        sweep.start(ledger)
    stop = Event()
    stop.set()

    projection = tracking.project(sweep.paths, "stopped-1", uri_of(store), follow=True, stop=stop)

    assert client.get_run(projection.parent_run_id).info.status == "KILLED"


def test_finish_of_an_older_run_does_not_end_following(store: Path) -> None:
    sweep = small(store, "old-1")
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.finish(ledger)
        num_old = ledger.view.events
        projector = Projector(sweep.paths, "old-1", uri_of(store))
        projector.step()
        was_finished = projector.is_finished(after=num_old)
        sweep.finish(ledger)
        projector.step()

    assert not was_finished
    assert projector.is_finished(after=num_old)

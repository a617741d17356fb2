"""What a ledger adds up to: order, best, documents, tables."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from service import report
from service.ledger import SweepView, replay
from service.states import State
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN, Sweep, final_result
from trainer.errors import InfeasibleError
from trainer.protocol import ARTIFACT_BYTES_CAP


def scored(sweep: Sweep, *finals: dict[str, object]) -> SweepView:
    """Replay a sweep of one training and the given finals: point by number, facts overridden."""
    points = sweep.final_points(sweep.train_points()[0])
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.train(ledger, sweep.train_points()[0])
        for point, facts in zip(points, finals, strict=False):
            sweep.score(ledger, point, **facts)
    return replay(sweep.paths.sweep(sweep.sweep_id).ledger)


def result_of(bpb: float, num_bytes: int, verdict: str = "pass") -> dict[str, object]:
    result = final_result({}, num_bytes)
    result["score"]["val_bpb"], result["artifact_bytes"] = bpb, num_bytes
    result["audit"][0]["verdict"] = verdict
    return {"result": result, "state": "succeeded", "reason": None}


@pytest.fixture
def view(tmp_path: Path) -> SweepView:
    return replay(Sweep(tmp_path).write())


def test_rows_come_by_state_and_within_it_by_bpb_or_overshoot(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    over = {"state": "infeasible", "reason": "over"}
    view = scored(
        sweep,
        {"state": "failed", "reason": "gone", "result": None},
        {**result_of(1.0, ARTIFACT_BYTES_CAP + 900), **over},
        {**result_of(1.2, 10), "state": "illegal", "reason": "clock"},
        {**result_of(1.1, ARTIFACT_BYTES_CAP + 5), **over},
        result_of(1.3, 10),
        result_of(1.25, 10),
    )

    rows = report.final_rows(view)

    assert [row.val_bpb for row in rows] == [1.25, 1.3, 1.1, 1.0, 1.2, None]
    assert rows[2].overshoot_bytes == 5


def test_best_is_the_lowest_bpb_of_what_fits(view: SweepView) -> None:
    fitting = [row for row in report.final_rows(view) if row.state == State.SUCCEEDED]
    lowest_of_all = min(row.val_bpb for row in report.final_rows(view))

    best = report.best(view)

    assert best["result"]["score"]["val_bpb"] == min(row.val_bpb for row in fitting)
    assert best["result"]["score"]["val_bpb"] > lowest_of_all


def test_final_over_the_cap_is_never_best_even_if_its_event_says_succeeded(tmp_path: Path) -> None:
    view = scored(Sweep(tmp_path), result_of(1.0, ARTIFACT_BYTES_CAP + 1), result_of(1.5, 10))

    best = report.best(view)

    assert best["result"]["score"]["val_bpb"] == 1.5


def test_final_with_a_failed_rule_is_never_best(tmp_path: Path) -> None:
    view = scored(Sweep(tmp_path), result_of(1.0, 10, "fail"), result_of(1.5, 10))

    best = report.best(view)

    assert best["result"]["score"]["val_bpb"] == 1.5


def test_tie_goes_to_fewer_bytes(tmp_path: Path) -> None:
    view = scored(Sweep(tmp_path), result_of(1.0, 20), result_of(1.0, 10), result_of(1.0, 30))

    best = report.best(view)

    assert best["result"]["artifact_bytes"] == 10


def test_artifact_exactly_at_the_cap_fits(tmp_path: Path) -> None:
    view = scored(Sweep(tmp_path), result_of(1.0, ARTIFACT_BYTES_CAP))

    assert report.best(view) is not None


def test_smallest_overshoot_ignores_what_fits(tmp_path: Path) -> None:
    view = scored(
        Sweep(tmp_path), result_of(1.0, 7), result_of(1.0, ARTIFACT_BYTES_CAP + 7),
        result_of(1.0, ARTIFACT_BYTES_CAP + 3),
    )  # fmt: skip

    near = report.smallest_overshoot(view)

    assert near.overshoot_bytes == 3


def test_status_counts_every_state(tmp_path: Path) -> None:
    view = scored(
        Sweep(tmp_path),
        result_of(1.0, 7),
        {"state": "failed", "reason": "gone", "result": None},
        {**result_of(1.0, 7), "state": "illegal", "reason": "clock"},
        {"state": "infeasible", "cached": True},
    )

    status = report.status_document(view)

    assert status["state"] == "running"
    assert status["trainings"] == {
        "total": 2,
        "done": 1,
        "running": 0,
        "stopped": 0,
        "failed": 0,
    }
    assert status["finals"] == {
        "total": 16,
        "done": 3,
        "ranked": 0,
        "infeasible": 1,
        "illegal": 1,
        "failed": 1,
    }
    assert status["cache_hits"] == 1


def test_status_counts_a_running_training(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.begin(ledger, sweep.train_points()[0])

        status = report.status_document(ledger.view)

    assert status["trainings"]["running"] == 1
    assert status["best"] is None


def test_cached_trainings_cost_nothing(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.train(ledger, sweep.train_points()[0])
        sweep.train(ledger, sweep.train_points()[1], cached=True)

        status = report.status_document(ledger.view)

    assert status["trained_steps"] == 7_000
    assert status["gpu_seconds"] == status["worker_seconds"] == pytest.approx(600.0 * 8)


def test_the_cost_is_told_by_phase_and_in_money(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.train(ledger, sweep.train_points()[0])
        sweep.score(ledger, sweep.final_points(sweep.train_points()[0])[0])
        ledger.view.started["spec"]["budget"] = {"usd_per_gpu_hour": 2.0}

        status = report.status_document(ledger.view)

    assert status["worker_seconds_by_phase"] == {"search": 4_800.0, "final": 95.0, "confirm": 0.0}
    assert status["usd"] == pytest.approx(4_895.0 / 3_600 * 2, abs=0.01)


def test_what_the_search_stopped_is_neither_done_nor_failed(tmp_path: Path) -> None:
    view = scored(Sweep(tmp_path), {"state": "stopped", "reason": "place 9", "result": None})

    status = report.status_document(view)

    assert status["finals"]["done"] == status["finals"]["failed"] == 0
    assert report.final_rows(view)[0].reason == "place 9"


def test_gpu_seconds_are_zero_without_gpus(view: SweepView) -> None:
    view.started["spec"]["resources"]["gpus_per_worker"] = 0

    status = report.status_document(view)

    assert status["gpu_seconds"] == 0
    assert status["worker_seconds"] > 0


def test_documents_are_plain_json(view: SweepView) -> None:
    documents = [
        report.status_document(view),
        report.best_document(view, {}),
        report.table_records(view),
    ]

    assert json.loads(json.dumps(documents, allow_nan=False)) == documents


def test_best_document_names_run_point_and_artifact(view: SweepView) -> None:
    final = report.best(view)["final"]

    document = report.best_document(view, {final: "run7"}, Path("home"))

    assert document["mlflow_run_id"] == "run7"
    assert isinstance(document["num_params"], int)
    assert set(document["params"]) == {WARMDOWN, EMA, CLIP, PRUNE}
    assert document["artifact"] == f"home/store/finals/{final}/artifact"


def test_no_feasible_final_is_an_error_that_tells_the_nearest_miss(tmp_path: Path) -> None:
    over = {"state": "infeasible", "reason": "over"}
    view = scored(Sweep(tmp_path), {**result_of(1.0, ARTIFACT_BYTES_CAP + 1_234), **over})

    with pytest.raises(InfeasibleError, match="1,234 bytes over") as caught:
        report.best_document(view, {})

    assert "\n" not in str(caught.value)


def test_influence_ranks_the_knob_that_moves_the_score_first(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    points = sweep.final_points(sweep.train_points()[0])
    view = scored(sweep, *(result_of(1.0 + (p[CLIP] == "p5") + p[EMA] / 1e3, 10) for p in points))

    shares = report.influence(view)

    assert next(iter(shares)) == CLIP
    assert shares[CLIP] > 0.99
    assert shares[PRUNE] == 0.0


def test_text_table_has_a_column_per_varying_knob_and_no_colour(view: SweepView) -> None:
    text = report.text_table(view)

    header = [cell.strip() for cell in text.splitlines()[1].strip("|").split("|")]
    knobs = ["warmdown_iters", "ema_decay", "clip", "prune.ratio"]
    assert header == [*knobs, "val_bpb", "bytes", "headroom", "state"]
    assert "\x1b" not in text
    assert "15,318,658" in text
    assert text.count("best") == 1


def test_summary_table_shows_markup_of_a_reason_as_it_is(tmp_path: Path) -> None:
    facts = {"state": "failed", "reason": "[bold]boom[/nope]", "result": None}
    view = scored(Sweep(tmp_path), facts)
    console = Console(width=200, record=True, file=io.StringIO())

    console.print(report.summary_table(view))

    assert "[bold]boom[/nope]" in console.export_text()


def test_csv_reads_back_to_the_same_values(view: SweepView) -> None:
    rows = list(csv.DictReader(io.StringIO(report.csv_table(view))))

    expected = report.final_rows(view)
    assert [float(row["val_bpb"]) for row in rows] == [row.val_bpb for row in expected]
    assert [float(row[PRUNE]) for row in rows] == [row.point[PRUNE] for row in expected]


def test_table_without_cap_has_no_headroom(tmp_path: Path) -> None:
    view = replay(Sweep(tmp_path, cap_bytes=None).write())

    assert "headroom" not in report.text_table(view)


def test_report_imports_neither_torch_nor_ray_nor_mlflow() -> None:
    code = "import sys, service.report; print({'torch', 'ray', 'mlflow'} & set(sys.modules))"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert loaded.stdout.strip() == "set()"

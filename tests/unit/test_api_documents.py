"""A sweep as the API tells it, from its row and its ledger."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.api import documents, shapes
from service.api.documents import detail_document, page_of, sweep_document, told_by
from service.jobs.decisions import summary_of
from service.ledger import SweepView, read
from service.queue.records import Summary, SweepRecord, Want
from service.states import State
from tests.ledgers import WARMDOWN, Sweep, stage_id
from tests.showcase import Showcase
from trainer.errors import UsageError

PLAN = {
    "trainings": 2,
    "finals": 16,
    "cap_bytes": 16_000_000,
    "space": {WARMDOWN: [2500, 3500], "final.prune.ratio": [0.0, 0.05]},
}
RECORD = SweepRecord(
    seq=1,
    sweep_id="warmdown-3f9a2c",
    name="warmdown",
    recipe="pr414",
    owner="ann",
    priority=0,
    gangs=1,
    bundle="b" * 20,
    assignments=(),
    digest="d" * 64,
    plan=PLAN,
    state=State.QUEUED,
    reason=None,
    want=Want.RUN,
    wanted_by=None,
    attempt=0,
    restarts=0,
    gangs_held=0,
    submitted_at=1_790_000_000.0,
    started_at=None,
    ended_at=None,
)
RUNNING = replace(RECORD, state=State.RUNNING, attempt=1, gangs_held=1)
ENDED = replace(RECORD, state=State.SUCCEEDED, attempt=1)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def of(sweep: Sweep | Showcase) -> tuple[SweepView, list[dict[str, Any]]]:
    """The view of a sweep's ledger, and its events."""
    events = list(read(sweep.paths.sweep(sweep.sweep_id).ledger))
    view = SweepView()
    for event in events:
        view.apply(event)
    return view, events


def detail(record: SweepRecord, sweep: Sweep | None = None) -> dict[str, Any]:
    """A sweep's detail, checked against its shape."""
    view, events = (SweepView(), []) if sweep is None else of(sweep)
    found = detail_document(record, told_by(view, events), {})
    shapes.SweepDetail.model_validate(found)
    return found


def test_a_list_which_has_no_plans_shows_the_cap_of_a_sweep_that_has_not_begun() -> None:
    listed = replace(RECORD, plan={}, summary=Summary(cap_bytes=16_000_000))

    assert sweep_document(listed)["cap_bytes"] == 16_000_000


def test_a_queued_sweep_tells_its_plan_before_anything_has_run() -> None:
    found = detail(RECORD)

    assert found["progress"]["finals_total"] == 16
    assert found["cap_bytes"] == 16_000_000
    assert found["axes"] == {WARMDOWN: "train", "final.prune.ratio": "final"}
    assert found["varying"] == [WARMDOWN, "final.prune.ratio"]
    assert found["status"] is None
    assert found["best"] is None


def test_a_waiting_sweep_says_what_it_waits_for_and_a_failed_one_does_not() -> None:
    reason = "1 of 1 gangs are in use"

    waiting = detail(replace(RECORD, state=State.WAITING, reason=reason))
    failed = detail(replace(RECORD, state=State.FAILED, reason=reason))

    assert waiting["waiting"] == reason
    assert failed["waiting"] is None
    assert failed["reason"] == reason


def test_the_list_shows_a_sweep_by_its_row_alone() -> None:
    summary = Summary(2, 1, 16, 3, 9, "f1", 1.13, 15_900_000, 16_000_000, 600.0, 4_800.0)

    found = sweep_document(replace(RUNNING, plan={}, summary=summary))

    shapes.Sweep.model_validate(found)
    assert found["progress"] == {
        "trainings_total": 2,
        "trainings_done": 1,
        "finals_total": 16,
        "finals_done": 3,
    }
    assert found["best"] == {"final": "f1", "val_bpb": 1.13, "artifact_bytes": 15_900_000}
    assert found["cap_bytes"] == 16_000_000


def test_a_sweep_without_a_cap_has_none_whatever_its_plan_said() -> None:
    found = sweep_document(replace(RUNNING, summary=Summary(num_events=1, cap_bytes=None)))

    assert found["cap_bytes"] is None


def test_the_detail_has_the_status_that_the_command_line_prints(sweep: Sweep) -> None:
    sweep.write()

    found = detail(replace(ENDED, summary=summary_of(of(sweep)[0])), sweep)

    assert found["status"]["state"] == "succeeded"
    assert found["status"]["finals"]["done"] == found["progress"]["finals_done"] == 16
    assert found["best"]["final"] == found["status"]["best"]["final"]
    json.dumps(found, allow_nan=False)


def test_the_budget_is_told_in_worker_seconds(tmp_path: Path) -> None:
    showcase = Showcase(tmp_path)
    showcase.write()

    found = told_by(*of(showcase)).budget

    assert found is not None
    assert found["limit_worker_s"] == pytest.approx(60.0 / 2.5 * 3_600)
    assert 0 < found["spent_worker_s"] < found["limit_worker_s"]


def test_a_sweep_without_a_budget_has_none(sweep: Sweep) -> None:
    sweep.write()

    assert detail(ENDED, sweep)["budget"] is None


def test_a_sweep_whose_driver_is_gone_does_not_run_whatever_its_ledger_says(sweep: Sweep) -> None:
    [first, _] = sweep.train_points()
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.begin(ledger, first)

    lost = detail(replace(RUNNING, state=State.LOST, gangs_held=0), sweep)
    live = detail(RUNNING, sweep)

    assert lost["status"]["state"] == "lost"
    assert lost["status"]["trainings"]["running"] == 0
    assert live["status"]["state"] == "running"
    assert live["status"]["trainings"]["running"] == 1


def test_trainings_are_told_in_the_order_in_which_they_began(sweep: Sweep) -> None:
    first, second = sweep.train_points()
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.begin(ledger, second)
        sweep.begin(ledger, first)
        sweep.end(ledger, first)
        ledger.append(
            "rung",
            training=stage_id("training", second, sweep.seed),
            step=3_000,
            val_bpb=1.2,
            verdict="go on",
            reason=None,
        )

    found = documents.training_documents(*of(sweep))

    shapes.TrainingPage.model_validate({"items": found, "next_cursor": None})
    assert [row["point"] for row in found] == [second, first]
    assert [row["state"] for row in found] == [State.RUNNING, State.SUCCEEDED]
    assert [row["steps"] for row in found] == [3_000, 7_000]
    assert found[0]["val_bpb"] is None
    assert found[1]["val_bpb"] == pytest.approx(1.1345)


def test_trainings_of_a_sweep_whose_driver_is_gone_are_lost(sweep: Sweep) -> None:
    [first, _] = sweep.train_points()
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.begin(ledger, first)
    rows = documents.training_documents(*of(sweep))

    [lost] = documents.without_runners(rows)

    assert lost["state"] == State.LOST
    assert rows[0]["state"] == State.RUNNING


def test_a_training_that_an_ended_sweep_did_not_finish_is_stopped(sweep: Sweep) -> None:
    [first, _] = sweep.train_points()
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.begin(ledger, first)
        sweep.finish(ledger, state="cancelled")

    [row] = documents.training_documents(*of(sweep))

    assert row["state"] == State.STOPPED
    assert "goes on with it" in row["reason"]


def test_finals_are_told_best_first_with_what_the_command_line_prints(sweep: Sweep) -> None:
    sweep.write()

    found = documents.final_documents(*of(sweep))

    shapes.FinalPage.model_validate({"items": found, "next_cursor": None})
    fit = [row["val_bpb"] for row in found if row["state"] == State.SUCCEEDED]
    assert fit == sorted(fit)
    assert len(found) == 16


def test_the_tree_hangs_trainings_under_the_trunk_that_left_their_state(sweep: Sweep) -> None:
    first, second = sweep.train_points()
    with sweep.open() as ledger:
        sweep.start(ledger)
        facts = {"state": "succeeded", "reason": None, "cached": False, "occupied_s": 9.0}
        ledger.append(
            "trunk_finished", trunk="aa", states=["a1", "a2"], steps_computed=900, **facts
        )
        for point, branch in ((first, "a2"), (second, None)):
            key = stage_id("training", point, sweep.seed)
            ledger.append(
                "training_started", training=key, point=point, seed=sweep.seed, branch=branch
            )
            sweep.end(ledger, point)
        sweep.score(ledger, sweep.final_points(first)[0])

    found = documents.tree_document(*of(sweep))

    shapes.Tree.model_validate(found)
    [trunk] = found["trunks"]
    assert (trunk["id"], trunk["steps"], trunk["branch"]) == ("aa", 900, None)
    assert [training["branch"] for training in found["trainings"]] == ["aa", None]
    assert sum(found["trainings"][0]["finals"].values()) == 1
    assert found["trainings"][0]["label"] == "warmdown_iters=2500"
    assert found["totals"]["trainings"]["done"] == 2


def test_the_pareto_front_has_no_final_that_another_beats_in_both(tmp_path: Path) -> None:
    showcase = Showcase(tmp_path)
    showcase.write()

    found = documents.pareto_document(*of(showcase))

    shapes.Pareto.model_validate(found)
    fit = [p for p in found["points"] if p["state"] == State.SUCCEEDED]
    front = [p for p in fit if p["is_front"]]
    assert 1 < len(front) < len(fit)
    for point in front:
        assert not any(
            other["val_bpb"] < point["val_bpb"]
            and other["artifact_bytes"] < point["artifact_bytes"]
            for other in fit
        )
    assert not any(p["is_front"] for p in found["points"] if p["state"] != State.SUCCEEDED)


def test_an_empty_ledger_gives_empty_documents() -> None:
    view = SweepView()

    assert documents.training_documents(view, []) == []
    assert documents.final_documents(view, []) == []
    assert documents.pareto_document(view, []) == {"cap_bytes": None, "points": []}
    shapes.Tree.model_validate(documents.tree_document(view, []))


ROWS = [{"id": f"r{number}", "state": State(state)} for number, state in enumerate(
    ["succeeded", "failed", "succeeded", "illegal", "succeeded"]
)]  # fmt: skip


def test_pages_give_every_row_once() -> None:
    seen, cursor = [], None
    for _ in range(3):
        page = page_of(ROWS, "id", 2, cursor, ())
        seen += page["items"]
        cursor = page["next_cursor"]

    assert seen == ROWS
    assert cursor is None


def test_a_page_goes_on_behind_its_row_when_better_ones_came_meanwhile() -> None:
    first = page_of(ROWS, "id", 2, None, ())
    newer = [{"id": "better", "state": State.SUCCEEDED}, *ROWS]

    second = page_of(newer, "id", 2, first["next_cursor"], ())

    assert second["items"] == ROWS[2:4]


def test_a_page_of_some_states_leaves_the_others_out() -> None:
    first = page_of(ROWS, "id", 2, None, {State.SUCCEEDED})
    second = page_of(ROWS, "id", 2, first["next_cursor"], {State.SUCCEEDED})

    assert [row["id"] for row in (*first["items"], *second["items"])] == ["r0", "r2", "r4"]


@pytest.mark.parametrize(
    "cursor", ["", "x", "é", "bnVsbA==", "WyJhZnRlciIsIm5vbmUiXQ==", "W" * 512]
)
def test_a_cursor_that_no_page_gave_is_refused(cursor: str) -> None:
    with pytest.raises(UsageError, match=r"cursor: .*begin without it"):
        page_of(ROWS, "id", 2, cursor, ())

"""What of a ledger is worth telling."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.ledger import Ledger, SweepView, read
from service.notices import Notice, Told, notices_of
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN, Sweep, final_result
from trainer.protocol import ARTIFACT_BYTES_CAP

SPACE = {WARMDOWN: [2500], EMA: [0.997], CLIP: ["none", "p5"], PRUNE: [0.0, 0.05]}
OVER = ARTIFACT_BYTES_CAP + 1


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path, sweep_id="told-1", space=SPACE)


@pytest.fixture
def writer(sweep: Sweep) -> Iterator[Ledger]:
    """The ledger of a sweep that has started."""
    with sweep.open() as ledger:
        sweep.start(ledger)
        yield ledger


def told(sweep: Sweep) -> list[Notice]:
    """All notices of a sweep's ledger, as a service derives them that reads it for the first
    time."""
    view, so_far, found = SweepView(), Told(), list[Notice]()
    for event in read(sweep.paths.sweep(sweep.sweep_id).ledger):
        view.apply(event)
        new, so_far = notices_of(view, event, so_far)
        found += new
    return found


def score(
    sweep: Sweep, writer: Ledger, number: int, bpb: float, *, num_bytes: int = 15_000_000,
    **overrides: Any,
) -> str:  # fmt: skip
    point = {WARMDOWN: 2500, EMA: 0.997, CLIP: "p5", PRUNE: number / 100}
    made_up = final_result(point, num_bytes)
    result = {**made_up, "artifact_bytes": num_bytes, "score": made_up["score"] | {"val_bpb": bpb}}
    return sweep.score(writer, point, **{"result": result, **overrides})


def restart(sweep: Sweep, writer: Ledger, **spec: Any) -> None:
    """Begin another run of a sweep, with other values in its spec."""
    started = writer.view.started
    facts = {key: value for key, value in started.items() if key not in ("seq", "event", "at")}
    spec = {**started["spec"], **spec}
    writer.append("sweep_started", **(facts | {"at": sweep.tick(1.0), "spec": spec}))


def test_only_a_better_final_is_a_new_best(sweep: Sweep, writer: Ledger) -> None:
    first = score(sweep, writer, 1, 1.20)
    score(sweep, writer, 2, 1.25)
    score(sweep, writer, 3, 1.20, num_bytes=15_000_001)
    second = score(sweep, writer, 4, 1.15)

    found = told(sweep)

    assert [(n.kind, n.facts["final"]) for n in found] == [("new_best", f) for f in (first, second)]
    assert found[1].facts["previous_bpb"] == 1.20
    assert found[1].text == "told-1: new best 1.1500 bpb in 15,000,000 bytes, " + (
        "wd2500 ema.997 clip=p5 prune.04"
    )
    assert found[1].at == writer.view.finals[second]["at"]


def test_what_does_not_fit_is_no_new_best(sweep: Sweep, writer: Ledger) -> None:
    score(sweep, writer, 1, 1.10, num_bytes=OVER, state="infeasible", reason="over the cap")
    score(sweep, writer, 2, 1.10, state="failed", reason="gone", result=None)

    assert told(sweep) == []


def test_an_illegal_final_is_told_with_its_reason(sweep: Sweep, writer: Ledger) -> None:
    final = score(sweep, writer, 1, 1.10, state="illegal", reason="audit: scored twice")

    (notice,) = told(sweep)

    assert (notice.kind, notice.key) == ("illegal", f"illegal:{final}")
    assert notice.text.endswith("audit: scored twice")
    assert notice.facts["val_bpb"] == 1.10


def test_a_confirmed_best_is_told_and_luck_of_the_search_is_not_told_after_it(
    sweep: Sweep, writer: Ledger
) -> None:
    restart(sweep, writer, seeds={"search": [1337], "confirm": [1337]})
    lucky = score(sweep, writer, 1, 1.10)
    score(sweep, writer, 1, 1.12, phase="confirm")
    score(sweep, writer, 2, 1.05)

    found = told(sweep)

    assert [n.key for n in found] == [f"best:{lucky}", f"confirmed:{lucky}"]
    assert found[1].facts["confirmed"]["mean_bpb"] == 1.12


def test_80_percent_of_a_budget_is_told_once_and_again_of_a_larger_one(
    sweep: Sweep, writer: Ledger
) -> None:
    (point,) = sweep.train_points()
    each_hours = 8 * 600 / 3_600  # a training of the made-up sweep: 600 s on 8 workers
    restart(sweep, writer, budget={"gpu_hours": each_hours * 2 / 0.8})
    sweep.train(writer, point)
    before = told(sweep)
    sweep.train(writer, point)
    sweep.train(writer, point)
    restart(sweep, writer, budget={"usd": each_hours * 8, "usd_per_gpu_hour": 2.0})
    sweep.train(writer, point)

    found = told(sweep)

    assert before == []
    assert [n.kind for n in found] == ["budget", "budget"]
    assert [round(n.facts["share"], 6) for n in found] == [0.8, 1.0]
    assert "2.67 of 3.33 GPU-hours" in found[0].text


def test_the_end_is_told_with_state_and_best(sweep: Sweep, writer: Ledger) -> None:
    score(sweep, writer, 1, 1.15)
    sweep.finish(writer, "stopped")
    sweep.finish(writer)

    _, early, late = told(sweep)

    assert (early.kind, early.facts["state"], late.facts["state"]) == (
        "done",
        "stopped",
        "succeeded",
    )
    assert late.facts["best"]["val_bpb"] == 1.15
    assert late.text == "told-1: succeeded; best 1.1500 bpb in 15,000,000 bytes"


def test_a_pause_is_no_end(sweep: Sweep, writer: Ledger) -> None:
    facts = {"state": "stopped", "cache_hits": 0, "reason": "paused by ann", "order": "pause"}
    writer.append("sweep_finished", at=sweep.tick(1.0), **facts)

    assert told(sweep) == []


def test_the_same_ledger_tells_the_same_under_keys_of_their_own(
    sweep: Sweep, writer: Ledger
) -> None:
    for number, bpb in enumerate((1.3, 1.2, 1.4, 1.1)):
        score(sweep, writer, number, bpb, state="illegal" if bpb == 1.4 else "succeeded")
    sweep.finish(writer, "cancelled")
    sweep.finish(writer)

    found = told(sweep)

    assert found == told(sweep)
    assert len({notice.key for notice in found}) == len(found) == 6

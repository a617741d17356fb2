"""Knobs of a sweep that changed nothing are found, and no others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service import report
from service.cli import app
from service.knobs import dead_knobs, in_words
from service.ledger import SweepView, replay
from service.report_page import draw_page
from tests.ledgers import CLIP, EMA, NTK, PRUNE, WARMDOWN, WINDOW, Sweep, final_result
from tests.tiny import recipe
from trainer.finalize.pipeline import finalize
from trainer.model.build import build


def view_of(folder: Path, **facts: Any) -> SweepView:
    return replay(Sweep(folder, **facts).write())


def test_a_knob_that_changes_no_byte_is_dead(tmp_path: Path) -> None:
    view = view_of(tmp_path, dead=(CLIP,))

    (found,) = dead_knobs(view)

    assert (found.knob, found.values, found.severity) == (CLIP, ("none", "p5"), "dead")
    assert (found.compared, found.identical) == (8, 8)
    points = [view.finals[final]["point"] for final in found.example]
    assert {path for path in points[0] if points[0][path] != points[1][path]} == {CLIP}


def test_knobs_that_act_are_not_reported(tmp_path: Path) -> None:
    assert dead_knobs(view_of(tmp_path)) == ()


def test_a_dead_knob_of_a_training_is_seen_in_the_finals_of_its_banks(tmp_path: Path) -> None:
    (found,) = dead_knobs(view_of(tmp_path, dead=(WARMDOWN,)))

    assert (found.knob, found.values, found.identical) == (WARMDOWN, (2500, 3500), 8)


def test_only_the_values_that_came_out_alike_are_named(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, space={CLIP: ["p9", "p5", "none", "p3"], PRUNE: [0.0, 0.05]})
    alike = {"p3": "p5"}
    with sweep.open() as ledger:
        sweep.start(ledger)
        for point in sweep.final_points({}):
            acting = {**point, CLIP: alike.get(point[CLIP], point[CLIP])}
            sweep.score(ledger, point, result=final_result(acting, 10))

        (found,) = dead_knobs(ledger.view)

    assert (found.knob, found.values) == (CLIP, ("p3", "p5"))
    assert (found.compared, found.identical, found.severity) == (2, 2, "dead")


def test_a_knob_that_acts_in_some_places_only_is_partly_dead(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, space={CLIP: ["p3", "p5"], PRUNE: [0.0, 0.05]})
    with sweep.open() as ledger:
        sweep.start(ledger)
        for point in sweep.final_points({}):
            acting = {**point, CLIP: "p5"} if point[PRUNE] == 0.0 else point
            sweep.score(ledger, point, result=final_result(acting, 10))

        (found,) = dead_knobs(ledger.view)

    assert (found.severity, found.compared, found.identical) == ("partly", 2, 1)


def test_finals_of_different_seeds_are_never_compared(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, space={CLIP: ["p3", "p5"]}, dead=(CLIP,))
    with sweep.open() as ledger:
        sweep.start(ledger)
        for seed, point in zip((1, 2), sweep.final_points({}), strict=True):
            sweep.seed = seed
            sweep.score(ledger, point)

        assert dead_knobs(ledger.view) == ()


def test_a_final_without_a_result_is_left_out(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, space={CLIP: ["p3", "p5"]}, dead=(CLIP,))
    first, second = sweep.final_points({})
    with sweep.open() as ledger:
        sweep.start(ledger)
        sweep.score(ledger, first)
        sweep.score(ledger, second, state="failed", reason="gone", result=None)

        assert dead_knobs(ledger.view) == ()


@pytest.mark.parametrize(("moves", "num_found"), [(0.0, 1), (1e-9, 0)])
def test_a_knob_of_evaluation_is_judged_by_the_score(
    tmp_path: Path, moves: float, num_found: int
) -> None:
    found = dead_knobs(_two_scores(Sweep(tmp_path, space={WINDOW: [512, 1024]}), moves))

    assert len(found) == num_found


def test_a_knob_of_the_model_is_dead_though_it_stands_in_the_header(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, space={NTK: [1024, 2048]})

    (found,) = dead_knobs(_two_scores(sweep, 0.0, names=("a", "b")))

    assert (found.knob, found.values) == (NTK, (1024, 2048))


def test_a_knob_of_the_final_is_judged_by_its_bytes_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, space={CLIP: ["p3", "p5"]})

    assert dead_knobs(_two_scores(sweep, 0.0, names=("a", "b"))) == ()


def _two_scores(sweep: Sweep, moves: float, names: tuple[str, str] = ("a", "a")) -> SweepView:
    """Two finals of a knob: weights files of the given names, the second's bpb moved."""
    with sweep.open() as ledger:
        sweep.start(ledger)
        points = [{path: value} for path, values in sweep.space.items() for value in values]
        for number, (point, name) in enumerate(zip(points, names, strict=True)):
            result = final_result({}, 10)
            result["weights_sha256"] = name
            result["score"]["val_bpb"] += number * moves
            sweep.score(ledger, point, result=result)
        return ledger.view


@pytest.mark.parametrize(("scale_floor", "is_dead"), [(1.0, True), (1e-12, False)])
def test_a_clip_under_a_floor_that_always_rules_is_dead_in_real_artifacts(
    tmp_path: Path, scale_floor: float, is_dead: bool
) -> None:
    # A scale floor above every row's clip: the searches agree, whatever they are called.
    asked = recipe({"final.quantize.scale_floor": scale_floor})
    state = build(asked.model, seed=1).state_dict()
    sweep = Sweep(tmp_path, space={CLIP: ["p3", "p5"]})
    with sweep.open() as ledger:
        sweep.start(ledger)
        for point in sweep.final_points({}):
            quantize = replace(asked.final.quantize, clip=point[CLIP])
            final = replace(asked.final, quantize=quantize)
            report_ = finalize(state, asked.model, final, tmp_path / point[CLIP], "0" * 64)
            result = final_result(point, 10) | {"weights_sha256": report_.weights_sha256}
            sweep.score(ledger, point, result=result)

        found = dead_knobs(ledger.view)

    assert [(dead.knob, dead.values, dead.identical) for dead in found] == (
        [(CLIP, ("p3", "p5"), 1)] if is_dead else []
    )


def test_status_page_and_table_tell_of_a_dead_knob(tmp_path: Path) -> None:
    view = view_of(tmp_path, dead=(CLIP, EMA))
    sentence = "final.quantize.clip: none and p5 gave the same result in 8 of 8 pairs"

    records = report.status_document(view)["dead_knobs"]

    assert [record["knob"] for record in records] == [EMA, CLIP]
    assert records[1]["values"] == ["none", "p5"]
    assert in_words(dead_knobs(view)[1]) == sentence
    assert sentence in " ".join(report.text_table(view).split())
    assert sentence in draw_page(view)


def test_status_as_json_has_the_dead_knobs_for_scripts(tmp_path: Path) -> None:
    Sweep(tmp_path, dead=(CLIP,)).write()

    result = CliRunner().invoke(app, ["status", "--home", str(tmp_path), "-o", "json"])

    (record,) = json.loads(result.stdout)["dead_knobs"]
    assert (record["knob"], record["severity"], record["identical"]) == (CLIP, "dead", 8)


def test_a_sweep_without_dead_knobs_says_nothing_of_them(tmp_path: Path) -> None:
    view = view_of(tmp_path)

    assert report.status_document(view)["dead_knobs"] == []
    assert "same result" not in report.text_table(view) + draw_page(view)

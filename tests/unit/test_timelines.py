"""Where a training's seconds went, read from its journal."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from service.ledger import SweepView
from service.timelines import MAX_TIMELINES, Timeline, read_timelines

CLOCK = {"setup": 5.0, "warmup": 2.0, "train": 40.0, "validate": 6.0, "bank": 1.5}


def read(home: Path, lines: Iterable[dict[str, Any]], **result: Any) -> list[Timeline]:
    """The timeline of one training of 40 steps with this journal."""
    view = SweepView(started={"spec": {}})
    facts = {"steps": 40, "steps_computed": 40, "clock_s": CLOCK, **result}
    event = {"training": "t1", "point": {"train.seed": 1}, "seed": 1, "result": facts}
    view.trainings["t1"] = event
    view.trunks = {"k": {}} if facts["steps_computed"] < 40 else {}
    path = home / "trainings" / "t1" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_timelines(view, home)


def line(step: int, at: float, **values: float) -> dict[str, Any]:
    names = {"loss": "train/loss", "scale": "train/lr_scale", "clock": "train/clock_s"}
    return {"step": step, "at": at} | {names.get(k, "val/bpb"): v for k, v in values.items()}


def bands(timeline: Timeline) -> list[tuple[str, float, float]]:
    return [(band.phase, band.start_s, band.end_s) for band in timeline.bands]


def test_every_second_of_a_training_has_its_phase(tmp_path: Path) -> None:
    lines = [
        line(0, 100.0, bpb=4.1),
        line(10, 112.0, loss=3.0, scale=1.0, clock=10.0),  # 2 s of warm-up before
        line(20, 122.0, loss=2.5, scale=1.0, clock=20.0),
        line(20, 125.0, bpb=1.4),
        line(30, 136.0, loss=2.2, scale=0.5, clock=30.0),  # 1 s for a checkpoint before
        line(40, 146.0, loss=2.0, scale=0.1, clock=40.0),
    ]

    (timeline,) = read(tmp_path, lines)

    assert bands(timeline) == [
        ("setup", 0.0, 5.0), ("warm-up", 5.0, 7.0), ("train", 7.0, 27.0),
        ("validate", 27.0, 30.0), ("checkpoint or wait", 30.0, 31.0), ("warmdown", 31.0, 51.0),
        ("bank", 51.0, 52.5),
    ]  # fmt: skip
    assert [mark.at_s for mark in timeline.loss] == [17.0, 27.0, 41.0, 51.0]
    assert [(mark.at_s, mark.value) for mark in timeline.val_bpb] == [(5.0, 4.1), (30.0, 1.4)]


def test_the_time_between_a_trunk_and_its_tail_is_cut(tmp_path: Path) -> None:
    lines = [
        line(0, 100.0, bpb=4.1),
        line(20, 120.0, loss=2.5, scale=1.0, clock=20.0),
        line(30, 4_130.0, loss=2.2, scale=0.5, clock=30.0),
        line(40, 4_140.0, loss=2.0, scale=0.1, clock=40.0),
    ]

    (timeline,) = read(tmp_path, lines, steps_computed=20)

    assert bands(timeline) == [
        ("setup", 0.0, 5.0), ("trunk", 5.0, 25.0), ("warmdown", 25.0, 45.0), ("bank", 45.0, 46.5),
    ]  # fmt: skip


def test_a_journal_without_a_clock_is_all_training(tmp_path: Path) -> None:
    lines = [line(0, 100.0, loss=6.0), line(10, 110.0, loss=3.0)]

    (timeline,) = read(tmp_path, lines, clock_s={})

    assert bands(timeline) == [("train", 0.0, 10.0)]


@pytest.mark.parametrize("text", ["", "no journal\n", '{"step": 0, "at": 1.0}\n'])
def test_a_journal_that_tells_nothing_is_left_out(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "trainings" / "t1"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(text)
    view = SweepView(started={"spec": {}})
    view.trainings["t1"] = {"training": "t1", "point": {}, "seed": 1, "result": None}

    assert read_timelines(view, tmp_path) == []


def test_so_many_trainings_are_shown_and_no_more(tmp_path: Path) -> None:
    view = SweepView(started={"spec": {}})
    for number in range(MAX_TIMELINES + 5):
        key = f"t{number}"
        view.trainings[key] = {"training": key, "point": {}, "seed": 1, "result": None}
        path = tmp_path / "trainings" / key / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(line(1, 1.0, loss=3.0)) + "\n")

    assert len(read_timelines(view, tmp_path)) == MAX_TIMELINES

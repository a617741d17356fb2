"""What a terminal shows of a sweep of a service."""

import io
from typing import Any

from rich.console import Console

from service.watch import render

DETAIL: dict[str, Any] = {
    "id": "warmdown-3f9a2c",
    "state": "running",
    "owner": "alice",
    "reason": None,
    "waiting": None,
    "attempt": 1,
    "started_at": 1000.0,
    "ended_at": None,
    "progress": {
        "trainings_total": 4,
        "trainings_done": 1,
        "finals_total": 320,
        "finals_done": 17,
    },
    "best": {"final": "f" * 20, "val_bpb": 1.12347, "artifact_bytes": 15_812_345},
    "cap_bytes": 15_900_000,
    "worker_seconds": 7200.0,
    "budget": {"limit_worker_s": 57_600.0, "spent_worker_s": 7_200.0},
    "varying": ["train.schedule.warmdown_iters", "final.quantize.clip"],
}
FINAL = {
    "point": {"train.schedule.warmdown_iters": 3500, "final.quantize.clip": "[bold]p5"},
    "val_bpb": 1.12347,
    "artifact_bytes": 15_812_345,
    "state": "succeeded",
}


def shown(detail: dict[str, Any], *finals: dict[str, Any], now: float = 4661.0) -> str:
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(render(detail, finals, now))
    return out.getvalue()


def test_a_running_sweep_shows_its_progress_its_best_and_what_it_has_spent() -> None:
    text = shown(DETAIL, FINAL)

    assert "warmdown-3f9a2c  running  by alice  1:01:01" in text
    assert "1 of 4" in text
    assert "17 of 320" in text
    assert "2.00 of 16.00 GPU-hours" in text
    assert "1.1235 bpb in 15,812,345 of 15,900,000 bytes" in text


def test_knobs_stand_over_the_finals_values_as_plain_text() -> None:
    header, row = shown(DETAIL, FINAL).splitlines()[-2:]

    assert header.split() == ["warmdown_iters", "clip", "val_bpb", "bytes", "state"]
    assert row.split() == ["3500", "[bold]p5", "1.1235", "15,812,345", "succeeded"]


def test_a_knob_that_a_point_does_not_have_is_a_dash() -> None:
    final = {**FINAL, "point": {"final.quantize.clip": "p5"}, "val_bpb": None, "state": "failed"}

    assert shown(DETAIL, final).splitlines()[-1].split()[0] == "-"


def test_a_sweep_that_waits_says_why() -> None:
    detail = {**DETAIL, "state": "waiting", "reason": "1 of 1 gangs are in use", "best": None}

    text = shown({**detail, "started_at": None, "budget": None})

    assert "waiting" in text
    assert "1 of 1 gangs are in use" in text
    assert "2.00 worker-hours" in text


def test_time_stands_still_when_the_sweep_has_ended() -> None:
    text = shown({**DETAIL, "state": "succeeded", "ended_at": 1060.0, "attempt": 3})

    assert "succeeded  by alice  0:01:00  attempt 3" in text

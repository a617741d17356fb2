"""Reading metrics.jsonl while a training writes it."""

import logging
from pathlib import Path

import pytest

from service.curves import Curve
from tests.ledgers import curve_lines


def test_reading_in_pieces_gives_what_reading_at_once_gives(tmp_path: Path) -> None:
    lines = list(curve_lines(0.0, range(0, 3_000, 100)))
    growing, whole = tmp_path / "growing.jsonl", tmp_path / "whole.jsonl"
    whole.write_text("".join(lines))
    curve, pieces = Curve(), []

    for line in lines:
        with growing.open("a") as file:
            file.write(line)
        pieces += curve.read(growing)

    assert pieces == Curve().read(whole)
    assert len(pieces) == 30 * 2 + 3


def test_torn_last_line_is_left_until_it_is_whole(tmp_path: Path) -> None:
    path, curve = tmp_path / "metrics.jsonl", Curve()
    first, second = curve_lines(0.0, range(100, 300, 100))
    path.write_text(first + second[:20])
    num_before = len(curve.read(path))

    path.write_text(first + second)

    assert num_before == 2
    assert {point.step for point in curve.read(path)} == {200}


def test_steps_that_a_resumed_training_repeats_are_taken_once(tmp_path: Path) -> None:
    path, curve = tmp_path / "metrics.jsonl", Curve()
    path.write_text("".join(curve_lines(0.0, range(0, 500, 100))))
    curve.read(path)

    path.write_text("".join(curve_lines(9.0, range(0, 300, 100))))
    cut_back = curve.read(path)
    with path.open("a") as file:
        file.writelines(curve_lines(9.0, range(300, 700, 100)))

    assert cut_back == []
    assert sorted({point.step for point in curve.read(path)}) == [500, 600]


def test_damaged_line_is_skipped_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "at": 1.0, "a": 1}\n{"step": {"step": 2}\n{"step": 3, "at": 2, "a": 3}\n'
    )

    with caplog.at_level(logging.WARNING):
        points = Curve().read(path)

    assert [point.step for point in points] == [1, 3]
    assert str(path) in caplog.text


def test_missing_curve_has_no_points(tmp_path: Path) -> None:
    assert Curve().read(tmp_path / "absent.jsonl") == []

"""Short names of knobs, points and runs."""

from hypothesis import given
from hypothesis import strategies as st

from service.labels import MAX_RUN_NAME, knob_names, run_name, short_value
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN


def test_run_name_tells_the_point() -> None:
    point = {WARMDOWN: 40, EMA: 0.98, CLIP: "p5", PRUNE: 0.05}

    assert run_name(point, "f" * 64) == "wd40 ema.98 clip=p5 prune.05"


def test_seed_is_told_where_there_are_several() -> None:
    assert run_name({WARMDOWN: 40}, "f" * 64, seed=7) == "wd40 s7"


def test_knobs_with_the_same_short_name_keep_their_paths() -> None:
    paths = ["a.matrix.lr", "b.matrix.lr", "train.iterations"]

    names = knob_names(paths)

    assert list(names.values()) == ["a.matrix.lr", "b.matrix.lr", "iterations"]


def test_values_are_told_apart_by_type() -> None:
    assert [short_value(v) for v in (None, True, 0.5, 3, "p5")] == ["none", "on", "0.5", "3", "p5"]


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2, unique=True))
def test_different_points_have_different_names(ratios: list[float]) -> None:
    names = {run_name({PRUNE: ratio}, f"{index}{'0' * 63}") for index, ratio in enumerate(ratios)}

    assert len(names) == 2


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-1e9, 1e9), max_size=8))
def test_run_name_is_short(point: dict[str, float]) -> None:
    assert len(run_name(point, "f" * 64)) <= MAX_RUN_NAME


def test_points_that_differ_in_the_fifth_digit_have_different_names() -> None:
    first = run_name({PRUNE: 0.0483921}, "a" * 64)
    second = run_name({PRUNE: 0.0483922}, "b" * 64)

    assert first.startswith("prune.04839 ")
    assert first != second

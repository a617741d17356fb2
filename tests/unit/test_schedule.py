import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.optim.schedule import lr_scale
from trainer.specs.train import Schedule, TrainSpec


def spec(max_clock_s=None, **schedule):
    return TrainSpec(
        iterations=1000,
        batch_tokens=8,
        seq_len=8,
        max_clock_s=max_clock_s,
        schedule=Schedule(**schedule),
    )


@pytest.mark.parametrize(
    ("step", "scale"), [(0, 1.0), (600, 1.0), (601, 0.9975), (800, 0.5), (999, 0.0025)]
)
def test_by_steps_the_rate_falls_linearly_over_the_last_ones(step, scale):
    assert lr_scale(spec(warmdown_iters=400), step, 0.0) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("step", "elapsed_s", "scale"),
    [
        (0, 0.0, 1.0),  # nothing is known yet
        (1, 2.0, 0.1225),  # a slow first step is all that is known: 800 s of warmdown, 98 s left
        (100, 10.0, 1.0),  # 0.1 s a step: 40 s of warmdown, 90 s left
        (600, 60.0, 1.0),  # exactly where it begins
        (800, 80.0, 0.5),
        (300, 60.0, 0.5),  # twice as slow: 80 s of warmdown, 40 s left
        (990, 99.0, 0.025),
        (999, 101.0, 0.0),
    ],
)
def test_by_wallclock_the_rate_falls_over_the_time_that_the_steps_would_take(
    step, elapsed_s, scale
):
    told = spec(max_clock_s=100.0, basis="wallclock", warmdown_iters=400)

    assert lr_scale(told, step, elapsed_s) == pytest.approx(scale)


def test_without_warmdown_the_rate_is_constant():
    told = spec(warmdown_iters=0)

    assert {lr_scale(told, step, 0.0) for step in range(1000)} == {1.0}


def test_the_rate_never_falls_below_its_floor():
    told = spec(warmdown_iters=400, min_lr_scale=0.1)

    assert lr_scale(told, 999, 0.0) == 0.1
    assert lr_scale(told, 800, 0.0) == 0.5


@given(st.integers(0, 999), st.integers(1, 1000), st.floats(0.0, 0.9))
def test_the_rate_never_rises_and_stays_within_floor_and_one(step, warmdown, floor):
    told = spec(warmdown_iters=warmdown, min_lr_scale=floor)

    now, later = lr_scale(told, step, 0.0), lr_scale(told, step + 1, 0.0)

    assert floor <= later <= now <= 1.0

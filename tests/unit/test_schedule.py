import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.optim.schedule import has_begun, has_departed, lr_scale, progress
from trainer.specs.task import Departure
from trainer.specs.train import Averages, Late, Qat, Schedule, Swa, TrainSpec


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


FRACTION = (
    (0, 1.0),
    (280, 1.0),  # exactly where it begins
    (281, 719 / 720),
    (640, 0.5),
    (999, 0.1),  # 1/720 is below the floor
)


@pytest.mark.parametrize(("step", "scale"), FRACTION)
def test_a_warmdown_can_be_a_share_of_the_steps(step, scale):
    told = spec(warmdown_iters=0, warmdown_fraction=0.72, min_lr_scale=0.1)

    assert lr_scale(told, step, 0.0) == pytest.approx(scale)


@pytest.mark.parametrize(("tenths_s", "scale"), FRACTION)
@pytest.mark.parametrize("step", [1, 999])
def test_a_warmdown_can_be_a_share_of_the_clock_whatever_the_pace(tenths_s, scale, step):
    told = spec(
        max_clock_s=100.0,
        basis="wallclock",
        warmdown_iters=0,
        warmdown_fraction=0.72,
        min_lr_scale=0.1,
    )

    assert lr_scale(told, step, tenths_s / 10) == pytest.approx(scale)
    assert lr_scale(told, step, 101.0) == 0.1


def test_progress_is_the_share_of_the_steps_or_of_the_clock():
    by_steps = spec(warmdown_iters=0)
    by_clock = spec(max_clock_s=100.0, basis="wallclock")

    assert [progress(by_steps, step, 50.0) for step in (0, 250, 1000)] == [0.0, 0.25, 1.0]
    assert [progress(by_clock, 999, s) for s in (0.0, 25.0, 120.0)] == [0.0, 0.25, 1.0]


def test_what_is_late_begins_below_a_rate_or_at_a_share_of_the_run():
    by_rate, by_progress = Late(lr_scale=0.15), Late(progress=0.96)

    assert [has_begun(by_rate, scale, 0.99) for scale in (1.0, 0.15, 0.149)] == [False, False, True]
    assert [has_begun(by_progress, 0.0, done) for done in (0.0, 0.959, 0.96)] == [
        False,
        False,
        True,
    ]


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


def test_by_steps_a_training_departs_before_its_step():
    departure, trunk = Departure(step=600), spec(warmdown_iters=0)

    assert not has_departed(departure, trunk, 599, 1e9)
    assert has_departed(departure, trunk, 600, 0.0)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "give either step or schedule"),
        ({"step": 5, "schedule": Schedule(basis="wallclock")}, "give either step or schedule"),
        ({"step": 0}, "step=0 must be above 0"),
        ({"schedule": Schedule()}, "schedule.basis=steps departs at a step: give that"),
        ({"step": 5, "starts": (Late(progress=0.5),)}, "starts beside step=5: drop starts"),
    ],
)
def test_a_departure_is_a_step_or_a_time(told, said):
    with pytest.raises(ValueError, match=rf"^{said}$"):
        Departure(**told)


@pytest.mark.parametrize(
    ("schedule", "step", "at_s"),
    [
        ({"warmdown_iters": 400}, 600, 60.0),
        ({"warmdown_iters": 400}, 300, 100.0 / (1 + 400 / 300)),  # twice the pace
        ({"warmdown_iters": 0, "warmdown_fraction": 0.25}, 5, 75.0),
    ],
)
def test_by_wall_clock_it_departs_when_its_rate_would_fall(schedule, step, at_s):
    own = Schedule(basis="wallclock", **schedule)
    # The trunk's own rate never falls, and has late parts that only its own schedule reaches.
    trunk = spec(max_clock_s=100.0, basis="wallclock", warmdown_iters=0)

    assert not has_departed(Departure(schedule=own), trunk, step, at_s - 0.01)
    assert has_departed(Departure(schedule=own), trunk, step, at_s + 0.01)
    told = spec(max_clock_s=100.0, basis="wallclock", **schedule)
    assert lr_scale(told, step, at_s - 0.01) == 1.0 > lr_scale(told, step, at_s + 0.01)


@pytest.mark.parametrize("late", [Late(progress=0.5), Late(lr_scale=0.9)])
def test_by_wall_clock_it_departs_when_something_of_it_begins(late):
    never = Schedule(basis="wallclock", warmdown_iters=400)
    departure = Departure(schedule=never, starts=(late,))
    trunk = spec(max_clock_s=100.0, basis="wallclock", warmdown_iters=0)

    begins_s = 50.0 if late.progress else 60.0
    assert not has_departed(departure, trunk, 600, begins_s - 0.01)
    assert has_departed(departure, trunk, 600, begins_s + 0.01)


def test_what_a_trunk_has_of_its_own_does_not_disturb_who_departs():
    low = Late(lr_scale=0.1)
    trunk = TrainSpec(
        iterations=1000,
        batch_tokens=8,
        seq_len=8,
        max_clock_s=100.0,
        schedule=Schedule(basis="wallclock", warmdown_iters=100),
        averages=Averages(swa=Swa(start=low)),
        qat=Qat(mlp_bits=6, start=low),
    )
    # Its rate never falls as low as what the trunk has begins at.
    own = Schedule(basis="wallclock", warmdown_iters=100, min_lr_scale=0.5)

    assert not has_departed(Departure(schedule=own), trunk, 500, 50.0)
    assert has_departed(Departure(schedule=own), trunk, 950, 95.0)

from contextlib import suppress

import pytest

from trainer.runtime.clock import Clock


class Time:
    """A clock that is moved by hand."""

    def __init__(self):
        self.at_s = 100.0

    def __call__(self):
        return self.at_s

    def pass_s(self, seconds):
        self.at_s += seconds


@pytest.fixture
def time():
    return Time()


def test_every_second_is_charged_to_exactly_one_phase(time):
    clock = Clock(now=time)
    time.pass_s(1)
    with clock.phase("train"):
        time.pass_s(2)
        with clock.phase("validate"):
            time.pass_s(4)
        time.pass_s(8)
    time.pass_s(16)

    seconds = clock.stop()

    assert seconds == {"setup": 17.0, "train": 10.0, "validate": 4.0}


def test_elapsed_counts_the_running_phase_and_no_other(time):
    clock = Clock(now=time)
    with clock.phase("train"):
        time.pass_s(3)
    with clock.phase("validate"):
        time.pass_s(5)

        assert clock.elapsed_s("validate") == 5.0
        assert clock.elapsed_s("train") == 3.0
        assert clock.elapsed_s("bank") == 0.0


def test_a_phase_that_raises_still_ends(time):
    clock = Clock(now=time)
    with suppress(KeyError), clock.phase("train"):
        time.pass_s(3)
        raise KeyError
    time.pass_s(5)

    assert clock.stop() == {"setup": 5.0, "train": 3.0}


def test_earlier_seconds_are_gone_on_from(time):
    clock = Clock(now=time)
    clock.seconds["train"] = 40.0

    with clock.phase("train"):
        time.pass_s(2)

    assert clock.elapsed_s("train") == 42.0


def test_queued_work_is_paid_by_the_phase_that_queued_it(time):
    clock = Clock(now=time, settle=lambda: time.pass_s(7))

    with clock.phase("train"):
        in_the_middle = clock.elapsed_s("train")

    assert in_the_middle == 7.0
    assert clock.elapsed_s("train") == 14.0

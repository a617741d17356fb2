"""Clocks for tests of what follows from time: no stall of the machine counts on them."""

import time
from functools import partial

import pytest

from trainer.runtime.clock import Clock
from trainer.train import loop


class Ticking:
    """A clock on which nothing takes time but to look at it: `tick_s` each time."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s = tick_s
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def trainings_tick(patch: pytest.MonkeyPatch, tick_s: float = 0.01) -> None:
    """Give the trainings of this process a clock that ticks; they look a few times a step."""
    patch.setattr(loop, "Clock", partial(Clock, now=Ticking(tick_s)))


def trainings_count_work(patch: pytest.MonkeyPatch) -> None:
    """Give them a clock that stands still while others have the machine."""
    patch.setattr(loop, "Clock", partial(Clock, now=time.thread_time))

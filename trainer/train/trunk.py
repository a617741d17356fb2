"""A trunk: the beginning that several trainings share, run once. It leaves a state at each place
where one of them departs.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UsageError
from trainer.optim.schedule import has_departed
from trainer.runtime.distributed import Ranks
from trainer.specs.task import Departure, TrainTask
from trainer.train.departures import leave, read_state
from trainer.train.loop import Loop

logger = logging.getLogger(__name__)

States = Sequence[tuple[Departure, Path]]
_OPEN = (-1, -1.0)  # in place of a step and a train clock: not left yet


class Trunk:
    """The states a trunk is to leave, and which of them lie on disk already."""

    def __init__(self, task: TrainTask, states: States, ranks: Ranks) -> None:
        self.task = task
        iterations = task.train.iterations
        for departure, path in states:
            if departure.step is not None and departure.step > iterations:
                raise UsageError(
                    f"{path}: departs at step {departure.step} of a trunk of {iterations}; "
                    "lengthen the trunk"
                )
        places = _places([path for _, path in states], ranks)
        self.open = [state for state, place in zip(states, places, strict=True) if place == _OPEN]
        self.left = [
            (place, path) for (_, path), place in zip(states, places, strict=True) if place != _OPEN
        ]

    def grow(self, loop: Loop, start: Path | None) -> None:
        """Run from what is furthest, `start` or step 0 until all have departed.

        By wall clock a trunk has no parent, so `start` is a later state of its own where it lies
        beyond one that is open: then the run begins before both. By steps that is a UsageError.
        """
        starts = [path for place, path in self.left if not self._is_beyond(*place)]
        if start is not None:
            (place,) = _places([start], loop.ranks)
            by_clock = all(departure.step is None for departure, _ in self.open)
            if by_clock and self._is_beyond(*place):
                logger.warning("%s: lies beyond a departure; falling back to what is before", start)
            else:
                starts = [start, *starts]
        loop.begin(starts, self._is_beyond)
        self.left_at = loop.first_step
        with loop.clock.phase("train"):
            self._leave(loop, self._departing(loop))
            while self.open:
                loop.step()
                departing = self._departing(loop)
                # For who departs the run is not over: what only its end shows is not shown here.
                loop.observe(is_over=False, goes_on=bool(self.open))
                self._leave(loop, departing)

    def _is_beyond(self, step: int, train_clock_s: float) -> bool:
        """Whether a run that stands there can no longer leave all that is open. By the clock one
        that has departed already did so at a step that nobody knows."""
        return any(
            has_departed(departure, self.task.train, step, train_clock_s)
            if departure.step is None
            else step > departure.step
            for departure, _ in self.open
        )

    def _leave(self, loop: Loop, departing: list[Path]) -> None:
        for path in departing:
            with loop.clock.phase("checkpoint"):
                loop.settle_loss()
                leave(loop.state, loop.kin, path, loop.journal, loop.state.step - self.left_at)
            self.left_at = loop.state.step

    def _departing(self, loop: Loop) -> list[Path]:
        """Take out what departs before the coming step: at the end of the run, all."""
        spec, step, elapsed_s = self.task.train, loop.state.step, loop.runner.elapsed_s
        is_over = loop.is_over()
        due = [
            (departure, path)
            for departure, path in self.open
            if is_over or has_departed(departure, spec, step, elapsed_s)
        ]
        self.open = [state for state in self.open if state not in due]
        return [path for _, path in due]


def _places(paths: Sequence[Path], ranks: Ranks) -> list[tuple[int, float]]:
    """Where on its way each state was left: after how many steps, with what on the train clock."""
    # The first rank's word, or a rank that sees a file later would wait for the others.
    found = ranks.together(
        lambda: [_place_left(path) if ranks.is_first else _OPEN for path in paths]
    )
    return [(int(ranks.max(step)), ranks.max(clock_s)) for step, clock_s in found]


def _place_left(path: Path) -> tuple[int, float]:
    if not (path / "result.json").is_file():
        return _OPEN
    state = read_state(path)
    return state.step, state.train_clock_s

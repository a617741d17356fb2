"""A trunk: the beginning that several trainings share, run once. It leaves a state at each place
where one of them departs.
"""

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UsageError
from trainer.optim.schedule import has_departed
from trainer.runtime.distributed import Ranks
from trainer.specs.task import Departure, TrainTask
from trainer.train.departures import leave, read_state
from trainer.train.loop import Loop

States = Sequence[tuple[Departure, Path]]
_OPEN = -1  # in place of a step: not left yet


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
        # The first rank's word, or a rank that sees a file later would wait for the others.
        found = ranks.together(
            lambda: [_step_left(path) if ranks.is_first else _OPEN for _, path in states]
        )
        steps = [int(ranks.max(step)) for step in found]
        self.open = [state for state, step in zip(states, steps, strict=True) if step == _OPEN]
        self.left = [
            (step, path) for (_, path), step in zip(states, steps, strict=True) if step != _OPEN
        ]

    @property
    def first_departure(self) -> int | None:
        """The step of the first state that is to be left; None where only the clock can tell."""
        steps = [departure.step for departure, _ in self.open if departure.step is not None]
        return min(steps, default=None)

    def grow(self, loop: Loop, start: Path | None) -> None:
        """Run from what is furthest, `start` or step 0 until all have departed."""
        until = self.first_departure
        own = [path for step, path in self.left if until is None or step <= until]
        loop.begin(own if start is None else [start, *own], until)
        self.left_at = loop.first_step
        with loop.clock.phase("train"):
            self._leave(loop, self._departing(loop))
            while self.open:
                loop.step()
                departing = self._departing(loop)
                # For who departs the run is not over: what only its end shows is not shown here.
                loop.observe(is_over=False, goes_on=bool(self.open))
                self._leave(loop, departing)

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


def _step_left(path: Path) -> int:
    return read_state(path).step if (path / "result.json").is_file() else _OPEN

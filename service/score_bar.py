"""How far a score is, on stderr: a bar with the time left on a terminal, a line now and then
otherwise."""

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from service.talk import Talk


class ScoreBar:
    """A `trainer.evaluate.progress.Progress` for `total` predictions."""

    LINE_EVERY_S = 10.0

    def __init__(self, talk: Talk, total: int) -> None:
        self.talk = talk
        self.total = total
        self.done = 0
        self._skipped = 0
        self._started = self._said = time.monotonic()
        self._bar: Progress | None = None
        if talk.console.is_terminal:
            columns = (
                TextColumn("scoring"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=talk.console, transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "ScoreBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def resumed(self, predictions: int) -> None:
        """Take what an earlier attempt scored as done; it says nothing about the speed."""
        if not predictions:
            return
        self.done += predictions
        self._skipped += predictions
        self.talk.say("resumed", predictions=self.done, of=self.total)
        if self._bar is not None:
            self._bar.reset(self._task, total=self.total, completed=self.done)

    def advance(self, predictions: int) -> None:
        """Count what was scored now."""
        self.done += predictions
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif now - self._said >= self.LINE_EVERY_S:
            self._said = now
            speed = (self.done - self._skipped) / (now - self._started)
            left = max(0, self.total - self.done) / speed
            self.talk.say("scoring", predictions=self.done, of=self.total, eta_s=round(left))

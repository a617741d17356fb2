"""Talk on stderr: progress bars and short lines on a terminal, key=value lines otherwise."""

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Talk:
    """Says what happens to a sweep. Thread-safe."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False)
        self._lock = threading.Lock()

    def say(self, event: str, **facts: object) -> None:
        """One line per event: readable on a terminal, key=value for a log."""
        shown = {name: value for name, value in facts.items() if value is not None}
        with self._lock:
            if self.console.is_terminal:
                words = "  ".join(f"[dim]{k}[/] {escape(_word(v))}" for k, v in shown.items())
                self.console.print(f"[bold]{event.replace('_', ' ')}[/]  {words}")
            else:
                pairs = [f"event={event}", *(f"{k}={_quoted(v)}" for k, v in shown.items())]
                self.console.print(" ".join(pairs), soft_wrap=True, markup=False)


def _word(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _quoted(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text


class Watch:
    """Shows how far the sweep is while Ray has the main thread.

    Reads the trainings' metrics.jsonl, as anybody could: workers are not asked.
    """

    PERIOD_S = 2.0
    LINE_EVERY = 5  # periods between two lines where there is no terminal

    def __init__(self, talk: Talk, num_finals: int) -> None:
        self.talk = talk
        self._trainings: dict[str, tuple[Sequence[Path], int, str]] = {}
        self._finals_done = 0
        self._num_finals = num_finals
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def training_started(self, stage: str, folders: Sequence[Path], steps: int, label: str) -> None:
        """Watch a training: its own folder, then those of the trunks that come before it."""
        self._trainings[stage] = [folder / "metrics.jsonl" for folder in folders], steps, label

    def training_ended(self, stage: str) -> None:
        self._trainings.pop(stage, None)

    def final_ended(self) -> None:
        self._finals_done += 1

    def _run(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        if not self.talk.console.is_terminal:
            self._lines()
            return
        with Progress(*columns, console=self.talk.console, transient=True) as progress:
            finals = progress.add_task("finals", total=self._num_finals, note="")
            bars: dict[str, int] = {}
            while not self._stop.wait(self.PERIOD_S):
                progress.update(finals, completed=self._finals_done)  # type: ignore[arg-type]
                for stage, (paths, steps, label) in list(self._trainings.items()):
                    bar = bars.get(stage)
                    if bar is None:
                        bar = bars[stage] = progress.add_task(
                            escape(label), total=steps, note="starting"
                        )
                    step, note = _latest(paths)
                    progress.update(bar, completed=step, note=note)  # type: ignore[arg-type]
                for stage in bars.keys() - self._trainings.keys():
                    progress.remove_task(bars.pop(stage))  # type: ignore[arg-type]

    def _lines(self) -> None:
        while not self._stop.wait(self.PERIOD_S * self.LINE_EVERY):
            for stage, (paths, steps, _) in list(self._trainings.items()):
                step, note = _latest(paths)
                self.talk.say("training_progress", training=stage, step=step, of=steps, at=note)


def _latest(paths: Sequence[Path]) -> tuple[int, str]:
    """The last step in the first journal that is there, and its newest loss and score in words."""
    step, seen = 0, {}
    path = next((path for path in paths if path.is_file()), None)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    for line in lines[-40:]:
        try:
            point = json.loads(line)
        except ValueError:
            continue  # being written
        step = int(point["step"])
        seen |= {name: point[name] for name in ("train/loss", "val/bpb") if name in point}
    return step, " ".join(f"{name}={value:.4f}" for name, value in seen.items()) or "starting"

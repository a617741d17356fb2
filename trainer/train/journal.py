"""metrics.jsonl: what a training observes on its way."""

import json
import logging
import time
from pathlib import Path

from trainer.errors import DataError

logger = logging.getLogger(__name__)


class Journal:
    """One line per observation, never two for a step and series.

    After a resume the steps that were already written are passed over, so that whoever
    copies the file onward sees each point once. Only the writing rank touches the file.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._last_step: dict[str, int] = {}
        self._path = path
        self._writes = writes
        if writes:
            self._repair(path)

    def _repair(self, path: Path) -> None:
        """Learn what is written, and cut off a line that a crash tore."""
        whole = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                self._note(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}: {line[:40]!r} is no observation; remove the file and run again"
                ) from error
        if lines:
            with path.open("r+b") as file:
                file.truncate(whole)

    def _note(self, point: dict[str, float]) -> None:
        for series in point:
            self._last_step[series] = int(point["step"])

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values that are new for their series, and log them."""
        fresh = {name: v for name, v in values.items() if step > self._last_step.get(name, -1)}
        if not self._writes or not fresh:
            return
        point = {"step": step, "at": round(time.time(), 3), **fresh}
        self._note(point)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point, allow_nan=False) + "\n")
        shown = " ".join(f"{name}={value:.5g}" for name, value in fresh.items())
        logger.info("step=%d %s", step, shown)

"""metrics.jsonl: what a training observes on its way."""

import json
import logging
import time
from pathlib import Path

from trainer.errors import DataError
from trainer.runtime.files import write_text

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
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        for line in whole:
            self._note(_point(line, path))
        if lines:
            with path.open("r+b") as file:
                file.truncate(sum(map(len, whole)))

    def _note(self, point: dict[str, float]) -> None:
        for series in point:
            self._last_step[series] = int(point["step"])

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values that are new for their series, and log them."""
        fresh = self._append({"step": step, "at": round(time.time(), 3), **values})
        if fresh:
            shown = " ".join(f"{name}={value:.5g}" for name, value in fresh.items())
            logger.info("step=%d %s", step, shown)

    def take_over(self, path: Path) -> None:
        """Append what the journal that a trunk left at `path` tells beyond this one.

        DataError if it is missing or broken.
        """
        if not self._writes:
            return
        for line in _lines(path):
            self._append(_point(line, path))

    def copy_until(self, step: int, path: Path) -> None:
        """Write the lines of the first `step` steps to `path`."""
        lines = [line for line in _lines(self._path) if _point(line, self._path)["step"] <= step]
        write_text(path, b"".join(lines).decode())

    def _append(self, point: dict[str, float]) -> dict[str, float]:
        """Append a point's values that are new for their series, and return them."""
        head = {name: point[name] for name in ("step", "at") if name in point}
        fresh = {
            name: value
            for name, value in point.items()
            if name not in head and point["step"] > self._last_step.get(name, -1)
        }
        if not self._writes or not fresh:
            return {}
        line = json.dumps(head | fresh, allow_nan=False)
        self._note(head | fresh)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return fresh


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; remove {path.parent} and run again") from error


def _point(line: bytes, path: Path) -> dict[str, float]:
    try:
        point = json.loads(line)
        return point | {"step": int(point["step"])}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: {line[:40]!r} is no observation; remove the file and run again"
        ) from error

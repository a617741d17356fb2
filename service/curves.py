"""Reading the curve of a training, metrics.jsonl, while it is being written. Knows no MLflow."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """One measurement; `at_s` is Unix seconds, as the training wrote it."""

    metric: str
    value: float
    at_s: float
    step: int


@dataclass
class Curve:
    """How far a curve is read.

    A resumed training cuts the file back or repeats steps: of each metric, only steps beyond the
    last one read are taken.
    """

    num_bytes: int = 0
    last_step: dict[str, int] = field(default_factory=dict)

    def read(self, path: Path, *, until: int | None = None) -> list[Point]:
        """Return the points of the lines that are new and whole, up to byte `until`."""
        if not path.is_file():
            return []
        if path.stat().st_size < self.num_bytes:
            self.num_bytes = 0
        points: list[Point] = []
        with path.open("rb") as file:
            file.seek(self.num_bytes)
            for line in file:
                end = self.num_bytes + len(line)
                if not line.endswith(b"\n") or (until is not None and end > until):
                    break
                self.num_bytes = end
                points += self._new_points(line, path)
        return points

    def _new_points(self, line: bytes, path: Path) -> list[Point]:
        try:
            record = json.loads(line)
            step, at_s = int(record.pop("step")), float(record.pop("at"))
            values = {key: float(value) for key, value in record.items()}
        except (ValueError, KeyError, AttributeError, TypeError):
            # A killed training leaves half a line that its successor appends to.
            logger.warning("%s: the line before byte %d is damaged: skipped", path, self.num_bytes)
            return []
        new = {key: value for key, value in values.items() if step > self.last_step.get(key, -1)}
        self.last_step |= dict.fromkeys(new, step)
        return [Point(key, value, at_s, step) for key, value in new.items()]


def read_curve(path: Path, metric: str) -> dict[int, float]:
    """Return one metric of a curve by step."""
    return {point.step: point.value for point in Curve().read(path) if point.metric == metric}

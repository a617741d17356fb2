"""What a training's second went to, read from its journal and its clock. Draws nothing.

A journal (metrics.jsonl) of a training that left a trunk begins with the trunk's own lines, so a
timeline runs from step 0 to the end; the time between trunk and tail, when nothing ran, is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from service.curves import Curve
from service.labels import run_name
from service.ledger import SweepView
from service.report import best, final_rows, has_several_seeds

MAX_TIMELINES = 40
PHASES = (
    "setup", "warm-up", "trunk", "train", "warmdown", "validate", "checkpoint or wait", "bank"
)  # fmt: skip
# What is left of a stretch after its steps and is less than this share of it is its steps' own.
_MIN_PAUSE_FRAC = 0.02


class Mark(NamedTuple):
    """A measurement, `at_s` seconds into its training."""

    at_s: float
    step: int
    value: float


@dataclass
class Band:
    """A stretch of a training that went to one of PHASES; seconds from its start."""

    phase: str
    start_s: float
    end_s: float


@dataclass
class Timeline:
    """One training: its losses (nats per token), its val bpb, and the phases they passed."""

    training: str
    label: str
    loss: list[Mark] = field(default_factory=list[Mark])
    val_bpb: list[Mark] = field(default_factory=list[Mark])
    bands: list[Band] = field(default_factory=list[Band])

    def spend(self, phase: str, start_s: float, seconds: float) -> float:
        """Give the next seconds to a phase; return where they end."""
        end_s = start_s + seconds
        if seconds <= 0.0:
            return start_s
        if self.bands and self.bands[-1].phase == phase:
            self.bands[-1].end_s = end_s
        else:
            self.bands.append(Band(phase, start_s, end_s))
        return end_s


def read_timelines(view: SweepView, store: Path) -> list[Timeline]:
    """Read the journals of a sweep's trainings, that of the best final first and then by their
    finals' bpb, as far as the store has them; MAX_TIMELINES at most."""
    top = best(view)  # the confirmed best, which by its own bpb is rarely the first
    ranked = [] if top is None else [top["training"]]
    ranked += [row.training for row in final_rows(view)]
    known = {**view.trainings, **view.running}
    found: list[Timeline] = []
    for training in dict.fromkeys([*ranked, *known]):
        event = known.get(training)
        path = store / "trainings" / training / "metrics.jsonl"
        if event is None or not path.is_file():
            continue
        empty = Timeline(training, training_label(view, event))
        timeline = _timeline(empty, _lines(path), _Clock.of(view, event))
        if timeline.loss or timeline.val_bpb:
            found.append(timeline)
        if len(found) == MAX_TIMELINES:
            break
    return found


def training_label(view: SweepView, event: dict[str, Any]) -> str:
    """Name a training by its point, and by its seed where there are several."""
    seed = event["seed"] if has_several_seeds(view) else None
    return run_name(event["point"], event["training"], seed=seed)


@dataclass(frozen=True, slots=True)
class _Clock:
    """What a training's result says of its clock: seconds by phase, and the step that it began
    at, where that was a trunk's or a checkpoint's. A training under way says nothing."""

    seconds: dict[str, float]
    joint: int
    is_trunk: bool

    @classmethod
    def of(cls, view: SweepView, event: dict[str, Any]) -> "_Clock":
        result = event.get("result") or {}
        joint = result.get("steps", 0) - result.get("steps_computed", 0)
        is_part = 0 < joint < result.get("steps", 0)
        return cls(result.get("clock_s") or {}, joint if is_part else 0, bool(view.trunks))


class _Line(NamedTuple):
    """The values of one line of a journal; `at_s` is Unix seconds."""

    step: int
    at_s: float
    values: dict[str, float]


def _lines(path: Path) -> list[_Line]:
    lines: list[_Line] = []
    for point in Curve().read(path):
        if not lines or (lines[-1].step, lines[-1].at_s) != (point.step, point.at_s):
            lines.append(_Line(point.step, point.at_s, {}))
        lines[-1].values[point.metric] = point.value
    return lines


def _timeline(timeline: Timeline, lines: Sequence[_Line], clock: _Clock) -> Timeline:
    at_s = timeline.spend("setup", 0.0, clock.seconds.get("setup", 0.0))
    trained_s, before = 0.0, None
    for line in lines:
        if before is not None:
            at_s = _pass(timeline, at_s, (before, line), trained_s, clock)
        trained_s, before = line.values.get("train/clock_s", trained_s), line
        if "train/loss" in line.values:
            timeline.loss.append(Mark(at_s, line.step, line.values["train/loss"]))
        if "val/bpb" in line.values:
            timeline.val_bpb.append(Mark(at_s, line.step, line.values["val/bpb"]))
    timeline.spend("bank", at_s, clock.seconds.get("bank", 0.0))
    return timeline


def _pass(
    timeline: Timeline, at_s: float, between: tuple[_Line, _Line], trained_s: float, clock: _Clock
) -> float:
    """Give the time between two lines to its phases; return where it ends."""
    before, line = between
    wall_s = max(line.at_s - before.at_s, 0.0)
    if line.step == before.step:  # steps are over: its score was what took the time
        return timeline.spend("validate", at_s, wall_s)
    steps_s = min(
        max(line.values.get("train/clock_s", trained_s + wall_s) - trained_s, 0.0), wall_s
    )
    is_joint = clock.joint > 0 and before.step <= clock.joint < line.step
    pause_s = 0.0 if is_joint else wall_s - steps_s
    if pause_s < _MIN_PAUSE_FRAC * wall_s:
        steps_s, pause_s = steps_s + pause_s, 0.0
    at_s = timeline.spend("checkpoint or wait" if before.step else "warm-up", at_s, pause_s)
    phase = "warmdown" if line.values.get("train/lr_scale", 1.0) < 1.0 else "train"
    if line.step <= clock.joint and clock.is_trunk:
        phase = "trunk"
    return timeline.spend(phase, at_s, steps_s)

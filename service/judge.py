"""Whether a training may go on: asked at each of its validations, answered at once. Pure.

A judge never kills: the workers that asked leave together (design 3). Asking again with the same
training and step gives the same answer, so a training that resumes may ask what it asked before.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.specs import Asha, ReferenceCurve


class Judge(Protocol):
    """Whoever decides; it travels to the process where the workers ask, so it can be pickled."""

    def ask(self, training: str, step: int, val_bpb: float) -> str | None:
        """Return why the training is to stop after `step`, None if it goes on."""
        ...


@dataclass
class SuccessiveHalving:
    """Asynchronous successive halving (arXiv 1810.05934): at a rung, go on among the best
    1/reduction of those that were there so far.

    A rung is reached at the first validation on or after its step, so rungs need not fall on
    validations. `seen`: by rung step and training, its val bpb there and what it was told.
    """

    spec: Asha
    seen: dict[int, dict[str, tuple[float, str | None]]] = field(
        default_factory=dict[int, dict[str, tuple[float, str | None]]]
    )

    def ask(self, training: str, step: int, val_bpb: float) -> str | None:
        """Return why not, where the training is new at a rung and not among its best."""
        rung = self._rung_at(step)
        if rung is None:
            return None
        column = self.seen.setdefault(rung, {})
        if training not in column:
            values = sorted([val_bpb, *(value for value, _ in column.values())])
            column[training] = val_bpb, self._reason(rung, val_bpb, values)
        return column[training][1]

    def _reason(self, rung: int, val_bpb: float, values: Sequence[float]) -> str | None:
        num_kept = -(-len(values) // self.spec.reduction)
        worst_kept = values[num_kept - 1]
        if val_bpb <= worst_kept:
            return None
        return (
            f"asha: val bpb {val_bpb:.4f} at rung {rung} is not among the best {num_kept} of "
            f"{len(values)} (up to {worst_kept:.4f})"
        )

    def recall(self, training: str, step: int, val_bpb: float, reason: str | None) -> None:
        """Take up an answer that was given before this process began."""
        rung = self._rung_at(step)
        if rung is not None:
            self.seen.setdefault(rung, {}).setdefault(training, (val_bpb, reason))

    def _rung_at(self, step: int) -> int | None:
        """The highest rung that `step` has reached."""
        rung, reached = self.spec.first_step, None
        while rung <= step:
            reached, rung = rung, rung * self.spec.reduction
        return reached


@dataclass(frozen=True)
class AgainstReference:
    """Stops what lies over a reference training's curve; between its points the last counts."""

    spec: ReferenceCurve
    curve: Mapping[int, float]
    """val bpb of the reference by step."""

    def ask(self, training: str, step: int, val_bpb: float) -> str | None:
        """Return by how much it is over the reference, where that is too much."""
        passed = [at for at in self.curve if at <= step]
        if step < self.spec.first_step or not passed:
            return None
        reference = self.curve[max(passed)]
        if val_bpb <= reference + self.spec.margin_bpb:
            return None
        return (
            f"reference: val bpb {val_bpb:.4f} at step {step} is over {reference:.4f} of "
            f"{self.spec.training} by more than {self.spec.margin_bpb:g}"
        )


def make_judge(
    stop: Asha | ReferenceCurve | None,
    rungs: Iterable[Mapping[str, Any]],
    curve: Mapping[int, float],
) -> Judge | None:
    """The judge of a sweep, with what its ledger knows; None where nothing is stopped early.

    rungs: events in their order. curve: the reference's val bpb by step; unused without one.
    """
    if stop is None:
        return None
    if isinstance(stop, ReferenceCurve):
        return AgainstReference(stop, dict(curve))
    judge = SuccessiveHalving(stop)
    for event in rungs:
        judge.recall(event["training"], event["step"], event["val_bpb"], event["reason"])
    return judge

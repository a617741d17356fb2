"""Which tensors of a model move their steps together, and how much the loss rises with the error of
each: what a fit has to know before it shares out bits.

Two ways of putting steps on rows are tried. By row, each class has its clip in deviations. Common,
all rows of the block matrices have one step and so have those of the token table. On a trained
pr414 (relu² units of very different size) a common step loses 0.4 of what steps by row lose in
`mlp.up` at equal bits; where rows are alike there is no difference. The probe decides.

Source: clips in deviations by class from parameter-golf PR #1394; the common step is the scale
floor of PR #414 (techniques 2.22, 4.3).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.rate import Curve, Unit, curve, unit
from trainer.finalize.shares import Share, Shares, settings
from trainer.finalize.stored import restore
from trainer.sizes import TensorSize, float16_key_names
from trainer.specs.final import Quantize

PROBE_STEPS: Final = (0.8, 2.0)  # in deviations: far above the noise of a few thousand tokens
LEAST_RISE: Final = 1e-3  # nats per token: below it a rise is noise
# Steps of the field's best final (techniques 4.3-2), in deviations: what is assumed without text.
USUAL_STEPS: Final = {"mlp": 0.35, "attention": 0.42, "embed": 0.16, "hash": 0.25, "other": 0.25}
MATRICES: Final = ("mlp", "attention")

Probe = Callable[[Mapping[str, Tensor]], float]
"""Nats per token of a state, on text that is not scored."""
Say = Callable[..., None]
"""Called with the name of an event and its facts."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Units by name with their curves, and what a squared error of each costs in nats."""

    steps: str  # by row | common
    sensitivity: str  # measured | usual
    curves: dict[str, Curve]
    costs: dict[str, float]


def integer_tensors(tensors: Sequence[TensorSize], spec: Quantize) -> list[TensorSize]:
    """The tensors that may be stored as integers, whatever the bits of their class."""
    kept = float16_key_names(spec)
    return [
        tensor
        for tensor in tensors
        if tensor.role != "scalar" and tensor.numel > spec.float_numel and tensor.name not in kept
    ]


def usual_plan(state: Mapping[str, Tensor], tensors: Sequence[TensorSize]) -> Plan:
    """Steps by row, sensitivities such that the field's usual steps come out best."""
    curves = {name: curve(unit(state, group)) for name, group in _by_class(tensors).items()}
    costs = {
        name: curve.unit.numel / curve.error_at(USUAL_STEPS[name]) for name, curve in curves.items()
    }
    return Plan("by row", "usual", curves, costs)


def measured_plans(
    state: Mapping[str, Tensor], tensors: Sequence[TensorSize], prober: "Prober"
) -> list[Plan]:
    """Steps by row and common ones, sensitivities by the probe."""
    by_class = _by_class(tensors)
    rows = {name: unit(state, group) for name, group in by_class.items()}
    common = {name: replace(rows[name], most_bits=7) for name in rows if name not in MATRICES}
    if "embed" in rows:
        common["embed"] = unit(state, by_class["embed"], "int8")
    matrices = [tensor for name in MATRICES for tensor in by_class.get(name, ())]
    if matrices:
        common["matrices"] = unit(state, matrices, "floor", most_bits=7)
    return [_measured("by row", rows, prober), _measured("common", common, prober)]


def _measured(steps: str, units: Mapping[str, Unit], prober: "Prober") -> Plan:
    curves = {name: curve(unit) for name, unit in units.items()}
    return Plan(
        steps, "measured", curves, {name: prober.cost(curve) for name, curve in curves.items()}
    )


def _by_class(tensors: Sequence[TensorSize]) -> dict[str, list[TensorSize]]:
    grouped: dict[str, list[TensorSize]] = {}
    for tensor in tensors:
        grouped.setdefault(tensor.part, []).append(tensor)
    return grouped


class Prober:
    """Asks the probe how a state scores when some of its tensors are quantized.

    `rises`: what was found for each unit, in words and numbers.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        spec: Quantize,
        probe: Probe,
        hessians: Mapping[str, Tensor] | None,
        say: Say = lambda event, **facts: None,
    ) -> None:
        self.loss = probe(state)
        self.rises: list[dict[str, Any]] = []
        self._state, self._probe, self._hessians, self._say = state, probe, hessians, say
        self._spec = replace(spec, float16_keys=(), float_numel=0)
        self._known: dict[tuple[str, ...], float] = {}

    def cost(self, curve: Curve) -> float:
        """Nats per token and squared error of a unit's tensors.

        Probed at coarse steps, where a rise is no noise; the loss is taken to go with the square.
        """
        key = (curve.unit.family, *curve.unit.classes)
        if key not in self._known:
            rise, step = 0.0, 0.0
            for step in PROBE_STEPS:
                rise = self.loss_of({"": Share(curve, step)}) - self.loss
                if rise >= LEAST_RISE:
                    break
            facts = {"classes": "+".join(curve.unit.classes), "steps": curve.unit.family}
            self.rises.append({**facts, "step": step, "rise": rise})
            self._say("probed", **self.rises[-1])
            self._known[key] = max(rise, LEAST_RISE / 10) / curve.error_at(step)
        return self._known[key]

    def loss_of(self, shares: Shares) -> float:
        """Nats per token of the state with the tensors of these units quantized, the rest not."""
        tensors = [t for share in shares.values() for t in share.curve.unit.tensors]
        spec = settings(shares, self._spec)
        part = {tensor.name: self._state[tensor.name] for tensor in tensors}
        stored, _ = quantize_tensors(part, tensors, spec, self._hessians)
        return self._probe({**self._state, **{n: restore(form) for n, form in stored.items()}})

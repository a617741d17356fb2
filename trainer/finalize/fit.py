"""The best artifact under a byte cap: steps by class, bits, pruning, coder and form of the code.

The walk of `fit`: fix what the code costs; ask the probe how much the loss rises with the error of
each class (`plans`); share the bits out where they save most (`shares`); then write real files, all
steps scaled together, until the artifact lies just under the cap. The probe reads training text:
what is chosen here must not have seen what it is scored on (techniques 1.9).
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from torch import Tensor

from trainer.blueprint import blueprint
from trainer.errors import InfeasibleError, UsageError
from trainer.finalize.code import write_code
from trainer.finalize.pipeline import FinalReport, finalize
from trainer.finalize.plans import (
    MATRICES,
    Plan,
    Probe,
    Prober,
    Say,
    integer_tensors,
    measured_plans,
    usual_plan,
)
from trainer.finalize.shares import (
    LARGEST_FACTOR,
    Shares,
    allocate,
    dead_zone,
    factor_for,
    scaled,
    settings,
    total_bits,
)
from trainer.finalize.trim import aimed_bits
from trainer.sizes import CONTAINER_FACTORS, stored_bits, tensor_sizes
from trainer.specs.final import FinalSpec, Prune, RangeCoder
from trainer.specs.model import ModelSpec

FULL: Final = 0.995  # of the cap: an artifact from here up fills it
ENOUGH: Final = 0.9985  # from here up another file is not worth its writing
AIM: Final = 0.9993
MAX_FILES: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is to be fitted: a state of the trained model, and what finalizing it takes."""

    state: Mapping[str, Tensor]
    model: ModelSpec
    tokenizer_sha256: str
    hessians: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The artifact that was written, how to make it again, and why it is that one."""

    final: FinalSpec
    report: FinalReport
    choices: dict[str, Any]


def fit(
    subject: Subject,
    final: FinalSpec,
    cap_bytes: int,
    folder: Path,
    probe: Probe | None = None,
    keep: Set[str] = frozenset(),
    say: Say = lambda event, **facts: None,
) -> Fitted:
    """Write into `folder` the artifact of at most `cap_bytes` that should lose least.

    Of `final` the parts in `keep` (prune, compress, code, float_numel) stay, and what is not
    chosen here: gptq, lqer and kept keys. InfeasibleError names the smallest size reached.
    """
    forms = _code_bytes([final.code] if "code" in keep else ["zip", "packed"])
    form = min(forms, key=lambda form: forms[form])
    opened = _opened(final, form, keep)
    search = _Search(subject, opened, cap_bytes - forms[form], cap_bytes, folder, say)
    search.choose_plan(probe)
    search.run(prunes="prune" not in keep, codes="compress" not in keep)
    chosen, report = search.finish()
    fills_cap = report.artifact_bytes >= FULL * cap_bytes
    return Fitted(
        final=chosen,
        report=report,
        choices={
            **_described(chosen, search.classes),
            "code_bytes": forms,
            "coder_bytes": search.coder_bytes,
            "steps": search.plan.steps,
            "sensitivity": search.plan.sensitivity,
            "probed": search.probed,
            "files": search.files,
            "fills_cap": fills_cap,
            "reason": None if fills_cap else search.reason(),
        },
    )


def _described(final: FinalSpec, classes: Sequence[str]) -> dict[str, Any]:
    quantize = final.quantize
    return {
        "bits": {name: getattr(quantize.bits, name) for name in classes},
        "clips": {name: quantize.clip_of(name) for name in classes},
        "scale_floor": quantize.scale_floor,
        "int8_floor": None if quantize.int8 is None else quantize.int8.scale_floor,
        "prune": None if final.prune is None else final.prune.ratio,
        "coder": final.compress.kind,
        "code": final.code,
    }


def _code_bytes(forms: Sequence[Any]) -> dict[str, int]:
    """Measure forms of the code."""
    sizes: dict[str, int] = {}
    for form in forms:
        with TemporaryDirectory() as folder:
            sizes[form] = write_code(Path(folder), form).stat().st_size
    return sizes


def _opened(final: FinalSpec, form: Any, keep: Set[str]) -> FinalSpec:
    """The final without what is to be chosen."""
    quantize = final.quantize
    if "float_numel" not in keep:  # small matrices too: a byte is worth the same anywhere
        quantize = replace(quantize, float_numel=0)
    prune = final.prune if "prune" in keep else None
    return replace(final, quantize=quantize, prune=prune, trim_ones=None, code=form)


class _Search:
    """Real files on the way to a budget of bytes for the weights."""

    plan: Plan
    shares: Shares

    def __init__(
        self,
        subject: Subject,
        base: FinalSpec,
        budget_bytes: int,
        cap_bytes: int,
        folder: Path,
        say: Say,
    ) -> None:
        self.subject, self.base, self.folder, self.say = subject, base, folder, say
        self.budget_bytes, self.cap_bytes = budget_bytes, cap_bytes
        tensors = tensor_sizes(blueprint(subject.model.exported()))
        self.state = {t.name: subject.state[t.name].detach().cpu().float() for t in tensors}
        self.integers = integer_tensors(tensors, base.quantize)
        if not self.integers:
            raise UsageError(
                f"final.quantize.float_numel={base.quantize.float_numel} keeps every tensor in "
                "float16, which leaves nothing to choose; lower it"
            )
        self.classes = tuple(dict.fromkeys(tensor.part for tensor in self.integers))
        names = {tensor.name for tensor in self.integers}
        floats = [tensor for tensor in tensors if tensor.name not in names]
        self.float_bits = sum(t.numel * stored_bits(t, base.quantize) for t in floats)
        self.plans: list[dict[str, Any]] = []
        self.probed: dict[str, Any] | None = None
        self.files: list[dict[str, Any]] = []
        self.coder_bytes: dict[str, int] = {}
        self.edge: float | None = None
        self.written: list[tuple[FinalSpec, FinalReport]] = []
        self.num_trials = 0  # files of the first shares, before their sizes were known

    def choose_plan(self, probe: Probe | None) -> None:
        """Take the plan whose allocation the probe likes best; without one, the usual."""
        plans = [usual_plan(self.state, self.integers)]
        self.plan = plans[0]
        if probe is None:
            return
        hessians = self.subject.hessians
        prober = Prober(self.state, self.base.quantize, probe, hessians, self.say)
        plans += measured_plans(self.state, self.integers, prober)
        self.plan = min(plans, key=lambda plan: self._rise_of(plan, prober))
        self.probed = {"loss": prober.loss, "units": prober.rises, "plans": self.plans}

    def _rise_of(self, plan: Plan, prober: Prober) -> float:
        factor = CONTAINER_FACTORS[self.base.compress.kind]
        shares = allocate(plan.curves, plan.costs, self._bits(factor))
        rise = prober.loss_of(shares) - prober.loss
        self.plans.append({"steps": plan.steps, "sensitivity": plan.sensitivity, "rise": rise})
        self.say("probed", **self.plans[-1])
        return rise

    def run(self, *, prunes: bool, codes: bool) -> None:
        """Write files until one lies just under the budget, or none can."""
        self._share_out(CONTAINER_FACTORS[self.base.compress.kind], prunes)
        sizes = {0.0: self._choose_coder() if codes else self._write(0.0)}
        # The first file says what the integers of this state really take.
        self._share_out(8 * sizes[0.0] / self._forecast(0.0), prunes)
        self.num_trials = len(self.written)
        sizes = dict[float, int]()
        place: float | None = 0.0
        while place is not None:
            sizes[place] = self._write(place)
            place = self._next_place(sizes)

    def _share_out(self, factor: float, prunes: bool) -> None:
        self.shares = allocate(self.plan.curves, self.plan.costs, self._bits(factor))
        self.edge = dead_zone(self._matrix_step(0.0)) if prunes else None

    def _bits(self, factor: float) -> float:
        """The bits of the integers that the budget leaves, where files come out `factor` larger."""
        return 8 * self.budget_bytes / factor - self.float_bits

    def _forecast(self, place: float) -> float:
        return total_bits(scaled(self.shares, 2.0**place)) + self.float_bits

    def _choose_coder(self) -> int:
        """Write the same integers by the final's coder and by our own; go on with the smaller."""
        coders = {self.base.compress.kind: self.base.compress, "range": RangeCoder()}
        for kind, coder in coders.items():
            self.base = replace(self.base, compress=coder)
            self.coder_bytes[kind] = self._write(0.0)
        smallest = min(coders, key=lambda kind: self.coder_bytes[kind])
        self.base = replace(self.base, compress=coders[smallest])
        return self.coder_bytes[smallest]

    def _write(self, place: float) -> int:
        final = self._final(place)
        report = self._finalize(final)
        self.written.append((final, report))
        facts = {"weights_bytes": report.weights_bytes, "artifact_bytes": report.artifact_bytes}
        self.files.append({"coder": final.compress.kind, **facts})
        self.say("written", file=len(self.files), coder=final.compress.kind, **facts)
        return report.weights_bytes

    def _finalize(self, final: FinalSpec) -> FinalReport:
        of = self.subject
        state, sha256 = of.state, of.tokenizer_sha256
        return finalize(state, of.model, final, self.folder, sha256, of.hessians)

    def _final(self, place: float) -> FinalSpec:
        shares = scaled(self.shares, 2.0**place)
        final = replace(self.base, quantize=settings(shares, self.base.quantize))
        if self.edge is None:
            return final
        ratio = math.erf(self.edge * self._matrix_step(place) / math.sqrt(2))
        prune = Prune(ratio=round(ratio, 6), larger_than=self.base.quantize.float_numel)
        return replace(final, prune=prune)

    def _matrix_step(self, place: float) -> float:
        """The typical step of the block matrices in deviations; 0 where they stay floats."""
        steps = [
            (share.relative, share.curve.unit.numel)
            for share in scaled(self.shares, 2.0**place).values()
            if share.relative is not None and share.curve.unit.classes[0] in MATRICES
        ]
        if not steps:
            return 0.0
        total = sum(numel for _, numel in steps)
        return math.exp(sum(numel * math.log(step) for step, numel in steps) / total)

    def _next_place(self, sizes: Mapping[float, int]) -> float | None:
        """log2 of the factor on all steps for the next file; None when the search is over."""
        fitting = [place for place, size in sizes.items() if size <= self.budget_bytes]
        high = min(fitting, default=None)
        low = max((place for place in sizes if place not in fitting), default=None)
        slack = (1 - ENOUGH) * self.cap_bytes
        if high is not None and sizes[high] >= self.budget_bytes - slack:
            return None
        if len(self.files) >= MAX_FILES:
            return None
        known = [(self._forecast(place), size) for place, size in sizes.items()]
        aim = self.budget_bytes - (1 - AIM) * self.cap_bytes
        place = math.log2(factor_for(self.shares, aimed_bits(known, aim) - self.float_bits))
        if high is None and len(self.files) == MAX_FILES - 1:
            place = math.log2(LARGEST_FACTOR)
        if high is not None and low is not None and not low < place < high:
            place = (low + high) / 2
        tried = [self._forecast(place) for place in sizes]
        return None if self._forecast(place) in tried else place

    def finish(self) -> tuple[FinalSpec, FinalReport]:
        """Return the largest file that fits, and leave it in the folder.

        One by the last shares and coder where it fills the cap: a trial may be larger and coarser.
        """
        fitting = [
            (
                number >= self.num_trials and report.artifact_bytes >= ENOUGH * self.cap_bytes,
                report.artifact_bytes,
                number,
            )
            for number, (_, report) in enumerate(self.written)
            if report.artifact_bytes <= self.cap_bytes
        ]
        if not fitting:
            smallest = min(report.artifact_bytes for _, report in self.written)
            raise InfeasibleError(
                f"a cap of {self.cap_bytes:,} bytes: no artifact is so small; the smallest reached "
                f"has {smallest:,} bytes; allow as many or train a smaller model"
            )
        *_, number = max(fitting)
        final, report = self.written[number]
        if number != len(self.written) - 1:
            report = self._finalize(final)
        return final, report

    def reason(self) -> str:
        """Why the artifact does not fill the cap."""
        if self._forecast(-1.0) == self._forecast(0.0):
            return "the finest grids of all tensors take no more"
        return f"none of {len(self.files)} files came nearer"

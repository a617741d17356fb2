"""The sides of a comparison as a user names them, and what a sweep's gate says at its end.

A side is a baseline's file or name, a sweep, or a final's id, in this order.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from service import baselines
from service.baselines import Baseline, BaselineResult
from service.confirmed import (
    Group,
    bpb_of,
    confirm_groups,
    sample_of_final,
    sample_of_sweep,
    search_groups,
)
from service.ledger import SweepView, replay
from service.noise import noise_floor
from service.paths import Paths, find_sweep
from service.samples import Sample
from service.specs import Gate
from service.states import State
from service.verdicts import decide, verdict_document
from trainer.codec import dump
from trainer.errors import UsageError

_MIN_FINAL_PREFIX = 6
# Over a limit or not, these were scored on the whole text.
_SCORED = (State.SUCCEEDED, State.INFEASIBLE, State.ILLEGAL)


def find_side(paths: Paths, ref: str, not_sweep: str | None = None) -> Sample:
    """Read what `ref` names; UsageError where it names nothing, or the sweep that it may not."""
    if is_baseline(ref):
        return baselines.read_baseline(ref).sample()
    if not _is_sweep_ref(paths, ref):
        return _final_side(paths, ref)
    view = replay(find_sweep(paths, ref).ledger)
    if view.started.get("sweep_id") == not_sweep:
        raise UsageError(f"{ref}: that is the sweep itself; name another one or a baseline")
    sample = sample_of_sweep(view)
    if view.state.is_final():
        return sample
    return replace(sample, remarks=(*sample.remarks, f"the sweep is {view.state}, not finished"))


def is_baseline(ref: str) -> bool:
    """Whether a reference names a shipped baseline or a file."""
    return "/" in ref or ref.endswith((".yaml", ".yml")) or ref in baselines.shipped()


def _is_sweep_ref(paths: Paths, ref: str) -> bool:
    """Whether a reference is a sweep's name or the start of an id, even of several."""
    if is_baseline(ref):
        return False
    ids = [path.parent.name for path in paths.sweeps.glob("*/events.jsonl")]
    return any(each.startswith(ref) or each.rpartition("-")[0] == ref for each in ids)


def _final_side(paths: Paths, ref: str) -> Sample:
    found: dict[str, SweepView] = {}
    if len(ref) >= _MIN_FINAL_PREFIX:
        for view in _views(paths):
            for final in view.finals:
                if final.startswith(ref):
                    found.setdefault(final, view)
    if len(found) > 1:
        raise UsageError(f"{ref!r} fits {len(found)} finals; give more of its id")
    if not found:
        raise UsageError(
            f"{ref!r} is no baseline, no sweep and no final here; shipped baselines: "
            f"{', '.join(baselines.shipped())}"
        )
    [(final, view)] = found.items()
    return sample_of_final(view, final)


def _views(paths: Paths) -> Iterator[SweepView]:
    """The sweeps of a home, the newest first."""
    ledgers = sorted(paths.sweeps.glob("*/events.jsonl"), key=lambda path: -path.stat().st_mtime)
    return map(replay, ledgers)


def check_gate(gate: Gate, paths: Paths) -> None:
    """Raise UsageError unless a gate's baseline can be read: before anything is spent."""
    find_side(paths, gate.baseline)


def judge_sweep(view: SweepView, gate: Gate, paths: Paths) -> dict[str, Any]:
    """Put a sweep's confirmed point through its gate; plain data for the ledger.

    `verdict` is passed, not passed or refused; `reason` says why in one line. A sweep whose
    confirmation did not come through, or that cannot be compared, is refused, never an error.
    """
    own = view.started["sweep_id"]
    try:
        if not confirm_groups(view):
            raise UsageError(f"{own}: nothing was confirmed; the gate judges confirmed points only")
        old = find_side(paths, gate.baseline, not_sweep=own)
        verdict = decide(sample_of_sweep(view), old, gate.mode, gate.min_gain_nats, gate.alpha)
    except UsageError as error:
        refused = {"verdict": "refused", "reason": str(error), "mode": gate.mode}
        return {**refused, "gate": dump(gate)}
    return {**verdict_document(verdict), "gate": dump(gate)}


@dataclass(frozen=True, slots=True)
class Spread:
    """A standard deviation in nats per token, and the sweep that it is measured in, if any."""

    sd_nats: float
    view: SweepView | None


def find_spread(paths: Paths, ref: str, *, paired: bool = False) -> Spread:
    """Find the noise of what `ref` names: a sweep's or a file's noise floor, else the spread of its
    seeds. paired: of the difference of two finals of one bank, which only a floor tells."""
    view = replay(find_sweep(paths, ref).ledger) if _is_sweep_ref(paths, ref) else None
    if view is not None:
        noise = measure(view).noise
    elif is_baseline(ref):
        noise = baselines.read_baseline(ref).noise
    else:
        noise = None
    if noise is not None:
        sd = noise.paired_sd_nats if paired else noise.sd_nats
    else:
        sample = find_side(paths, ref)
        sd = None if paired or sample.sd is None else sample.sd / sample.text.bpb_per_nat
    if sd is None:
        asked = "paired noise; name a sweep with two points on one bank" if paired else "spread"
        raise UsageError(f"{ref}: nothing there tells its {asked}")
    return Spread(sd, view)


def measure(view: SweepView) -> Baseline:
    """A sweep as a baseline file: its result by seed, and the noise over its seeds."""
    sample = sample_of_sweep(view)
    return Baseline(
        name=sample.name,
        source=sample.source or sample.name,
        tokens=sample.text.tokens,
        bytes=sample.text.bytes,
        tokenizer_sha256=sample.text.tokenizer,
        results=tuple(BaselineResult(seed=r.seed, value=r.bpb) for r in sample.results),
        registered=sample.registered,
        remarks=sample.remarks,
        noise=noise_floor(_noise_tables(view), sample.text.bpb_per_nat),
    )


def _noise_tables(view: SweepView) -> list[np.ndarray]:
    """Val bpb [points, seeds] for each set of trainings that several seeds of a point share."""
    groups = [*search_groups(view), *confirm_groups(view)]
    tables: defaultdict[tuple[tuple[int, str], ...], dict[str, list[float]]] = defaultdict(dict)
    for group in groups:
        scored = {seed: e for seed, e in sorted(group.finals.items()) if e["state"] in _SCORED}
        banks = tuple((seed, event["training"]) for seed, event in scored.items())
        tables[banks][_name(group)] = [bpb_of(event) for event in scored.values()]
    # A point that lacks a seed would count the trainings of its fellows twice.
    whole = [banks for banks in tables if not any(set(banks) < set(other) for other in tables)]
    return [np.array(list(tables[banks].values())) for banks in whole if banks]


def _name(group: Group) -> str:
    return str(sorted(group.point.items()))


def seed_cost_s(view: SweepView) -> float:
    """Worker seconds of one more seed of one point: a training and its final, as they took here."""
    workers = view.started["spec"]["resources"].get("workers", 1)
    trainings = [e["occupied_s"] for e in view.trainings.values() if _was_computed(e)]
    finals = [e["occupied_s"] for e in view.finals.values() if _was_computed(e)]
    if not trainings:
        raise UsageError(
            f"{view.started['sweep_id']}: none of its trainings was computed by this sweep; give "
            "--gpu-seconds"
        )
    return float(np.mean(trainings)) * workers + (float(np.mean(finals)) if finals else 0.0)


def _was_computed(event: dict[str, Any]) -> bool:
    return not event["cached"] and event["result"] is not None and "occupied_s" in event

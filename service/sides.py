"""The sides of a comparison as a user names them, and what a sweep's gate says at its end.

A side is a baseline's file or name, a sweep, or a final's id, in this order.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from service import baselines
from service.baselines import Baseline, BaselineResult
from service.budget import seconds_per_step
from service.confirmed import (
    bpb_of,
    confirm_groups,
    is_scored,
    key_of,
    sample_of_final,
    sample_of_sweep,
    search_groups,
)
from service.ledger import SweepView, replay
from service.noise import noise_floor
from service.paths import Paths, find_sweep
from service.samples import Sample
from service.specs import Gate
from service.verdicts import (
    contrast,
    contrast_document,
    decide,
    side_document,
    verdict_document,
)
from trainer.codec import dump
from trainer.errors import DataError, UsageError

_MIN_FINAL_PREFIX = 6
# Val bpb by configuration and seed.
_Rows = dict[str, dict[int, float]]


def find_side(paths: Paths, ref: str, not_sweep: str | None = None) -> Sample:
    """Read what `ref` names; UsageError where it names nothing, or the sweep that it may not."""
    if is_baseline(ref):
        return baselines.read_baseline(ref).sample()
    if not _is_sweep_ref(paths, ref):
        return _final_sides(paths, [ref])[ref]
    view = replay(find_sweep(paths, ref).ledger)
    if not_sweep is not None and view.started.get("sweep_id") == not_sweep:
        raise UsageError(f"{ref}: that is the sweep itself; name another one or a baseline")
    sample = sample_of_sweep(view)
    if view.state.is_final():
        return sample
    return replace(sample, remarks=(*sample.remarks, f"the sweep is {view.state}, not finished"))


def compare_sides(paths: Paths, refs: Sequence[str]) -> dict[str, Any]:
    """Hold what the references name against the first of them, as plain data."""
    others = {ref for ref in refs if not is_baseline(ref) and not _is_sweep_ref(paths, ref)}
    finals = _final_sides(paths, others)
    found = [finals.get(ref) or find_side(paths, ref) for ref in refs]
    return {
        "sides": [side_document(sample) for sample in found],
        "contrasts": [contrast_document(contrast(new, found[0])) for new in found[1:]],
    }


def is_baseline(ref: str) -> bool:
    """Whether a reference names a shipped baseline or a file."""
    return "/" in ref or ref.endswith((".yaml", ".yml")) or ref in baselines.shipped()


def _is_sweep_ref(paths: Paths, ref: str) -> bool:
    """Whether a reference is a sweep's name or the start of an id, even of several."""
    if is_baseline(ref):
        return False
    ids = [path.parent.name for path in paths.sweeps.glob("*/events.jsonl")]
    return any(each.startswith(ref) or each.rpartition("-")[0] == ref for each in ids)


def _final_sides(paths: Paths, refs: Collection[str]) -> dict[str, Sample]:
    """The finals that references begin, by reference; every ledger is looked through once."""
    found: dict[str, dict[str, SweepView]] = {ref: {} for ref in refs}
    broken: dict[str, DataError] = {}
    for ledger, named in _ledgers_that_name(paths, refs):
        try:
            view = replay(ledger)
        except DataError as error:
            broken |= dict.fromkeys(named, error)
            continue
        for ref in named:
            for final in view.finals:
                if final.startswith(ref):
                    found[ref].setdefault(final, view)
    for ref in broken:
        if not found[ref]:
            raise broken[ref]
    return {ref: _final_side(ref, views) for ref, views in found.items()}


def _final_side(ref: str, found: Mapping[str, SweepView]) -> Sample:
    if len(found) > 1:
        raise UsageError(f"{ref!r} fits {len(found)} finals; give more of its id")
    if not found:
        raise UsageError(
            f"{ref!r} is no baseline, no sweep and no final here; shipped baselines: "
            f"{', '.join(baselines.shipped())}"
        )
    [(final, view)] = found.items()
    return sample_of_final(view, final)


def _ledgers_that_name(paths: Paths, refs: Collection[str]) -> Iterator[tuple[Path, list[str]]]:
    """The ledgers of a home, the newest first, that have finals with these starts, and which. Told
    from their text: most of them need not be replayed."""
    marks = {
        ref: f'"final":"{ref}'.encode()
        for ref in refs
        if len(ref) >= _MIN_FINAL_PREFIX and ref.isascii()
    }
    if not marks:
        return
    ledgers = paths.sweeps.glob("*/events.jsonl")
    for path in sorted(ledgers, key=lambda path: -path.stat().st_mtime):
        text = path.read_bytes()
        if named := [ref for ref, mark in marks.items() if mark in text]:
            yield path, named


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
        results=tuple(
            BaselineResult(seed=r.seed, value=r.bpb, configuration=r.configuration)
            for r in sample.results
        ),
        registered=sample.registered,
        remarks=sample.remarks,
        noise=noise_floor(_noise_tables(view), sample.text.bpb_per_nat),
    )


def _noise_tables(view: SweepView) -> list[np.ndarray]:
    """Val bpb [configurations, seeds] of each train point, NaN where one lacks a seed.

    Finals of one train point and seed move together, straight or from a trunk: what shares a seed
    is one table.
    """
    tables: defaultdict[str, list[_Rows]] = defaultdict(list)
    for group in [*search_groups(view), *confirm_groups(view)]:
        scored = [event for event in group.finals.values() if is_scored(event)]
        if scored:
            train = key_of(view.trainings[scored[0]["training"]]["point"])
            row = {event["seed"]: bpb_of(event) for event in scored}
            tables[train] = _joined(tables[train], {group.key: row})
    return [_table(rows) for each in tables.values() for rows in each]


def _joined(tables: Sequence[_Rows], rows: _Rows) -> list[_Rows]:
    """The tables of a train point with one more, which takes in those that it shares a seed with;
    of two values of one seed the earlier stands."""
    seeds, joined, apart = _seeds(rows), dict(rows), list[_Rows]()
    for known in tables:
        if seeds.isdisjoint(_seeds(known)):
            apart.append(known)
        else:
            joined |= {name: {**joined.get(name, {}), **row} for name, row in known.items()}
    return [*apart, joined]


def _seeds(rows: _Rows) -> set[int]:
    return {seed for row in rows.values() for seed in row}


def _table(rows: _Rows) -> np.ndarray:
    seeds = sorted(_seeds(rows))
    return np.array([[row.get(seed, np.nan) for seed in seeds] for row in rows.values()])


def seed_cost_s(view: SweepView) -> float:
    """Worker seconds of one more seed of one point: a training from step 0 and its final.

    As whole trainings took here; where all of them left a trunk or were taken up again, their
    steps at the pace of all that was computed. UsageError where nothing was.
    """
    workers = view.started["spec"]["resources"].get("workers", 1)
    trainings = [event for event in view.trainings.values() if event["result"] is not None]
    whole = [event["occupied_s"] for event in trainings if _is_whole(event)]
    pace = seconds_per_step(view)
    if not trainings or pace is None:
        raise UsageError(
            f"{view.started['sweep_id']}: none of its trainings was computed by this sweep; give "
            "--gpu-seconds"
        )
    steps = [event["result"]["steps"] for event in trainings]
    training_s = float(np.mean(whole)) if whole else pace * float(np.mean(steps))
    scored = (event for event in view.finals.values() if is_scored(event) and not event["cached"])
    finals = [event["occupied_s"] for event in scored if "occupied_s" in event]
    return training_s * workers + (float(np.mean(finals)) if finals else 0.0)


def _is_whole(training: Mapping[str, Any]) -> bool:
    """Whether a finished training was computed by this sweep, from step 0 and in one go."""
    result = training["result"]
    return not training["cached"] and result["steps_computed"] == result["steps"]

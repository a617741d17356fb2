"""Which results of a sweep belong to one point, and which points are confirmed. Pure.

A confirmed point has a feasible and legal final for every seed of `seeds.confirm`: those were
written down before anything ran, so their mean is no lucky number.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from service.ledger import SweepView
from service.samples import Sample, ScoredText, SeedResult
from service.states import State
from trainer.errors import UsageError

Event = dict[str, Any]


def is_legal(result: Mapping[str, Any]) -> bool:
    """Whether no audit rule of a final's result failed."""
    return all(rule["verdict"] != "fail" for rule in result.get("audit", ()))


def is_within_cap(view: SweepView, result: Mapping[str, Any]) -> bool:
    """Whether a final's artifact fits the sweep's byte cap, if it has one."""
    cap = view.started.get("cap_bytes")
    return cap is None or result["artifact_bytes"] <= cap


def counts(view: SweepView, event: Event) -> bool:
    """Whether a settled final is feasible and legal, whatever its event says of it."""
    return (
        event["state"] == State.SUCCEEDED
        and is_legal(event["result"])
        and is_within_cap(view, event["result"])
    )


@dataclass(frozen=True)
class Group:
    """The finals of one configuration, by seed. configuration: "fitted" where the clips and bits
    were chosen to fit the cap, None where they are the point's own."""

    point: dict[str, Any]
    finals: dict[int, Event]
    configuration: str | None = None

    @cached_property
    def key(self) -> str:
        """Equal for groups of one point and one configuration."""
        return key_of(self.point) + (f", {self.configuration}" if self.configuration else "")

    @cached_property
    def mean(self) -> float:
        """Mean val bpb over the seeds."""
        return statistics.fmean(bpb_of(event) for event in self.finals.values())

    @property
    def sd(self) -> float | None:
        values = [bpb_of(event) for event in self.finals.values()]
        return statistics.stdev(values) if len(values) > 1 else None

    def typical(self) -> Event:
        """The final nearest the mean: neither the lucky nor the unlucky seed."""
        events = self.finals.values()
        return min(events, key=lambda e: (abs(bpb_of(e) - self.mean), bpb_of(e), e["final"]))


def is_scored(event: Event) -> bool:
    """Whether a settled final has a score on validation, within the limits or not. A failed fit, a
    quarantined bank and a final that was ranked on held-out shards only have none."""
    return "score" in (event["result"] or {})


def bpb_of(event: Event) -> float:
    """The val bpb of a scored final."""
    return event["result"]["score"]["val_bpb"]


def registered_seeds(view: SweepView, phase: str) -> tuple[int, ...]:
    """The seeds that the sweep's spec names for a phase: search or confirm."""
    seeds = view.started.get("spec", {}).get("seeds") or {}
    return tuple(seeds.get(phase, ()))


def confirm_groups(view: SweepView) -> list[Group]:
    """The configurations that were taken up for confirmation, with their finals of that phase."""
    return _grouped(e for e in view.finals.values() if e.get("phase") == "confirm")


def search_groups(view: SweepView) -> list[Group]:
    """The configurations of the search, each with its finals.

    A final of a search seed that was confirmed by the same stage stands in the ledger's view as
    confirmed: it is the search's too.
    """
    seeds = registered_seeds(view, "search")
    events = view.finals.values()
    shared = [e for e in events if e.get("phase") == "confirm" and e["seed"] in seeds]
    own = [e for e in events if e.get("phase", "search") == "search"]
    return _grouped([*shared, *own])


def _grouped(events: Iterable[Event]) -> list[Group]:
    """Finals by configuration; of two with one seed the later one stands."""
    groups: dict[str, Group] = {}
    for event in events:
        empty = Group(event["point"], {}, _configuration(event))
        groups.setdefault(empty.key, empty).finals[event["seed"]] = event
    return list(groups.values())


def _configuration(event: Event) -> str | None:
    return "fitted" if event.get("fitted") else None


def is_confirmed(view: SweepView, group: Group) -> bool:
    """Whether all registered seeds of a point, and no others, are feasible and legal."""
    seeds = set(registered_seeds(view, "confirm"))
    return group.finals.keys() == seeds and all(counts(view, e) for e in group.finals.values())


def best_confirmed(view: SweepView) -> Group | None:
    """The confirmed point with the lowest mean; ties go to fewer bytes, then to the point."""
    groups = [group for group in confirm_groups(view) if is_confirmed(view, group)]
    return min(groups, key=_rank, default=None)


def confirmed_document(view: SweepView) -> dict[str, Any] | None:
    """Describe the best confirmed point: its mean over the registered seeds, and beside it the
    search's own value, which luck had a part in. None where no point is confirmed."""
    group = best_confirmed(view)
    if group is None:
        return None
    known = {each.key: each for each in search_groups(view)}
    searched = known.get(group.key)
    lucky = [bpb_of(e) for e in searched.finals.values() if is_scored(e)] if searched else []
    return {
        "mean_bpb": group.mean,
        "sd_bpb": group.sd,
        "n": len(group.finals),
        "seeds": [{"seed": s, "val_bpb": bpb_of(e)} for s, e in sorted(group.finals.items())],
        "search_bpb": min(lucky, default=None),
    }


def _rank(group: Group) -> tuple[float, float, str]:
    num_bytes = [event["result"]["artifact_bytes"] for event in group.finals.values()]
    return group.mean, statistics.fmean(num_bytes), group.key


def key_of(point: Mapping[str, Any]) -> str:
    """A point as a text: equal for equal points, whatever their order."""
    return json.dumps(point, sort_keys=True)


def sample_of_sweep(view: SweepView) -> Sample:
    """The result of a sweep: its best confirmed point, else the best point over its seeds.

    Raises UsageError where points were taken up for confirmation and none came through, with what
    became of the missing seeds, and where nothing is feasible and legal.
    """
    sweep = view.started["sweep_id"]
    if (groups := confirm_groups(view)) != []:
        best = best_confirmed(view)
        if best is None:
            raise UsageError(f"{sweep}: no point is confirmed; {_shortfall(view, groups)}")
        searched = set(registered_seeds(view, "search")) & best.finals.keys()
        remarks = [f"seed {seed} was searched with too: not fresh" for seed in sorted(searched)]
        seeds = registered_seeds(view, "confirm")
        return _sample(view, best, sweep, seeds, len(groups), tuple(remarks))
    seeds = registered_seeds(view, "search")
    groups = [group for group in search_groups(view) if _is_whole(view, group, seeds)]
    if not groups:
        raise UsageError(f"{sweep}: no point is feasible and legal with every seed of its search")
    best = min(groups, key=_rank)
    remark = f"not confirmed: chosen among {len(groups)} points by the same seeds"
    remarks = (remark,) if len(groups) > 1 else ()
    return _sample(view, best, sweep, seeds, len(groups), remarks)


def _is_whole(view: SweepView, group: Group, seeds: Iterable[int]) -> bool:
    return group.finals.keys() >= set(seeds) and all(counts(view, e) for e in group.finals.values())


def _shortfall(view: SweepView, groups: list[Group]) -> str:
    """What keeps the first point that was taken up from being confirmed."""
    group = groups[0]
    for seed, event in sorted(group.finals.items()):
        if not counts(view, event):
            return f"seed {seed} is {event['state']}: {event['reason'] or 'see its audit'}"
    asked = registered_seeds(view, "confirm")
    missing = [seed for seed in asked if seed not in group.finals]
    if missing:
        return f"no result for seed {missing[0]}; run the sweep again to go on"
    extra = sorted(group.finals.keys() - set(asked))
    return f"seed {extra[0]} was not registered; registered are {', '.join(map(str, asked))}"


def sample_of_final(view: SweepView, final: str) -> Sample:
    """The configuration of a final, with all of its seeds in the final's own phase."""
    event = view.finals[final]
    phase = event.get("phase", "search")
    groups = confirm_groups(view) if phase == "confirm" else search_groups(view)
    own = Group(event["point"], {}, _configuration(event))
    group = next(group for group in groups if group.key == own.key)
    for seed, each in sorted(group.finals.items()):
        if not counts(view, each):
            raise UsageError(
                f"{final[:12]}: its point is {each['state']} with seed {seed}: "
                f"{each['reason'] or 'see its audit'}"
            )
    return _sample(view, group, final[:12], registered_seeds(view, phase), 1, ())


def _sample(
    view: SweepView, group: Group, name: str, seeds: tuple[int, ...], among: int,
    remarks: tuple[str, ...],
) -> Sample:  # fmt: skip
    tokenizer = (view.started.get("facts") or {}).get("tokenizer_sha256")
    scores = [event["result"]["score"] for event in group.finals.values()]
    totals = {(score["tokens"], score["bytes"]) for score in scores}
    if len(totals) > 1:
        raise UsageError(f"{name}: its seeds were scored on different texts: {sorted(totals)}")
    tokens, num_bytes = totals.pop()
    results = (
        SeedResult(seed, bpb_of(event), event["training"], group.configuration)
        for seed, event in sorted(group.finals.items())
    )
    return Sample(
        name=name,
        text=ScoredText(tokens, num_bytes, tokenizer=tokenizer),
        results=tuple(results),
        registered=seeds or None,
        chosen_among=among,
        remarks=remarks,
        source=f"sweep {view.started['sweep_id']}, point {group.key}",
    )

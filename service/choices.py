"""What a sweep runs next, phase by phase: from its plan, or chosen from what its ledger knows.

Nothing here starts anything or remembers anything that the ledger would not tell again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from service.ledger import RETRIED, SweepView
from service.limits import over_limits
from service.plan import (
    Final,
    Inputs,
    Plan,
    Training,
    final_points,
    fitted_final,
    plan_final,
    plan_training,
)
from service.recorder import Recorder
from service.sources import InTurn, Planned, Proposed, Source
from service.specs import FinalSearch, TrainSearch
from service.states import State
from service.sweep import Sweep
from service.tpe import Ask, Told, propose
from trainer.codec import with_values
from trainer.errors import UsageError
from tune_spaces.space import Axes, Point, of_phase, suggest

_TOLD = {State.FAILED: "failed", State.STOPPED: "stopped"}


class Choices:
    """The sources of a sweep's searches. `file` is what errors call the sweep."""

    def __init__(
        self, sweep: Sweep, plan: Plan, inputs: Inputs, file: str, recorder: Recorder
    ) -> None:
        self.sweep = sweep
        self.plan = plan
        self.inputs = inputs
        self.file = file
        self.recorder = recorder
        self.train_axes = of_phase(sweep.spec.space, "train")
        self.final_axes = of_phase(sweep.spec.space, "bank", "final", "eval")

    def trainings(self, interrupted: Sequence[Mapping[str, Any]]) -> Source[Training]:
        """The train search's trainings. A TPE begins with what is open of the points that an
        earlier run knew: `interrupted`, its events of trainings that were under way, and those
        whose trainings ended without a result.
        """
        search = self.sweep.spec.search.train
        if search.method != "tpe":
            return Planned(self._planned_trainings())
        begun = {_key(event["point"]): event["point"] for event in interrupted if _is_own(event)}

        def expand(point: Point) -> list[Training]:
            if _key(point) in self._known_points() | begun.keys():
                return []
            stages = self._trainings_at(point)
            if stages:
                begun[_key(point)] = point
            return stages

        def history() -> list[Told]:
            known = self._known_points()
            return [self._told_training(point) for point in (known | begun).values()]

        known = (self._known_points() | begun).values()
        return Proposed(
            num=search.num or 0,
            first=[training for point in known for training in self._trainings_at(point)],
            history=history,
            propose=self._proposer(self.train_axes, search, {}),
            expand=expand,
        )

    def _planned_trainings(self) -> list[Training]:
        """Those that never ended well, or whose bank is gone while finals still need it."""
        recorder = self.recorder
        needed = {f.training for f in self.plan.finals if not recorder.is_settled(f.id)}
        return [
            training
            for training in self.plan.trainings
            if not recorder.is_over(training.id)
            or (
                training.id in needed
                and recorder.is_trained(training.id)
                and recorder.store.find("trainings", training.id) is None
            )
        ]

    def _trainings_at(self, point: Point) -> list[Training]:
        """The trainings of a point that have not ended; none where the point makes no recipe."""
        if not self.sweep.accepts(point):
            return []
        try:
            planned = [
                plan_training(self.sweep, self.inputs, point, seed, self.file)
                for seed in self.sweep.spec.seeds.search
            ]
        except UsageError as error:  # values that fit alone but not together
            self.recorder.talk.say("point_refused", reason=str(error))
            return []
        return [training for training in planned if not self.recorder.is_over(training.id)]

    def _known_points(self) -> dict[str, Point]:
        trainings = self.recorder.view.trainings.values()
        return {_key(event["point"]): event["point"] for event in trainings if _is_own(event)}

    def _told_training(self, point: Point) -> Told:
        """One point over its seeds: the mean of the trainer's own end-of-run scores."""
        events = [
            event
            for event in self.recorder.view.trainings.values()
            if _is_own(event) and _key(event["point"]) == _key(point)
        ]
        is_open = any(event["state"] == State.CANCELLED for event in events)
        if is_open or len(events) < len(self.sweep.spec.seeds.search):
            return Told(point, "running")
        for event in events:
            if event["state"] in _TOLD:
                return Told(
                    point,
                    _TOLD[event["state"]],  # type: ignore[arg-type]
                    *self._last_rung(event["training"]),
                    reason=event["reason"],
                )
        results = [event["result"] for event in events]
        return Told(
            point,
            "done",
            sum(result["parity_bpb"] for result in results) / len(results),
            violations=self._worst([self._over({}, r) for r in results]),
        )

    def _over(self, final: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, float]:
        return over_limits(final, training, self.sweep.constraints, self.recorder.clocks)

    def _last_rung(self, training: str) -> tuple[float | None, int]:
        rungs = [r for r in self.recorder.view.rungs if r["training"] == training]
        return (rungs[-1]["val_bpb"], rungs[-1]["step"]) if rungs else (None, 0)

    @staticmethod
    def _worst(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
        names = {name for each in found for name in each}
        return {name: max(each.get(name, 0.0) for each in found) for name in names}

    def _proposer(self, axes: Axes, search: TrainSearch | FinalSearch, given: Point) -> Any:
        """Chooses points of these axes in the recipe as it is where `given` is set."""
        recipe = with_values(self.sweep.recipe, given.items())

        def build(ask: Ask) -> Point:
            return suggest(axes, recipe, ask, self.file)

        def choose(history: Sequence[Told], attempt: int) -> Point:
            return propose(history, axes, build, (search.seed, attempt), search.startup)

        return choose

    def finals(self) -> Source[Final]:
        """The final search over every bank of the train search."""
        search = self.sweep.spec.search.final
        banks = [
            self.training_of(event)
            for event in self.recorder.view.trainings.values()
            if event["state"] == State.SUCCEEDED and self._is_of_search(event)
        ]
        if search.method == "tpe":
            return InTurn([self._proposed_finals(bank) for bank in banks])
        done = self.recorder.is_ranked if search.rank_on == "holdout" else self.recorder.is_settled
        planned = [
            self._final_at(bank, point)
            for bank in banks
            for point in final_points(self.sweep, self.file, bank.point)
        ]
        distinct = {final.id: final for final in planned}.values()
        return Planned([final for final in distinct if not done(final.id)])

    def _is_of_search(self, event: Mapping[str, Any]) -> bool:
        """Whether a stage is the search's, though a confirmation may have taken it up again."""
        return _is_own(event) or event["seed"] in self.sweep.spec.seeds.search

    def training_of(self, event: Mapping[str, Any]) -> Training:
        """The training that an event is about."""
        known = self.recorder.trainings.get(event["training"])
        if known is not None:
            return known
        return plan_training(self.sweep, self.inputs, event["point"], event["seed"], self.file)

    def _final_at(self, bank: Training, point: Point) -> Final:
        return plan_final(self.sweep, self.inputs, bank, point, self.file)

    def _proposed_finals(self, bank: Training) -> Proposed[Final]:
        search = self.sweep.spec.search.final
        begun: dict[str, Final] = {}
        scored = (
            self.recorder.view.ranked if search.rank_on == "holdout" else self.recorder.view.finals
        )

        def expand(point: Point) -> list[Final]:
            if not self.sweep.accepts({**bank.point, **point}):
                return []
            try:
                final = self._final_at(bank, point)
            except UsageError as error:
                self.recorder.talk.say("point_refused", reason=str(error))
                return []
            if final.id in begun or final.id in scored:
                return []
            begun[final.id] = final
            return [final]

        def history() -> list[Told]:
            known = [event for event in scored.values() if event["training"] == bank.id]
            open_ = [f.point for f in begun.values() if f.id not in scored]
            own = partial(_without, bank.point)
            return [
                *(self._told_final(event, own(event["point"])) for event in known),
                *(Told(own(point), "running") for point in open_),
            ]

        again = [
            self._final_of(event)
            for event in scored.values()
            if event["training"] == bank.id and event["state"] in RETRIED
        ]
        return Proposed(
            num=search.per_bank or 0,
            first=again,
            history=history,
            propose=self._proposer(self.final_axes, search, bank.point),
            expand=expand,
        )

    def _told_final(self, event: Mapping[str, Any], point: Point) -> Told:
        result = event["result"]
        if result is None:
            return Told(point, "failed", reason=event["reason"])
        training = self.recorder.view.trainings[event["training"]]["result"]
        score = result["holdout_bpb"] if "holdout_bpb" in result else result["score"]["val_bpb"]
        broken = self._over(result, training)
        return Told(point, "done", score, violations=broken, reason=event["reason"])

    def ranked(self) -> tuple[list[Final], list[tuple[Final, int, float]]]:
        """The finals that the ranking sends on to validation, and those it passes over, each
        with its place and its bits per byte on held-out text. What is over a limit is not ranked.
        """
        top = self.sweep.spec.search.final.top or 0
        events = [e for e in self.recorder.view.ranked.values() if e["state"] == State.SUCCEEDED]
        events.sort(key=lambda event: (event["result"]["holdout_bpb"], event["final"]))
        finals = [self.recorder.finals.get(e["final"]) or self._final_of(e) for e in events]
        places = zip(finals[top:], events[top:], strict=True)
        passed = [
            (final, place, event["result"]["holdout_bpb"])
            for place, (final, event) in enumerate(places, start=top + 1)
        ]
        return finals[:top], passed

    def _final_of(self, event: Mapping[str, Any]) -> Final:
        bank = self.training_of(self.recorder.view.trainings[event["training"]])
        return self._final_at(bank, _without(bank.point, event["point"]))

    def fits(self) -> list[Final]:
        """The finals over the byte cap, each distinct one once, to be fitted to it."""
        over = [event for event in self.recorder.view.finals.values() if self._is_over_cap(event)]
        fits: dict[str, Final] = {}
        # Points that differ in what a fit chooses have one: it stands for the same of them by seed.
        for event in sorted(over, key=lambda event: _key(event["point"])):
            final = self._fitted(self._final_of(event))
            fits.setdefault(final.id, final)
        return list(fits.values())

    def _is_over_cap(self, event: Mapping[str, Any]) -> bool:
        """Whether a final of the search is over the byte cap, by its score or by its rank."""
        cap, ranked = self.sweep.cap_bytes, self.recorder.view.ranked.get(event["final"])
        result = event["result"] or (ranked or {}).get("result")
        is_asked = self._is_of_search(event) and not event.get("fitted")
        if cap is None or result is None or not is_asked:
            return False
        return event["state"] == State.INFEASIBLE and result["artifact_bytes"] > cap

    def _fitted(self, final: Final) -> Final:
        return fitted_final(final, self.sweep, self.inputs)

    def confirmations(self) -> list["Wanted"]:
        """What confirms the best points: straight from step 0, one training for each seed."""
        spec = self.sweep.spec
        wanted = []
        for point, is_fitted in top_points(self.recorder.view, spec.search.confirm.top):
            train = {path: value for path, value in point.items() if path in self.train_axes}
            for seed in spec.seeds.confirm:
                training = plan_training(self.sweep, self.inputs, train, seed, self.file)
                wanted.append(Wanted(training, _without(train, point), is_fitted))
        return wanted

    def confirmed_finals(self, wanted: Sequence["Wanted"], *, fitted: bool) -> list[Final]:
        """The finals of the confirmed trainings that left a bank."""
        finals = [
            self._final_at(each.training, each.point)
            for each in wanted
            if each.is_fitted == fitted and self.recorder.is_trained(each.training.id)
        ]
        return [self._fitted(final) for final in finals] if fitted else finals


@dataclass(frozen=True, slots=True)
class Wanted:
    """A training that confirms, the point of the final that is wanted of it, and whether that one
    is fitted to the cap."""

    training: Training
    point: Point
    is_fitted: bool


def top_points(view: SweepView, num: int) -> list[tuple[Point, bool]]:
    """The best points of the search by the mean val bpb over their seeds, and whether a point's
    finals were fitted. Only points with the most seeds that are feasible and legal are taken.

    A search's final that a confirmation took up again is still the search's: its seed tells.
    """
    seeds = view.started["spec"]["seeds"]["search"]
    scores: dict[str, dict[int, float]] = {}
    points: dict[str, tuple[Point, bool]] = {}
    finals = sorted(view.finals.values(), key=lambda event: event.get("phase") != "confirm")
    for event in finals:  # the search's own last: of two of a seed it counts
        is_shared = event.get("phase") == "confirm" and event["seed"] in seeds
        if event["state"] == State.SUCCEEDED and (is_shared or event.get("phase") != "confirm"):
            point = event["point"], bool(event.get("fitted"))
            key = _key({"point": point})
            points[key] = point
            scores.setdefault(key, {})[event["seed"]] = event["result"]["score"]["val_bpb"]
    most = max((len(each) for each in scores.values()), default=0)
    whole = {key: mean(each.values()) for key, each in scores.items() if len(each) == most}
    return [points[key] for key in sorted(whole, key=lambda key: (whole[key], key))[:num]]


def _is_own(event: Mapping[str, Any]) -> bool:
    """Whether a stage was run for the search."""
    return event.get("phase", "search") == "search"


def _without(part: Mapping[str, Any], point: Mapping[str, Any]) -> Point:
    return {path: value for path, value in point.items() if path not in part}


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)

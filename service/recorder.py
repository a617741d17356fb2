"""What happens to a sweep, written into its ledger and said aloud. Decides nothing but a state."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.clocks import ClockPolicy
from service.control import Order, why
from service.labels import run_name
from service.ledger import RETRIED, Ledger, SweepView
from service.limits import settle_ranked
from service.plan import Final, Training, Trunk
from service.policies import settle
from service.sheet import Origin, Sheets
from service.states import State
from service.store import Store
from service.sweep import Constraint
from service.talk import Talk, Watch
from trainer.errors import UsageError

Outcome = dict[str, Any]


class Recorder:
    """Turns what trials report into events, once for each stage."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        talk: Talk,
        constraints: Sequence[Constraint],
        clocks: ClockPolicy,
    ) -> None:
        self.ledger = ledger
        self.store = store
        self.talk = talk
        self.constraints = constraints
        self.clocks = clocks
        self.watch: Watch | None = None
        self.sheets: Sheets | None = None
        self.phase = "search"
        self.cache_hits = 0
        self.num_failed = 0
        self.paid: dict[str, dict[str, Any]] = {}
        """What the broker says that jobs took: a trial that died cannot tell."""
        self.ended: set[str] = set()
        """Stages whose end this run has written into the ledger."""
        self.trainings: dict[str, Training] = {}
        self.finals: dict[str, Final] = {}

    @property
    def view(self) -> SweepView:
        return self.ledger.view

    def is_trained(self, training_id: str) -> bool:
        """Whether a training left a bank."""
        known = self.view.trainings.get(training_id)
        return known is not None and known["state"] == State.SUCCEEDED

    def is_over(self, training_id: str) -> bool:
        """Whether a training has ended in a way that another run does not try again."""
        known = self.view.trainings.get(training_id)
        return known is not None and known["state"] not in RETRIED

    def is_settled(self, final_id: str) -> bool:
        """Whether a final counts as done, in the phase that the sweep is in."""
        known = self.view.finals.get(final_id)
        if known is None or known["state"] in RETRIED:
            return False
        return self.phase != "confirm" or known.get("phase") == "confirm"

    def is_ranked(self, final_id: str) -> bool:
        """Whether a final has its score on held-out shards, or cannot have one."""
        known = self.view.ranked.get(final_id)
        return known is not None and known["state"] not in RETRIED

    def expect(self, stage: Training | Final) -> None:
        """Remember what a stage is, for when its trial speaks of it by its id."""
        if isinstance(stage, Training):
            self.trainings[stage.id] = stage
        else:
            self.finals[stage.id] = stage

    def settle_without_bank(self, finals: Sequence[Final]) -> None:
        """Settle the finals whose training failed or was stopped: there is nothing to score."""
        for final in finals:
            training = self.view.trainings.get(final.training)
            if training is not None and training["state"] in (State.FAILED, State.STOPPED):
                state = State(training["state"])
                reason = f"training {final.training} {state}: {training['reason']}"
                self.final_scored(final, (state, reason), {})

    def pass_over(self, finals: Sequence[tuple[Final, int, float]]) -> None:
        """Settle the finals that their place on held-out shards keeps from validation."""
        for final, place, bpb in finals:
            reason = f"place {place} on held-out training shards, {bpb:.4f} bpb"
            self.final_scored(final, (State.STOPPED, reason), {})

    def settle_unranked(self) -> None:
        """Settle the finals that cannot be ranked: over a limit, quarantined or failed."""
        for event in list(self.view.ranked.values()):
            if event["state"] != State.SUCCEEDED and event["final"] in self.finals:
                settled = State(event["state"]), event["reason"]
                self.final_scored(self.finals[event["final"]], settled, {})

    def training_started(self, training: Training, trunks: Sequence[str] = ()) -> None:
        """A trial has taken a training on, with the trunks that come before it, the last first."""
        self.ledger.append(
            "training_started",
            training=training.id,
            point=training.point,
            seed=training.seed,
            phase=self.phase,
            branch=training.branch,
        )
        self.talk.say("training_started", training=training.id, **short(training.point))
        if self.watch is not None:
            folders = [self.store.folder("trainings", training.id)]
            folders += [self.store.folder("states", trunk) / "trunk" for trunk in trunks]
            steps, label = training.task.train.iterations, run_name(training.point, training.id)
            self.watch.training_started(training.id, folders, steps, label)

    def training_ended(self, outcome: Outcome) -> None:
        """A trial says what became of its training and of the trunks that it needed."""
        training = self.trainings[outcome["training"]]
        if self.watch is not None:
            self.watch.training_ended(training.id)
        for trunk in outcome.get("trunks", ()):
            self.trunk_finished(trunk)
        self.training_finished(training, outcome)

    def trunk_finished(self, outcome: Outcome) -> None:
        """A trunk has left all its states."""
        if outcome["trunk"] in self.view.trunks:
            return
        self.ended.add(outcome["trunk"])
        paid = self.paid.get(outcome["trunk"])
        if paid is not None:
            outcome = {**outcome, **paid, "cached": False}
        self.ledger.append(
            "trunk_finished", **{"state": State.SUCCEEDED, "reason": None, **outcome}
        )
        shown = {name: outcome[name] for name in ("trunk", "cached", "steps_computed")}
        self.talk.say("trunk_finished", states=len(outcome["states"]), **shown)

    def training_finished(
        self, training: Training, outcome: Outcome, phase: str | None = None
    ) -> None:
        """A training has ended: with a bank, or with the reason why not. `phase`: the one that it
        was started in, where that is not the present one."""
        self.cache_hits += outcome["cached"]
        self.ended.add(training.id)
        if outcome["cached"] and self.is_over(training.id):
            return
        result = outcome["result"]
        paid = self.paid.get(training.id)
        if outcome["cached"] and paid is not None:
            self.cache_hits -= 1
            outcome = {**outcome, **paid, "cached": False}
        self.num_failed += outcome["state"] == State.FAILED
        self.ledger.append(
            "training_finished",
            training=training.id,
            point=training.point,
            seed=training.seed,
            phase=phase or self.phase,
            state=outcome["state"],
            reason=outcome["reason"],
            cached=outcome["cached"],
            tries=outcome.get("tries", 0),
            occupied_s=outcome.get("occupied_s", 0.0),
            result=result,
        )
        self.talk.say(
            "training_finished",
            training=training.id,
            state=outcome["state"],
            reason=outcome["reason"],
            cached=outcome["cached"],
            bpb=result["parity_bpb"] if result else None,
        )

    def training_cut_off(self, training_id: str, trunks: Sequence[Trunk], reason: str) -> None:
        """An interrupt ends a training, with the trunks that come before it, wherever it is: what
        has been computed is there, and what a gang was held for is paid."""
        for trunk in trunks:
            found = trunk_found(self.store, trunk)
            if found is not None and trunk.id in self.paid:
                self.trunk_finished({**found, "cached": False})
        untold = [key for key in (training_id, *(t.id for t in trunks)) if key in self.untold()]
        self.ended.update(untold)
        result = self.store.find("trainings", training_id)
        ended = {"state": State.CANCELLED, "reason": reason}
        if result is not None:
            ended = {"state": State.SUCCEEDED, "reason": None}
        paid = {
            "tries": max((self.paid[key]["tries"] for key in untold), default=0),
            "occupied_s": sum(self.paid[key]["occupied_s"] for key in untold),
        }
        training = self.trainings[training_id]
        self.training_finished(training, {**ended, **paid, "cached": False, "result": result})

    def untold(self) -> set[str]:
        """Gangs' jobs that have ended and that the ledger does not tell of yet."""
        return self.paid.keys() - self.ended

    def final_ended(self, outcome: Outcome) -> None:
        """A trial says what became of its final."""
        final = self.finals[outcome["final"]]
        if self.watch is not None:
            self.watch.final_ended()
        if outcome.get("state") == State.FAILED:
            self.num_failed += 1
            settled = State.FAILED, outcome["reason"]
        elif "quarantined" in outcome:
            settled = State.ILLEGAL, outcome["quarantined"]
        elif "infeasible" in outcome:
            settled = State.INFEASIBLE, outcome["infeasible"]
        elif outcome["kind"] == "rank":
            settled = settle_ranked(outcome["result"], self.constraints)
        else:
            training = self.view.trainings[final.training]["result"]
            settled = settle(outcome["result"], training, self.constraints, self.clocks)
        record = self.final_ranked if outcome["kind"] == "rank" else self.final_scored
        record(final, settled, outcome)

    def final_ranked(
        self, final: Final, settled: tuple[State, str | None], outcome: Outcome
    ) -> None:
        """A final has its score on held-out training shards."""
        state, reason = settled
        self.ended.add(final.id)
        if self.is_ranked(final.id):
            return
        result = outcome.get("result")
        self.ledger.append("final_ranked", **_facts(final, state, reason, outcome))
        self.talk.say(
            "final_ranked",
            final=final.id,
            holdout_bpb=result["holdout_bpb"] if result else None,
            bytes=result["artifact_bytes"] if result else None,
            state=state if state != State.SUCCEEDED else None,
            reason=reason,
            **short(final.point),
        )

    def final_scored(
        self, final: Final, settled: tuple[State, str | None], outcome: Outcome
    ) -> None:
        """A final is settled: scored on validation, or with the reason why not."""
        self.cache_hits += bool(outcome.get("cached"))
        self.ended.add(final.id)
        result = outcome.get("result")
        if result is not None:
            self._leave_sheet(final, outcome)
        if self.is_settled(final.id):
            return
        state, reason = settled
        facts = _facts(final, state, reason, outcome)
        fitted = {"fitted": True} if outcome.get("kind") == "fit" else {}
        self.ledger.append("final_scored", **facts, phase=self.phase, **fitted)
        self.talk.say(
            "final_scored",
            final=final.id,
            bpb=result["score"]["val_bpb"] if result else None,
            bytes=result["artifact_bytes"] if result else None,
            state=state if state != State.SUCCEEDED else None,
            reason=reason,
            **short(final.point),
        )

    def _leave_sheet(self, final: Final, outcome: Outcome) -> None:
        """Before the ledger has the score: who reads it there finds the sheet."""
        if self.sheets is None:
            return
        training, started = self.trainings.get(final.training), self.view.started
        branch = None if training is None else training.branch
        is_fitted = outcome.get("kind") == "fit"
        of = (final.id, final.training, final.seed, branch, is_fitted)
        try:
            origin = Origin(started, started.get("facts") or {}, *of)
            self.sheets.leave(origin, was_found=bool(outcome.get("cached")))
        except UsageError as error:  # the score stands without it
            self.talk.say("warning", sheet=str(error))

    def sweep_cancelled(self, order: Order | None) -> None:
        """End the sweep, unless it has ended, after an interrupt that may have come anywhere."""
        self.ledger.recover()
        if self.view.state == State.RUNNING:
            want = None if order is None else order.want
            self.sweep_finished(State.CANCELLED, why(order), want)

    def sweep_finished(self, state: State, reason: str | None, order: str | None = None) -> None:
        """The sweep has ended. `order`: pause, stop or cancel, if somebody wanted that."""
        hits = self.cache_hits
        self.ledger.append(
            "sweep_finished", state=state, cache_hits=hits, reason=reason, order=order
        )
        sweep = self.view.started["sweep_id"]
        self.talk.say("sweep_finished", sweep=sweep, state=state, reason=reason)

    def happened(self, event: Mapping[str, Any]) -> None:
        """A gang's own event: waiting, gang_started, rung, or the end of a job."""
        if event["event"] == "job_ended":
            self.paid[event["job"]] = {n: event[n] for n in ("tries", "occupied_s")}
            return
        facts = {name: value for name, value in event.items() if name != "event"}
        self.ledger.append(event["event"], **facts)
        plain = {k: v for k, v in facts.items() if isinstance(v, str | int | float | bool)}
        self.talk.say(event["event"], **plain)


def _facts(final: Final, state: State, reason: str | None, outcome: Outcome) -> dict[str, Any]:
    return {
        "final": final.id,
        "training": final.training,
        "point": final.point,
        "seed": final.seed,
        "state": state,
        "reason": reason,
        "cached": bool(outcome.get("cached")),
        "occupied_s": outcome.get("occupied_s", 0.0),
        "result": outcome.get("result"),
    }


def short(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point by the last words of its paths."""
    return {path.rpartition(".")[2]: value for path, value in point.items()}


def untold_s(recorder: Recorder) -> float:
    """Seconds of gangs' jobs that have ended and that the ledger does not tell of yet."""
    return sum(recorder.paid[key]["occupied_s"] for key in recorder.untold())


def trunk_found(store: Store, trunk: Trunk) -> Outcome | None:
    """What the ledger says of a trunk that the store has; None if a state of it is missing."""
    results = [store.find("states", state.id) for state in trunk.states]
    if any(result is None for result in results):
        return None
    return {
        "trunk": trunk.id,
        "branch": trunk.parent,
        "states": [state.id for state in trunk.states],
        "cached": True,
        "steps_computed": sum(result["steps_computed"] for result in results if result),
        "occupied_s": 0.0,
        "tries": 0,
    }

"""A sweep from its plan to its ledger. Ray Tune runs the trials, Ray Train the gangs.

`run_sweep` reads top-down: record what the store has already, search the train axes, search the
axes of the finals, confirm the best, close. Killed anywhere, or told to pause, stop or cancel
(`control`), the same call goes on from there: nothing that is finished is computed again, and the
ledger has every stage once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.choices import Choices
from service.control import INTERRUPTS, Orders, cancellable, why
from service.curves import read_curve
from service.facts import MAX_DIFF_BYTES, dirty_diff, environment
from service.identity import Inputs
from service.judge import Judge, make_judge
from service.launch import Launcher, Site
from service.ledger import Ledger, SweepView
from service.plan import Plan, Training
from service.policies import verdict
from service.recorder import Recorder, trunk_found
from service.sheet import Sheets
from service.sides import check_gate, judge_sweep
from service.sources import Planned
from service.specs import ReferenceCurve
from service.states import State
from service.store import Store
from service.sweep import Sweep
from service.talk import Talk
from trainer.codec import dump, to_yaml
from trainer.errors import UsageError
from trainer.runtime.files import write_bytes, write_text
from tune_spaces.space import phase_of


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run of a sweep works with; `file` is what errors call the sweep, `since` when this run
    began (Unix seconds): what was ordered before is not for it."""

    sweep: Sweep
    plan: Plan
    inputs: Inputs
    file: str
    site: Site
    since: float = field(default_factory=time.time)


def run_sweep(setting: Setting, talk: Talk) -> SweepView:
    """Run a sweep to its end, or what is left of it, and return its ledger's view.

    A sweep that an order, its budget or its limits ended early is `stopped`, with the reason; the
    same call, with more of them, goes on. Raises KeyboardInterrupt, with who wanted it, when it
    was cancelled or interrupted, which the ledger then says. To be called from the main thread.
    """
    return SweepRun(setting, talk).run()


class SweepRun:
    """One call of `run_sweep`: the plan, the store and the open ledger."""

    def __init__(self, setting: Setting, talk: Talk) -> None:
        self.setting = setting
        self.talk = talk
        self.plan = setting.plan
        self.spec = setting.sweep.spec
        self.folder = setting.site.paths.sweep(self.plan.sweep_id)
        self.store = Store(setting.site.paths.store)

    def run(self) -> SweepView:
        """Compute what the ledger and the store do not have; return the sweep as it then stands."""
        setting = self.setting
        with Ledger(self.folder.ledger) as self.ledger:
            self.orders = Orders(self.folder.control, setting.since)
            self.orders.forget_older()
            constraints = setting.sweep.constraints
            clocks = setting.sweep.clocks
            self.recorder = Recorder(self.ledger, self.store, self.talk, constraints, clocks)
            self.recorder.sheets = Sheets(setting.site.paths, setting.site.dataset)
            self.choices = Choices(
                setting.sweep, self.plan, setting.inputs, setting.file, self.recorder
            )
            if self.spec.gate is not None:  # or the sweep would end without its verdict
                check_gate(self.spec.gate, setting.site.paths)
            try:
                self._work()
            except UsageError as error:
                self.recorder.sweep_finished(State.FAILED, str(error))
                raise
            except INTERRUPTS as error:
                order = self.orders.cancelled()
                self.recorder.sweep_cancelled(order)
                raise KeyboardInterrupt(why(order)) from error
            return self.ledger.view

    def _work(self) -> None:
        site, recorder = self.setting.site, self.recorder
        with cancellable(self.orders):
            self._open()  # the start, from which a deadline counts, before what counts
            self._record_known()
            sweep = self.setting.sweep
            launcher = Launcher(sweep, self.plan, site, recorder, self.talk, self.orders)
            with launcher:
                try:
                    self._search(launcher)
                    self._confirm(launcher)
                except INTERRUPTS:  # said before Ray ends, which takes long where it is gone too
                    recorder.sweep_cancelled(self.orders.cancelled())
                    raise
        order = launcher.obeyed
        if order is not None:
            recorder.sweep_finished(order.state, order.reason, order.want)
            return
        reason = next(iter(launcher.refusals), None)
        if reason is None or self._is_confirmed():
            self._judge_confirmed()
        recorder.sweep_finished(verdict(self.ledger.view, reason), reason)

    def _open(self) -> None:
        sweep, plan = self.setting.sweep, self.plan
        self.interrupted = dict(self.ledger.view.begun)
        write_text(self.folder.spec, to_yaml(sweep.spec))
        facts = self._facts()
        self.ledger.append(
            "sweep_started",
            sweep_id=plan.sweep_id,
            name=sweep.spec.name,
            recipe=sweep.spec.recipe,
            spec=dump(sweep.spec),
            effective_recipe=sweep.recipe,
            varying=list(plan.varying),
            axes={path: phase_of(path) for path in plan.varying},
            num_trunks=len(plan.trunks),
            num_trainings=plan.num_trainings,
            num_finals=plan.num_finals,
            cap_bytes=sweep.cap_bytes,
            plan_cost=plan.forecast,
            facts={**facts, "spec_digest": plan.sweep_id},
        )
        self.talk.say(
            "sweep_started",
            sweep=plan.sweep_id,
            trunks=len(plan.trunks),
            trainings=plan.num_trainings,
            finals=plan.num_finals,
        )

    def _facts(self) -> dict[str, Any]:
        """What this process was started from; what its code has over the commit is kept beside."""
        diff = dirty_diff()
        facts = environment(self.setting.site.dataset, diff)
        if diff is not None and len(diff) <= MAX_DIFF_BYTES:
            write_bytes(self.folder.diff(facts["git_diff_sha256"]), diff)
        return facts

    def _record_known(self) -> None:
        """Take what the store has: from an earlier run, another sweep, or before a crash."""
        recorder = self.recorder
        ours = self._interrupted_branches()
        for trunk in self.plan.trunks:
            found = trunk_found(self.store, trunk)
            if found is not None:
                is_ours = bool(ours & {state.id for state in trunk.states})
                recorder.trunk_finished({**found, "cached": not is_ours})
        planned = {training.id: training for training in self.plan.trainings}
        for key, event in self.interrupted.items():
            planned.setdefault(key, self.choices.training_of(event))
        for training in planned.values():
            recorder.expect(training)
            result = self.store.find("trainings", training.id)
            if result is not None:
                self._record_training(training, result)
        for final in self.plan.finals:
            recorder.expect(final)
            # Where finals are ranked first, a score on validation must not be looked at yet.
            is_ranked_first = self.spec.search.final.rank_on == "holdout"
            result = None if is_ranked_first else self.store.find("finals", final.id)
            if result is not None and recorder.is_trained(final.training):
                recorder.final_ended(
                    {"final": final.id, "kind": "final", "result": result, "cached": True}
                )
        self.talk.say("cache", hits=recorder.cache_hits)

    def _record_training(self, training: Training, result: dict[str, Any]) -> None:
        """Record a training that the store has; one that finished as our driver died is paid."""
        begun = self.interrupted.get(training.id)
        outcome = {"state": State.SUCCEEDED, "reason": None, "result": result}
        if begun is None:
            self.recorder.training_finished(training, {**outcome, "cached": True})
            return
        paid = {"cached": False, "tries": 1, "occupied_s": sum(result["clock_s"].values())}
        self.recorder.training_finished(training, {**outcome, **paid}, begun.get("phase"))

    def _interrupted_branches(self) -> set[str]:
        """The states of trunks that trainings under way start from, with all before them."""
        parents = {state.id: trunk.parent for trunk in self.plan.trunks for state in trunk.states}
        found: set[str] = set()
        for event in self.interrupted.values():
            branch = event.get("branch")
            while branch is not None:
                found.add(branch)
                branch = parents.get(branch)
        return found

    def _search(self, launcher: Launcher) -> None:
        """Both searches: trainings first, then finals of all their banks."""
        search = self.spec.search

        def reserve_s() -> float:
            return self._confirm_cost_s(launcher)

        trainings = self.choices.trainings(list(self.interrupted.values()))
        launcher.train(trainings, self._judge(), reserve_s=reserve_s)
        self.recorder.settle_without_bank(self.plan.finals)
        finals = self.choices.finals()
        if search.final.rank_on == "validation":
            launcher.finalize("final", finals, reserve_s=reserve_s)
        else:
            launcher.finalize("rank", finals, reserve_s=reserve_s)
            self.recorder.settle_unranked()
            if launcher.is_used_up:  # perhaps before all were ranked
                return
            chosen, passed = self.choices.ranked()
            self.recorder.pass_over(passed)
            launcher.finalize("final", self._unsettled(chosen), reserve_s=reserve_s)
        if search.final.fit:
            fits = self.choices.fits()
            launcher.finalize("fit", self._unsettled(fits), reserve_s=reserve_s)

    def _confirm(self, launcher: Launcher) -> None:
        """The best points again, with the seeds that were written down for it, from step 0."""
        if not self.spec.seeds.confirm or launcher.is_used_up:
            return
        self.recorder.phase = "confirm"
        wanted = self.choices.confirmations()
        trainings = {each.training.id: each.training for each in wanted}
        # One that a rung stopped in the search is trained to its end here.
        left = [t for t in trainings.values() if not self.recorder.is_trained(t.id)]
        launcher.train(Planned(left), None)
        for kind in ("final", "fit"):
            finals = self.choices.confirmed_finals(wanted, fitted=kind == "fit")
            launcher.finalize(kind, self._unsettled(finals))

    def _unsettled(self, finals: Sequence[Any]) -> Planned[Any]:
        return Planned([final for final in finals if not self.recorder.is_settled(final.id)])

    def _judge(self) -> Judge | None:
        stop = self.spec.search.train.stop
        curve: dict[int, float] = {}
        if isinstance(stop, ReferenceCurve):
            folder = self.store.folder("trainings", stop.training)
            if self.store.find("trainings", stop.training) is None:
                raise UsageError(
                    f"{self.setting.file}: search.train.stop.training: the store has no finished "
                    f"training {stop.training}; name one of `fairway status`"
                )
            curve = read_curve(folder / "metrics.jsonl", "val/bpb")
        return make_judge(stop, self.ledger.view.rungs, curve)

    def _confirm_cost_s(self, launcher: Launcher) -> float:
        """Worker-seconds that the confirmation is expected to take."""
        num = len(self.spec.seeds.confirm) * self.spec.search.confirm.top
        steps = self.plan.forecast["steps_straight"] // self.plan.num_trainings
        return num * launcher.cost_of_steps_s(
            steps, self.setting.sweep.recipe["train"].get("max_clock_s")
        )

    def _is_confirmed(self) -> bool:
        phases = {final.get("phase") for final in self.ledger.view.finals.values()}
        return "confirm" in phases

    def _judge_confirmed(self) -> None:
        if self.spec.gate is not None:
            judged = judge_sweep(self.ledger.view, self.spec.gate, self.setting.site.paths)
            self.ledger.append("verdict", gate=judged)
            self.talk.say("verdict", gate=judged["verdict"], reason=judged["reason"])

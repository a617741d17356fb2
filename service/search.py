"""A sweep from its plan to its ledger. Ray Tune runs the trials, Ray Train the gangs.

`run_sweep` reads top-down: record what the store has already, train what is
missing, finalize what is missing, close. Killed anywhere, the same call goes on from there:
nothing that is finished is computed again, and the ledger has every stage once.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.experiment import Trial

from service.cluster import Where, cluster, driver_resources, num_gangs
from service.facts import environment
from service.labels import run_name
from service.ledger import Ledger, SweepView
from service.paths import Paths
from service.plan import Final, Plan, Training
from service.policies import settle, verdict
from service.states import State
from service.store import Store
from service.sweep import Sweep
from service.talk import Talk, Watch
from service.trials import final_trial, train_trial
from trainer.codec import dump, to_yaml
from trainer.data.shards import Dataset
from trainer.errors import UsageError
from trainer.runtime.files import write_text
from tune_spaces.space import phase_of


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run of a sweep works with."""

    sweep: Sweep
    plan: Plan
    paths: Paths
    dataset: Dataset
    where: Where


def run_sweep(setting: Setting, talk: Talk) -> SweepView:
    """Run a sweep to its end, or what is left of it, and return its ledger's view."""
    return SweepRun(setting, talk).run()


class SweepRun:
    """One call of `run_sweep`: the plan, the store and the open ledger."""

    def __init__(self, setting: Setting, talk: Talk) -> None:
        self.setting = setting
        self.talk = talk
        self.plan = setting.plan
        self.folder = setting.paths.sweep(self.plan.sweep_id)
        self.store = Store(setting.paths.store)
        self.trainings = {training.id: training for training in self.plan.trainings}
        self.finals = {final.id: final for final in self.plan.finals}
        self.cache_hits = 0

    def run(self) -> SweepView:
        """Compute what the ledger and the store do not have; return the sweep as it then stands."""
        with Ledger(self.folder.ledger) as ledger:
            self.ledger = ledger
            self._open()
            self._record_known()
            trainings, finals = self._missing_trainings(), self._missing_finals()
            if trainings or finals:
                self._compute(trainings, len(finals))
            self._close(verdict(ledger.view))
            return ledger.view

    def _compute(self, trainings: Sequence[Training], num_finals: int) -> None:
        """Everything that needs Ray; a gang that can never fit ends the sweep here."""
        try:
            with (
                cluster(self.setting.where, self.setting.sweep.spec.resources),
                Watch(self.talk, num_finals) as self.watch,
            ):
                self._train(trainings)
                self._finalize(self._missing_finals())
        except UsageError:
            self._close(State.FAILED)
            raise

    def _open(self) -> None:
        sweep, plan = self.setting.sweep, self.plan
        self.interrupted = set(self.ledger.view.running)
        write_text(self.folder.spec, to_yaml(sweep.spec))
        self.ledger.append(
            "sweep_started",
            sweep_id=plan.sweep_id,
            name=sweep.spec.name,
            recipe=sweep.spec.recipe,
            spec=dump(sweep.spec),
            effective_recipe=sweep.recipe,
            varying=list(plan.varying),
            axes={path: phase_of(path) for path in plan.varying},
            num_trainings=len(plan.trainings),
            num_finals=len(plan.finals),
            cap_bytes=sweep.cap_bytes,
            facts={**environment(self.setting.dataset), "spec_digest": plan.sweep_id},
        )
        self.talk.say(
            "sweep_started",
            sweep=plan.sweep_id,
            trainings=len(plan.trainings),
            finals=len(plan.finals),
        )

    def _record_known(self) -> None:
        """Take what the store has: from an earlier run, another sweep, or before a crash."""
        for training in self.plan.trainings:
            result = self.store.find("trainings", training.id)
            if result is not None:
                self.cache_hits += 1
                is_ours = training.id in self.interrupted  # finished as our driver died
                self._training_finished(training, State.SUCCEEDED, None, result, cached=not is_ours)
        for final in self.plan.finals:
            result = self.store.find("finals", final.id)
            if result is not None and self._is_trained(final.training):
                self.cache_hits += 1
                self._final_scored(final, result, cached=True)
        self.talk.say("cache", hits=self.cache_hits)

    def _is_trained(self, training_id: str) -> bool:
        known = self.ledger.view.trainings.get(training_id)
        return known is not None and known["state"] == State.SUCCEEDED

    def _missing_trainings(self) -> list[Training]:
        """Trainings that never succeeded, or whose bank is gone while finals still need it."""
        needed = {final.training for final in self._missing_finals()}
        return [
            training
            for training in self.plan.trainings
            if not self._is_trained(training.id)
            or (training.id in needed and self.store.find("trainings", training.id) is None)
        ]

    def _missing_finals(self) -> list[Final]:
        """Finals that the ledger has not settled, whether or not the store has them by now."""
        return [final for final in self.plan.finals if not self._is_settled(final.id)]

    def _is_settled(self, final_id: str) -> bool:
        known = self.ledger.view.finals.get(final_id)
        return known is not None and known["state"] != State.FAILED

    def _train(self, trainings: Sequence[Training]) -> None:
        """The train search: every trial is one training, every training one gang."""
        if not trainings:
            return
        sweep = self.setting.sweep.spec
        at_once = sweep.limits.max_concurrent or num_gangs(sweep.resources)
        with tempfile.TemporaryDirectory(prefix="fairway-gangs-") as gangs:
            jobs = [self._training_job(training, gangs) for training in trainings]
            self._search(train_trial, jobs, driver_resources(), at_once, Recorder(self, "training"))

    def _training_job(self, training: Training, ray_storage: str) -> dict[str, Any]:
        sweep = self.setting.sweep.spec
        return {
            "training": training.id,
            "name": training.id,
            "store": str(self.store.root.resolve()),
            "data": str(self.setting.dataset.folder.resolve()),
            "task": dump(training.task),
            "resources": dump(sweep.resources),
            "gpus": sweep.resources.gpus_per_worker,
            "cpus_per_worker": sweep.resources.cpus_per_worker,
            "device": "cuda" if sweep.resources.gpus_per_worker else "cpu",
            "infra_retries": sweep.limits.infra_retries,
            "ray_storage": ray_storage,
        }

    def _finalize(self, finals: Sequence[Final]) -> None:
        """The final search: every trial is one final of one bank."""
        for final in finals:
            if not self._is_trained(final.training):
                self._final_failed(final, f"training {final.training} failed")
        jobs = [self._final_job(final) for final in finals if self._is_trained(final.training)]
        if jobs:
            resources = self.setting.sweep.spec.resources
            self._search(final_trial, jobs, resources.worker(), None, Recorder(self, "final"))

    def _final_job(self, final: Final) -> dict[str, Any]:
        resources = self.setting.sweep.spec.resources
        return {
            "final": final.id,
            "training": final.training,
            "artifact": final.artifact,
            "hessians": final.hessians,
            "store": str(self.store.root.resolve()),
            "data": str(self.setting.dataset.folder.resolve()),
            "task": dump(final.task),
            "cpus": resources.cpus_per_worker,
            "device": "cuda" if resources.gpus_per_worker else "cpu",
        }

    def _search(
        self,
        trial: Callable[[dict[str, Any]], None],
        jobs: Sequence[dict[str, Any]],
        resources: dict[str, float],
        at_once: int | None,
        recorder: "Recorder",
    ) -> None:
        # Tune's own records are of no use to us afterwards: the store and the ledger are.
        with tempfile.TemporaryDirectory(prefix="fairway-tune-") as storage:
            tune.Tuner(
                tune.with_resources(trial, PlacementGroupFactory([resources])),
                param_space={"job": tune.grid_search(list(jobs))},
                tune_config=TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
                run_config=RunConfig(
                    name=self.plan.sweep_id, storage_path=storage, verbose=0, callbacks=[recorder]
                ),
            ).fit()

    def training_started(self, training_id: str) -> None:
        """Record that a training began, and watch its metrics."""
        training = self.trainings[training_id]
        self.ledger.append(
            "training_started", training=training.id, point=training.point, seed=training.seed
        )
        label = run_name(training.point, training.id)
        self.talk.say("training_started", training=training.id, **_short(training.point))
        folder = self.store.folder("trainings", training.id)
        self.watch.training_started(training.id, folder, training.task.train.iterations, label)

    def training_ended(self, outcome: dict[str, Any]) -> None:
        """Record what became of a training, as its trial reported it."""
        training = self.trainings[outcome["training"]]
        self.watch.training_ended(training.id)
        self.cache_hits += outcome["cached"]
        self._training_finished(
            training,
            State(outcome["state"]),
            outcome["reason"],
            outcome["result"],
            cached=outcome["cached"],
        )

    def final_ended(self, outcome: dict[str, Any]) -> None:
        """Record what became of a final: failed, quarantined or scored."""
        final = self.finals[outcome["final"]]
        self.watch.final_ended()
        if outcome.get("state") == State.FAILED:
            self._final_failed(final, outcome["reason"])
        elif "quarantined" in outcome:
            self._settle_final(final, State.ILLEGAL, outcome["quarantined"], None, cached=False)
        else:
            self.cache_hits += outcome["cached"]
            self._final_scored(final, outcome["result"], cached=outcome["cached"])

    def _training_finished(
        self,
        training: Training,
        state: State,
        reason: str | None,
        result: dict[str, Any] | None,
        *,
        cached: bool,
    ) -> None:
        if self._is_trained(training.id):
            return
        self.ledger.append(
            "training_finished",
            training=training.id,
            point=training.point,
            seed=training.seed,
            state=state,
            reason=reason,
            cached=cached,
            result=result,
        )
        parity_bpb = result["parity_bpb"] if result else None
        self.talk.say(
            "training_finished",
            training=training.id,
            state=state,
            reason=reason,
            cached=cached,
            bpb=parity_bpb,
        )

    def _final_failed(self, final: Final, reason: str) -> None:
        self._settle_final(final, State.FAILED, reason, None, cached=False)

    def _final_scored(self, final: Final, result: dict[str, Any], *, cached: bool) -> None:
        training = self.ledger.view.trainings[final.training]["result"]
        state, reason = settle(result, training, self.setting.sweep.constraints)
        self._settle_final(final, state, reason, result, cached=cached)

    def _settle_final(
        self,
        final: Final,
        state: State,
        reason: str | None,
        result: dict[str, Any] | None,
        *,
        cached: bool,
    ) -> None:
        if self._is_settled(final.id):
            return
        self.ledger.append(
            "final_scored",
            final=final.id,
            training=final.training,
            point=final.point,
            seed=final.seed,
            state=state,
            reason=reason,
            cached=cached,
            result=result,
        )
        self.talk.say(
            "final_scored",
            final=final.id,
            bpb=result["score"]["val_bpb"] if result else None,
            bytes=result["artifact_bytes"] if result else None,
            state=state if state != State.SUCCEEDED else None,
            reason=reason,
            **_short(final.point),
        )

    def _close(self, state: State) -> None:
        self.ledger.append("sweep_finished", state=state, cache_hits=self.cache_hits)
        self.talk.say("sweep_finished", sweep=self.plan.sweep_id, state=state)


def _short(point: dict[str, Any]) -> dict[str, Any]:
    return {path.rpartition(".")[2]: value for path, value in point.items()}


class Recorder(tune.Callback):
    """Tells the run what becomes of Tune's trials, in the driver's process."""

    def __init__(self, run: SweepRun, kind: str) -> None:
        self.run = run
        self.kind = kind

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles callbacks into records of its own, which nothing here ever restores.
        return {"kind": self.kind}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if self.kind == "training":
            self.run.training_started(trial.config["job"]["training"])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._end(json.loads(trial.last_result["outcome"]))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        # What a trial can catch it reports; only the death of its process ends here.
        self._end(
            {
                self.kind: trial.config["job"][self.kind],
                "state": State.FAILED,
                "reason": "the trial's process died",
                "result": None,
                "cached": False,
            }
        )

    def _end(self, outcome: dict[str, Any]) -> None:
        if self.kind == "training":
            self.run.training_ended(outcome)
        else:
            self.run.final_ended(outcome)

"""Starts what a sweep runs next: brings Ray up when it is first needed, asks the budget before
every launch, hands the stages to Ray Tune and the trainings' gangs to Ray Train.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from service.budget import Account, seconds_per_step, spent
from service.cluster import Where, cluster, driver_resources, num_gangs
from service.gangs import GangPool
from service.judge import Judge
from service.nodes import machines
from service.paths import Paths
from service.plan import Final, Plan, Training
from service.preflight import question, require_ready
from service.pump import pumping
from service.recorder import Recorder, TrialWatch
from service.searcher import TrialConfig, run_trials
from service.sources import Source
from service.sweep import Sweep
from service.talk import Talk, Watch
from service.trials import REAL, Work
from trainer.codec import dump
from trainer.data.shards import Dataset


@dataclass(frozen=True, slots=True)
class Site:
    """Where a sweep runs, what it reads, and what does the work of a trial."""

    paths: Paths
    dataset: Dataset
    where: Where
    work: Work = REAL


class Launcher:
    """Runs sources of stages to their end, or until the budget or the failures say no.

    `refusal` says why something was not started or was stopped, None while nothing was.
    """

    def __init__(
        self, sweep: Sweep, plan: Plan, site: Site, recorder: Recorder, talk: Talk
    ) -> None:
        self.sweep = sweep
        self.spec = sweep.spec
        self.plan = plan
        self.site = site
        self.recorder = recorder
        self.talk = talk
        self.refusal: str | None = None
        self._stack = ExitStack()
        self._is_up = False
        budget = self.spec.budget
        started_at = recorder.view.first_started_at
        self._account = None if budget is None else Account(budget, started_at)

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def train(self, source: Source[Training], judge: Judge | None, *, reserve_s: float) -> None:
        """Run trainings, each by a gang; `reserve_s` worker-seconds are kept for later."""
        stages = _LookAhead(lambda: self._allowed(source, self._training_cost_s, reserve_s))
        if stages.is_over():
            return
        self._bring_up()
        spec = self.spec
        gangs = min(
            spec.limits.max_concurrent or num_gangs(spec.resources), num_gangs(spec.resources)
        )
        # One more than there are gangs, so that the next training waits at the gang's door and not
        # in Tune; a search that learns chooses a point when it knows the last.
        at_once = gangs if spec.search.train.method == "tpe" else gangs + 1
        with (
            tempfile.TemporaryDirectory(prefix="fairway-gangs-") as ray_storage,
            GangPool(spec.resources, gangs, spec.limits.infra_retries, judge, ray_storage) as pool,
            pumping(lambda: self._attend(pool)),
        ):
            self._run(
                self.site.work.train,
                lambda: self._job(stages, lambda stage: self._training_job(stage, pool)),
                driver_resources(),
                at_once,
                "training",
            )

    def finalize(self, kind: str, source: Source[Final], *, reserve_s: float) -> None:
        """Run finals of one kind: final, rank or fit."""
        stages = _LookAhead(lambda: self._allowed(source, self._final_cost_s, reserve_s))
        if stages.is_over():
            return
        self._bring_up()
        self._run(
            self.site.work.final,
            lambda: self._job(stages, lambda stage: self._final_job(kind, stage)),
            self.spec.resources.worker(),
            None,
            kind,
        )

    def _bring_up(self) -> None:
        if self._is_up:
            return
        self._stack.enter_context(cluster(self.site.where, self.spec.resources))
        if self.site.where.address is not None:
            self._check_nodes()
        self.recorder.watch = self._stack.enter_context(Watch(self.talk, self.plan.num_finals))
        self._is_up = True

    def _check_nodes(self) -> None:
        """Hold a cluster's nodes against what the sweep needs, as `run` did with this machine."""
        site = self.site
        asked = question(self.sweep) if self.spec.require is not None else None
        seen = machines(site.paths.store.absolute(), asked)
        checked = require_ready(
            self.sweep, site.paths, site.dataset, self.plan, seen, is_local=False
        )
        for check in checked:
            self.talk.say("warning", check=check.line())

    def _run(
        self,
        trial: Callable[[dict[str, Any]], None],
        next_job: Callable[[], TrialConfig | None],
        resources: dict[str, float],
        at_once: int | None,
        kind: str,
    ) -> None:
        watch = TrialWatch(self.recorder, kind)
        retries = self.spec.limits.infra_retries
        run_trials(self.plan.sweep_id, trial, next_job, resources, at_once, retries, watch)

    def _job(
        self, stages: "_LookAhead", describe: Callable[[Any], dict[str, Any]]
    ) -> TrialConfig | None:
        stage = stages.next()
        if stage is None:
            return None
        self.recorder.expect(stage)
        return {"stage": stage.id, "job": json.dumps(describe(stage))}

    def _training_job(self, training: Training, pool: GangPool) -> dict[str, Any]:
        resources = self.spec.resources
        return {
            "training": training.id,
            "branch": training.branch,
            "trunks": self._trunks_to(training.branch),
            "broker": pool.broker_name,
            "store": str(self.recorder.store.root.resolve()),
            "data": str(self.site.dataset.folder.resolve()),
            "task": dump(training.task),
            "gpus": resources.gpus_per_worker,
            "cpus_per_worker": resources.cpus_per_worker,
            "device": "cuda" if resources.gpus_per_worker else "cpu",
        }

    def _trunks_to(self, branch: str | None) -> list[dict[str, Any]]:
        """The trunks on the way to a state, the first one first, with the states that trainings
        of the plan or other trunks start from."""
        chain: list[dict[str, Any]] = []
        by_state = {state.id: trunk for trunk in self.plan.trunks for state in trunk.states}
        while branch is not None:
            trunk = by_state[branch]
            states = [[state.id, dump(state.departure)] for state in trunk.states]
            facts = {"id": trunk.id, "task": dump(trunk.task), "parent": trunk.parent}
            chain.insert(0, {**facts, "states": states})
            branch = trunk.parent
        return chain

    def _final_job(self, kind: str, final: Final) -> dict[str, Any]:
        resources = self.spec.resources
        return {
            "kind": kind,
            "final": final.id,
            "training": final.training,
            "artifact": final.artifact,
            "hessians": final.hessians,
            "rank": final.rank,
            "fit": final.id,
            "cap_bytes": self.sweep.cap_bytes,
            "store": str(self.recorder.store.root.resolve()),
            "data": str(self.site.dataset.folder.resolve()),
            "task": dump(final.task),
            "cpus": resources.cpus_per_worker,
            "device": "cuda" if resources.gpus_per_worker else "cpu",
        }

    def _allowed(
        self, source: Source[Any], cost_s: Callable[[Any], float], reserve_s: float
    ) -> Any | None:
        """The next stage, if there is one and it may start. The one place that asks."""
        limit = self.spec.limits.max_failed
        if limit is not None and self.recorder.num_failed >= limit:
            self.refusal = f"limits.max_failed: {limit} stages have failed"
        if self.refusal is not None:
            return None
        stage = source.next()
        if stage is not None and self._account is not None:
            spent_s = self._spent_s(self._running_s)
            self.refusal = self._account.refuses(spent_s, cost_s(stage), reserve_s, time.time())
        return None if self.refusal else stage

    _running_s: Mapping[str, float] = {}

    def _attend(self, pool: GangPool) -> None:
        """Record what the gangs say; stop them where the budget is used up."""
        for event in pool.events():
            self.recorder.happened(event)
        if self._account is None:
            return
        self._running_s = pool.running()
        refusal = self._account.refuses(
            self._spent_s(self._running_s), 0.0, 0.0, time.time(), is_running=True
        )
        if refusal is not None and self._running_s:
            self.refusal = refusal
            pool.stop(refusal)

    def _spent_s(self, running_s: Mapping[str, float]) -> float:
        """Worker-seconds so far, what is under way included."""
        workers = self.spec.resources.workers
        return sum(spent(self.recorder.view, workers).values()) + sum(running_s.values()) * workers

    def _training_cost_s(self, training: Training) -> float:
        train = training.task.train
        return self.cost_of_steps_s(
            train.iterations - self._steps_found(training), train.max_clock_s
        )

    def _steps_found(self, training: Training) -> int:
        """Steps of a trunk that a training has behind it, as far as they are known beforehand."""
        for trunk in self.plan.trunks:
            for state in trunk.states:
                if state.id == training.branch:
                    return state.departure.step or 0
        return 0

    def cost_of_steps_s(self, steps: int, max_clock_s: float | None) -> float:
        """Worker-seconds that so many steps are expected to cost: at the pace that was measured,
        else their clock's cap; nothing is known of a first training without one.
        """
        pace = seconds_per_step(self.recorder.view)
        seconds = pace * steps if pace is not None else max_clock_s or 0.0
        return seconds * self.spec.resources.workers

    def _final_cost_s(self, final: Final) -> float:
        """The mean of the finals so far; nothing is known of the first."""
        paid = [e["occupied_s"] for e in self.recorder.view.paid if e["event"] == "final_scored"]
        return sum(paid) / len(paid) if paid else 0.0


class _LookAhead:
    """Stages with one looked at ahead, so that Ray is not brought up for nothing."""

    def __init__(self, take: Callable[[], Any | None]) -> None:
        self._take = take
        self._ahead = take()

    def is_over(self) -> bool:
        return self._ahead is None

    def next(self) -> Any | None:
        stage, self._ahead = self._ahead, None
        return self._take() if stage is None else stage

"""Starts what a sweep runs next: brings Ray up when it is first needed, asks the budget before
every launch, hands the stages to Ray Tune and the trainings' gangs to Ray Train.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from ray.exceptions import RayError

from service.budget import Account, seconds_per_step, spent
from service.cluster import Where, cluster, driver_resources, num_gangs
from service.control import INTERRUPTS, Order, Orders, answer_signals, why
from service.gangs import GangPool, last_line
from service.judge import Judge
from service.nodes import machines
from service.paths import Paths
from service.plan import Final, Plan, Training, Trunk
from service.preflight import asks_kernel, question, require_ready
from service.pump import pumping
from service.recorder import Recorder, untold_s
from service.searcher import TrialConfig, run_trials
from service.sources import LookAhead, Source
from service.sweep import Sweep
from service.talk import Talk, Watch
from service.trial_watch import TrialWatch
from service.trials import REAL, Work
from trainer.codec import dump
from trainer.data.shards import Dataset
from trainer.errors import BackendError

HASTE_S = 8.0  # how long trainings may take to leave at a checkpoint after an interrupt


@dataclass(frozen=True, slots=True)
class Site:
    """Where a sweep runs, what it reads, and what does the work of a trial."""

    paths: Paths
    dataset: Dataset
    where: Where
    work: Work = REAL


class Launcher:
    """Runs sources of stages to their end, or until an order, the budget or the failures say no.

    `refusals` say why something was not started or was stopped. What a phase may not start for the
    sake of a later one, that one still may: only `is_used_up` ends everything. `obeyed` is the
    order to pause or stop that kept something from starting or going on.
    """

    def __init__(
        self,
        sweep: Sweep,
        plan: Plan,
        site: Site,
        recorder: Recorder,
        talk: Talk,
        orders: Orders,
    ) -> None:
        self.sweep = sweep
        self.spec = sweep.spec
        self.plan = plan
        self.site = site
        self.recorder = recorder
        self.talk = talk
        self.orders = orders
        self.obeyed: Order | None = None
        self._passed_on: Order | None = None
        """The order that the gangs have been told of; it was obeyed before they were."""
        self.refusals: list[str] = []
        self._is_refused = False
        self._admitted: dict[str, float] = {}
        """Worker-seconds that stages were expected to cost when they were let start."""
        self._by_state = {state.id: trunk for trunk in plan.trunks for state in trunk.states}
        self._running_s: Mapping[str, float] = {}
        self._reserve_s: Callable[[], float] = lambda: 0.0
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

    @property
    def is_used_up(self) -> bool:
        """Whether nothing more may start, in whichever phase."""
        account = self._account
        return (
            self._is_told()
            or self._has_failed_too_often()
            or (account is not None and account.is_used_up(self._spent_s(), time.time()))
        )

    def train(
        self,
        source: Source[Training],
        judge: Judge | None,
        *,
        reserve_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Run trainings, each by a gang; `reserve_s` worker-seconds are kept for later phases."""
        self._is_refused, self._reserve_s = False, reserve_s
        stages = LookAhead(lambda: self._allowed(source, self._training_cost_s))
        if stages.is_over():
            return
        self._bring_up()
        spec = self.spec
        fitting = num_gangs(spec.resources)
        gangs = min(spec.limits.max_concurrent or fitting, fitting)
        # One more than there are gangs, so that the next training waits at the gang's door and not
        # in Tune; a search that learns chooses a point when it knows the last.
        at_once = gangs if spec.search.train.method == "tpe" else gangs + 1
        with (
            tempfile.TemporaryDirectory(prefix="fairway-gangs-") as ray_storage,
            GangPool(spec.resources, gangs, spec.limits.infra_retries, judge, ray_storage) as pool,
        ):
            try:
                with pumping(lambda: self.attend(pool)):
                    self._run(
                        self.site.work.train,
                        lambda: self._job(stages, lambda stage: self._training_job(stage, pool)),
                        driver_resources(),
                        at_once,
                        "training",
                    )
            except INTERRUPTS:
                self._cut_off(pool)
                raise

    def finalize(
        self, kind: str, source: Source[Final], *, reserve_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Run finals of one kind: final, rank or fit."""
        self._is_refused, self._reserve_s = False, reserve_s
        stages = LookAhead(lambda: self._allowed(source, self._final_cost_s))
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
        site = self.site
        self._stack.enter_context(cluster(site.where, self.spec.resources, site.paths.compiled))
        answer_signals()  # Ray has put its own answer to SIGTERM in the place of ours
        if site.where.address is not None:
            self._check_nodes()
        self.recorder.watch = self._stack.enter_context(Watch(self.talk, self.plan.num_finals))
        self._is_up = True

    def _check_nodes(self) -> None:
        """Hold a cluster's nodes against what the sweep needs, as `run` did with this machine."""
        site = self.site
        asked = question(self.sweep, self.plan) if asks_kernel(self.sweep, self.plan) else None
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
        for _ in range(1 + retries):
            run_trials(self.plan.sweep_id, trial, next_job, resources, at_once, retries, watch)
            unbegun = watch.take_unbegun()
            if not unbegun or self._is_told():
                return
            next_job = partial(next, iter(unbegun), None)
        watch.give_up(unbegun)

    def _job(
        self, stages: LookAhead[Any], describe: Callable[[Any], dict[str, Any]]
    ) -> TrialConfig | None:
        stage = stages.next()
        if stage is None or self._is_told():
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
        for trunk in self._trunks_before(branch):
            states = [[state.id, dump(state.departure)] for state in trunk.states]
            facts = {"id": trunk.id, "task": dump(trunk.task), "parent": trunk.parent}
            chain.append({**facts, "states": states})
        return chain

    def _trunks_before(self, branch: str | None) -> list[Trunk]:
        chain: list[Trunk] = []
        while branch is not None:
            chain.insert(0, self._by_state[branch])
            branch = chain[0].parent
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

    def _has_failed_too_often(self) -> bool:
        limit = self.spec.limits.max_failed
        return limit is not None and self.recorder.num_failed >= limit

    def _allowed(self, source: Source[Any], cost_s: Callable[[Any], float]) -> Any | None:
        """The next stage, if there is one and it may start. The one place that asks."""
        if not self._is_refused and self._has_failed_too_often():
            self._refuse(f"limits.max_failed: {self.recorder.num_failed} stages have failed")
        if self._is_refused:
            return None
        stage = source.next()
        if stage is not None and self._is_told():
            return None
        if stage is None or self._account is None:
            return stage
        cost = cost_s(stage)
        refusal = self._account.refuses(
            self._spent_s(with_admitted=True), cost, self._reserve_s(), time.time()
        )
        if refusal is not None:
            self._refuse(refusal)
            return None
        self._admitted[stage.id] = cost
        return stage

    def _refuse(self, reason: str) -> None:
        """Start nothing more in this phase."""
        self._is_refused = True
        self.refusals.append(reason)

    def _is_told(self) -> bool:
        """Whether an order keeps what comes from starting. One that was obeyed stays so."""
        order = self.orders.now()
        if order is not None:
            self._obey(order)
        return self.obeyed is not None

    def _obey(self, order: Order) -> None:
        if order != self.obeyed:
            self.talk.say("obeying", order=order.want, by=order.by)
            self._refuse(order.reason)
        self.obeyed = order

    def attend(self, pool: GangPool) -> None:
        """Record what the gangs say; stop them where somebody says so or the budget is used up."""
        try:
            for event in pool.events():
                self.recorder.happened(event)
            self._running_s = pool.running()
        except RayError as error:
            self._refuse("the gangs' broker is gone")
            raise BackendError(
                f"the gangs' broker is gone ({last_line(error)}); run again"
            ) from error
        order = self.orders.now()
        # Gangs told before anything runs would refuse, unobeyed, what Tune is still starting.
        if order is not None and order != self._passed_on and self.recorder.view.running:
            self._passed_on = order
            self._obey(order)
            # A cancellation comes as an interrupt of the main thread.
            (pool.stop if order.want == "pause" else pool.drain)(order.reason)
        if self._account is None or not self._running_s or self._is_refused:
            return
        refusal = self._account.refuses(
            self._spent_s(), 0.0, self._reserve_s(), time.time(), is_running=True
        )
        if refusal is not None:
            self._refuse(refusal)
            pool.stop(refusal)

    def _cut_off(self, pool: GangPool) -> None:
        """After an interrupt: let what runs leave at a checkpoint if it soon can, and record what
        it took and the sweep's end: Ray, which is not asked for more, may be gone as well."""
        order = self.orders.cancelled()
        reason = why(order)
        self.recorder.ledger.recover()
        deadline = time.monotonic() + HASTE_S
        with suppress(RayError, BackendError):
            pool.stop(reason)
            while pool.running() and time.monotonic() < deadline:
                time.sleep(0.1)
            self.attend(pool)
        for key, seconds in self._running_s.items():
            self.recorder.paid.setdefault(key, {"tries": 1, "occupied_s": seconds})
        for key, event in list(self.recorder.view.running.items()):
            self.recorder.training_cut_off(key, self._trunks_before(event["branch"]), reason)
        self.recorder.sweep_cancelled(order)

    def _spent_s(self, *, with_admitted: bool = False) -> float:
        """Worker-seconds so far, what is under way included; with what was admitted at its whole
        expected cost where that is more than it has had."""
        workers = self.spec.resources.workers
        told = sum(spent(self.recorder.view, workers).values())
        held = {key: seconds * workers for key, seconds in self._running_s.items()}
        open_s = sum(held.values())
        if with_admitted:
            ids = self._admitted.keys() - self.recorder.ended
            open_s += sum(max(self._admitted[key] - held.get(key, 0.0), 0.0) for key in ids)
        return told + open_s + untold_s(self.recorder) * workers

    def _training_cost_s(self, training: Training) -> float:
        train = training.task.train
        steps = train.iterations - self._steps_found(training)
        return self.cost_of_steps_s(steps, train.max_clock_s)

    def _steps_found(self, training: Training) -> int:
        """Steps that a training has behind it: of a state that is there, or that a training which
        was let start before it is to leave."""
        if training.branch not in self._by_state:
            return 0
        steps = {
            state.id: state.departure.step or 0 for state in self._by_state[training.branch].states
        }
        found = self.recorder.store.find("states", training.branch) is not None
        started = self.recorder.trainings.keys() & self._admitted.keys()
        is_coming = any(self.recorder.trainings[key].branch in steps for key in started)
        return steps[training.branch] if found or is_coming else 0

    def cost_of_steps_s(self, steps: int, max_clock_s: float | None) -> float:
        """Worker-seconds that so many steps are expected to cost: at the pace that was measured,
        else their clock's cap; nothing is known of a first training without one.
        """
        pace = seconds_per_step(self.recorder.view)
        seconds = pace * steps if pace is not None else max_clock_s or 0.0
        return seconds * self.spec.resources.workers

    def _final_cost_s(self, final: Final) -> float:
        """The mean of the finals so far, ranked or scored; nothing is known of the first."""
        kinds = ("final_scored", "final_ranked")
        paid = [e["occupied_s"] for e in self.recorder.view.paid if e["event"] in kinds]
        return sum(paid) / len(paid) if paid else 0.0

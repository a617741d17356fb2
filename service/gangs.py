"""The gangs of a sweep: groups of workers that do its trainings, one after another.

A gang is one Ray Train run: one placement group, all workers or none. `GangPool` keeps a thread
for each in the driver's process; it starts the run when there is a job, and starts it again
after what Ray Train itself could not mend. Nothing is killed in normal operation: the broker
tells a gang that it is over, and its ranks return. What dies all the same, the janitor clears.
"""

import logging
import math
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import ControllerError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service import janitor
from service.broker import Broker
from service.cluster import free_resources, shortage
from service.judge import Judge
from service.specs import Resources

logger = logging.getLogger(__name__)

IDLE_S = 60.0  # after so long without a job a gang gives its place to others
LOOK_S = 0.3  # how often a gang that waits for its place is looked at
SWEEP_S = 5.0  # how often orphans are looked for
LEAVE_S = 60.0  # how long workers that are told to end may take
HASTE_S = 8.0  # the same after an interrupt
CLEAR_S = 15.0
OUT_OF_REACH = (RayError, OSError, RuntimeError)


class GangPool:
    """The gangs of one run of a sweep; a context manager in the process that runs it.

    `ray_storage`: a folder of this machine for Ray Train's own records, of no use afterwards.
    """

    def __init__(
        self,
        resources: Resources,
        num_gangs: int,
        infra_retries: int,
        judge: Judge | None,
        ray_storage: str,
        *,
        idle_s: float = IDLE_S,
    ) -> None:
        self.resources = resources
        self.infra_retries = infra_retries
        self.ray_storage = ray_storage
        self.namespace = self.broker_name = f"fairway-{uuid.uuid4().hex[:12]}"
        self._names = [f"gang-{i}" for i in range(num_gangs)]
        self._broker_words = (num_gangs, resources.workers, infra_retries, judge)
        self._broker_options = {"one_each": resources.gang == "fresh", "idle_s": idle_s}
        self._runs: dict[str, _Run] = {}
        self._all_controllers: set[str] = set()
        self._waiting: list[dict[str, Any]] = []
        self._placed_at = -math.inf  # when a gang was last seen to have its place
        self._is_over = threading.Event()

    def __enter__(self) -> "GangPool":
        janitor.sweep()
        here = ray.get_runtime_context().get_node_id()
        self._broker: Any = (
            ray.remote(num_cpus=0, max_restarts=0)(Broker)
            .options(
                name=self.broker_name,
                namespace=self.namespace,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote(*self._broker_words, **self._broker_options)
        )
        self._threads = [
            threading.Thread(target=self._serve, args=(name,), name=name, daemon=True)
            for name in self._names
        ]
        self._watcher = threading.Thread(target=self._watch, name="gang-watcher", daemon=True)
        for thread in (*self._threads, self._watcher):
            thread.start()
        return self

    def events(self) -> list[dict[str, Any]]:
        """Return what happened since the last call: waiting, gang_started and rung (see ledger),
        and job_ended (see the broker)."""
        waiting = [self._waiting.pop(0) for _ in range(len(self._waiting))]
        return waiting + ray.get(self._broker.events.remote())

    def running(self) -> dict[str, float]:
        """Return the seconds for which each job under way has held its gang so far."""
        return ray.get(self._broker.running.remote())

    def stop(self, reason: str) -> None:
        """End running jobs by agreement, as cancelled; refuse queued and later ones."""
        ray.get(self._broker.stop.remote(reason))

    def drain(self, reason: str) -> None:
        """Refuse, as cancelled, trainings that no gang has worked on yet."""
        ray.get(self._broker.drain.remote(reason))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_interrupted = kind is not None and not issubclass(kind, Exception)
        try:
            self._end_gangs(HASTE_S if is_interrupted else LEAVE_S)
        finally:
            self._is_over.set()
            self._watcher.join()
            ray.kill(self._broker)
            left = janitor.clear(self._all_controllers, CLEAR_S)
            if left:
                logger.error("left behind by the gangs of this run: %s", "; ".join(left))

    def _end_gangs(self, leave_s: float) -> None:
        """Let the gangs that are up end by agreement, and kill those that never came up."""
        try:
            up = ray.get(self._broker.close.remote())
        except RayError as error:
            logger.error("the broker of the gangs died: %s", last_line(error))
            up = []
        for name, run in list(self._runs.items()):
            if name not in up:
                run.kill()
        deadline = time.monotonic() + leave_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for name, run in list(self._runs.items()):
            logger.error("%s did not end within %g s and was killed", name, leave_s)
            run.kill()

    def _serve(self, gang: str) -> None:
        """The thread of a gang: one Train run after another while there is work."""
        try:
            while ray.get(self._broker.wait_for_work.remote(gang)):
                fault, unplaced = self._run_gang(gang)
                _sweep()
                alone = unplaced and not self._any_has_place()
                ended = self._broker.gang_ended.remote(gang, fault, unplaced=unplaced, alone=alone)
                ray.get(ended)
        except OUT_OF_REACH as error:
            if not self._is_over.is_set():
                logger.error("%s: broker or cluster is gone: %s", gang, last_line(error))

    def _run_gang(self, gang: str) -> tuple[str | None, bool]:
        """Run a gang to its end. Return why it ended, None if as agreed, and whether for want of
        a place."""
        try:
            self._runs[gang] = run = self._train_run(gang)
            run.fit()
        except ControllerError as error:
            if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                return self._unschedulable(), True
            return f"the gang's controller failed: {last_line(error)}", False
        except (WorkerGroupError, RayError) as error:
            return last_line(error), False
        except Exception as error:  # in a thread it would be lost, and the jobs wait for ever
            logger.exception("%s: could not be run", gang)
            return f"the gang could not be run: {type(error).__name__}: {last_line(error)}", False
        else:
            return None, False
        finally:
            run = self._runs.pop(gang, None)
            if run is not None:
                run.kill()  # it is over, but the trace of its error would keep the actor
                self._all_controllers |= run.controllers

    def _train_run(self, gang: str) -> "_Run":
        resources = self.resources
        return _Run(
            _serve_jobs,
            train_loop_config={
                "broker": self.broker_name,
                "gang": gang,
                "gpus": resources.gpus_per_worker,
                "cpus_per_worker": resources.cpus_per_worker,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers,
                use_gpu=bool(resources.gpus_per_worker),
                resources_per_worker=resources.worker(),
                placement_strategy=resources.placement,
            ),
            run_config=ray.train.RunConfig(
                name=f"{gang}-{uuid.uuid4().hex[:8]}",  # Train resumes a name that it knows
                storage_path=str(Path(self.ray_storage).resolve()),
                failure_config=ray.train.FailureConfig(
                    # Once more by itself, which is quicker; the broker counts the tries.
                    max_failures=min(1, self.infra_retries),
                    controller_failure_limit=0,
                ),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
                callbacks=[_Faults(self.broker_name, gang)],
            ),
            torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        )

    def _controllers(self) -> set[str]:
        """The actors that control the runs of the moment, by id."""
        return set().union(*(run.controllers for run in list(self._runs.values())))

    def _any_has_place(self) -> bool:
        """Whether a gang has its place, or had it while the one that now gives up was waiting."""
        ours = self._controllers()
        if any(group.creator in ours and not group.is_waiting for group in janitor.groups()):
            return True
        return time.monotonic() - self._placed_at < self.resources.start_timeout_s

    def _unschedulable(self) -> str:
        lack = shortage(self.resources, free_resources()) or "the place was taken by others"
        return (
            f"unschedulable: {lack} after {self.resources.start_timeout_s:g} s; wait for others to "
            "end, lower resources.workers or raise resources.start_timeout_s"
        )

    def _watch(self) -> None:
        """The watcher's thread: says why a gang waits, and sweeps up after what was killed."""
        next_sweep, lacking, told = 0.0, False, None
        while not self._is_over.wait(LOOK_S):
            if time.monotonic() >= next_sweep:
                _sweep()
                next_sweep = time.monotonic() + SWEEP_S
            try:
                free = free_resources()  # before the table: a group made between is not missed
                ours = self._controllers()
                groups = [g for g in janitor.groups() if g.creator in ours] if ours else []
                is_waiting = any(group.is_waiting for group in groups)
                if not all(group.is_waiting for group in groups):
                    self._placed_at = time.monotonic()
                # Twice in a row: what a gang that just ended had is free a moment later.
                lack = shortage(self.resources, free) if is_waiting and lacking else None
                lacking = is_waiting
                if lack is not None and lack != told:
                    self._waiting.append({"event": "waiting", "reason": lack})
                told = lack or (told if is_waiting else None)
            except OUT_OF_REACH as error:
                logger.warning("could not look at the cluster: %s", last_line(error))


def _sweep() -> None:
    """Clear orphans; a cluster that does not answer now is asked again later."""
    try:
        janitor.sweep()
    except OUT_OF_REACH as error:
        logger.warning("could not look for orphans: %s", last_line(error))


class _Run(TorchTrainer):
    """Ray Train's own run, without two processes that no gang needs, and with a way to end it.

    Private API of ray 2.60. Left out are the cleaner of placement groups, which works only where
    a dashboard runs and never for a gang that still waits (the janitor does), and the dataset
    manager, which serves ray.data alone.
    """

    controller: Any = None
    controllers: frozenset[str] = frozenset()

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        told = list(self.run_config.callbacks or ())
        return [
            AcceleratorSetupCallback(self.backend_config, self.scaling_config),
            BackendSetupCallback(self.backend_config),
            UserCallbackHandler(told, self.train_run_context),
        ]

    def _initialize_and_run_controller(self, **words: Any) -> Any:
        here = ray.get_runtime_context().get_node_id()
        # No environment of its own: it has ours, and so a process that is up already can be it.
        affinity = NodeAffinitySchedulingStrategy(here, soft=False)
        actor: Any = ray.remote(num_cpus=0)(TrainController)
        self.controller = actor.options(scheduling_strategy=affinity).remote(**words)
        self.controllers = frozenset([self.controller._actor_id.hex()])
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())

    def kill(self) -> None:
        """End the run from outside; its workers die with it."""
        if self.controller is not None:
            ray.kill(self.controller)


class _Faults(ray.train.UserCallback):
    """Tells the broker, from the controller's process, that a gang has lost workers."""

    def __init__(self, broker: str, gang: str) -> None:
        self.broker = broker
        self.gang = gang

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = next(iter(worker_exceptions.items()))
        broker = ray.get_actor(self.broker, namespace=self.broker)
        broker.fault.remote(self.gang, f"rank {rank}: {last_line(error)}")


def _serve_jobs(config: dict[str, Any]) -> None:
    from service.worker import serve  # torch is imported in the worker alone

    serve(config)


def last_line(error: BaseException) -> str:
    """The last line of an error that carries the trace of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__

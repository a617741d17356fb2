"""A Ray to run on: the one at an address, or a small one of our own that ends with us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from service.policies import gangs_at_once, what_is_missing
from service.sweep import Resources
from trainer.errors import BackendError, UsageError
from trainer.runtime.environment import hand_down

OBJECT_STORE_BYTES = 150_000_000  # stages hand over paths, not tensors
DRIVER = "fairway_driver"  # a custom resource, so that a waiting driver takes no CPU from a gang


@dataclass(frozen=True, slots=True)
class Where:
    """Where to run: a cluster's address, or how many CPUs a local Ray may use."""

    address: str | None = None
    num_cpus: int | None = None


def worker_environment(resources: Resources, *, is_ours: bool) -> dict[str, str]:
    """Ray's own settings, which only environment variables carry (ray 2.60)."""
    # Each is a process more for every gang, and a Ray of our own has nobody to preempt it.
    spared = ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_METRICS_ENABLED")
    return {
        **({name: "0" for name in spared} if is_ours else {}),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(resources.start_timeout_s),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the pace at which an end is noticed
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
        "OMP_NUM_THREADS": str(resources.cpus_per_worker),
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }


@contextmanager
def cluster(where: Where, resources: Resources) -> Iterator[None]:
    """Connect to Ray or start it, check that a gang fits, and shut it down at the end.

    UsageError if the gang can never fit, BackendError if the address does not answer.
    """
    is_ours = where.address is None
    environment = worker_environment(resources, is_ours=is_ours)
    try:
        if not is_ours:
            ray.init(
                where.address,
                runtime_env={"env_vars": environment},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            # Inherited, not a runtime_env: Ray's own first workers then fit, and none is wasted.
            hand_down(environment)
            ray.init(
                num_cpus=where.num_cpus,
                resources={DRIVER: 1000.0},
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"Ray at {where.address or 'this machine'}: {str(error).splitlines()[0]}; check the "
            "address, that the head is up and that RAY_AUTH_MODE is the cluster's"
        ) from error
    try:
        missing = what_is_missing(resources, _nodes())
        if missing is not None:
            raise UsageError(
                f"resources: {missing}; lower resources.workers or cpus_per_worker, or run on a "
                "larger cluster"
            )
        yield
    finally:
        ray.shutdown()


def driver_resources() -> dict[str, float]:
    """What a waiting driver reserves: nothing that a gang needs, where the cluster lets us."""
    return {DRIVER: 1.0} if DRIVER in ray.cluster_resources() else {"CPU": 0.001}


def num_gangs(resources: Resources) -> int:
    """How many gangs fit at once; at least one, as `cluster` has checked."""
    return max(1, gangs_at_once(resources, _nodes()))


def _nodes() -> list[dict[str, Any]]:
    """The nodes as gangs see them: where drivers have to take CPU, one is theirs."""
    nodes = ray.nodes()
    if DRIVER in ray.cluster_resources() or len([n for n in nodes if n["Alive"]]) > 1:
        return nodes
    return [
        {**node, "Resources": {**node["Resources"], "CPU": node["Resources"].get("CPU", 1) - 1}}
        for node in nodes
    ]

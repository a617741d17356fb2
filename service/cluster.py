"""A Ray to run on: the one at an address, or a small one of our own that ends with us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.state import available_resources_per_node

from service.policies import gangs_at_once, what_is_missing
from service.specs import Resources
from trainer.errors import BackendError, UsageError
from trainer.runtime.environment import compiled_in, hand_down

OBJECT_STORE_BYTES = 150_000_000  # stages hand over paths, not tensors
# Of every head Ray has one (2.60): a waiting driver is held there and takes no CPU from a gang.
HEAD = "node:__internal_head__"


@dataclass(frozen=True, slots=True)
class Where:
    """Where to run: a cluster's address, or how many CPUs a local Ray may use."""

    address: str | None = None
    num_cpus: int | None = None


def worker_environment(
    resources: Resources, compiled: Path | None, *, is_ours: bool
) -> dict[str, str]:
    """Settings of Ray and torch that only environment variables carry (ray 2.60)."""
    # A process more for every gang, and a Ray of our own has nobody to preempt it.
    spared = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if is_ours else {}
    return {
        **spared,
        **({} if compiled is None else compiled_in(compiled)),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(resources.start_timeout_s),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the pace at which an end is noticed
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # the controller of a gang does so on purpose
        # A rank that waits for one that is gone never leaves by itself.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
        "OMP_NUM_THREADS": str(resources.cpus_per_worker),
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }


@contextmanager
def cluster(where: Where, resources: Resources, compiled: Path | None = None) -> Iterator[None]:
    """Connect to Ray or start it, check that a gang fits, and shut it down at the end.

    Workers share what torch.compile makes in the folder `compiled`, one for all sweeps.
    UsageError if the gang can never fit, BackendError if the address does not answer.
    """
    is_ours = where.address is None
    environment = worker_environment(resources, compiled, is_ours=is_ours)
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
                "local",  # without, it would join whatever cluster was started on this machine
                num_cpus=where.num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # a bare one where a node of our own does not come up in time
        raise BackendError(
            f"Ray at {where.address or 'this machine'}: {str(error).splitlines()[0]}; check the "
            "address, that the head is up and that RAY_AUTH_MODE is the cluster's"
        ) from error
    try:
        missing = never_fits(resources)
        if missing is not None:
            raise UsageError(
                f"resources: {missing}; lower resources.workers or cpus_per_worker, or run on a "
                "larger cluster"
            )
        yield
    finally:
        ray.shutdown()


def never_fits(resources: Resources) -> str | None:
    """Say why a gang can never start on the connected cluster, None if it can."""
    return what_is_missing(resources, ray.nodes())


def driver_resources() -> dict[str, float]:
    """What a waiting driver reserves: a place on the head, and nothing that a gang needs."""
    return {HEAD: 0.001}


def num_gangs(resources: Resources) -> int:
    """How many gangs fit at once; at least one, as `cluster` has checked."""
    return max(1, gangs_at_once(resources, ray.nodes()))


def shortage(resources: Resources, free: list[dict[str, float]]) -> str | None:
    """Say what a gang lacks just now, given what each node has free; None if it fits."""
    each, workers = resources.worker(), resources.workers
    places = [min(int(node.get(kind, 0) // num) for kind, num in each.items()) for node in free]
    packed = resources.placement == "STRICT_PACK"
    fitting = {
        "STRICT_PACK": max(places, default=0),
        "STRICT_SPREAD": sum(1 for place in places if place),
    }.get(resources.placement, sum(places))
    if fitting >= workers:
        return None
    if resources.placement == "STRICT_SPREAD":
        return f"need {workers} nodes with {_amounts(each)} each, free {fitting}"
    where = " on one node" if packed and len(free) > 1 else ""
    for kind, num in each.items():
        have = [node.get(kind, 0.0) for node in free]
        most = max(have, default=0.0) if packed else sum(have)
        if most < workers * num:
            return f"need {_amounts({kind: workers * num})}{where}, free {most:g}"
    asked = _amounts({kind: workers * num for kind, num in each.items()})
    return f"need {asked}{where}, free for {fitting} of {workers} workers"


def _amounts(amounts: dict[str, float]) -> str:
    """1 GPU + 8 CPUs."""
    return " + ".join(f"{num:g} {kind}{'s' if num != 1 else ''}" for kind, num in amounts.items())


def free_resources() -> list[dict[str, float]]:
    """What each living node has free just now."""
    return list(available_resources_per_node().values())

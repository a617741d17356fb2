"""A process of the service that has patience with its cluster, whose machine may stand still.

A module of its own, without Ray: that reads its token's variables once, when it is imported.
"""

from service.jobs import ray_jobs
from service.jobs.ray_jobs import RayJobRunner
from tests import dispatching
from tests.dispatching import PATIENCE_S, PROGRAM, set_environment


def begin(variables: dict[str, str], address: str) -> None:
    """Set this process's variables, and how long it waits for the cluster at an address."""
    set_environment(variables)
    ray_jobs._CONNECT_S = ray_jobs._ANSWER_S = ray_jobs.STOP_S = PATIENCE_S
    dispatching._RAY_RUNNERS[address] = RayJobRunner(address, PROGRAM, deadline_s=PATIENCE_S)

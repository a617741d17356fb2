"""Placement groups that nobody owns any more, and how to be rid of them.

Ray keeps a placement group until the job *and* the actor that made it are dead; what a killed
actor leaves in a live job holds its GPUs for as long as the job lives, and groups that were
pending while their job ended may outlive it (ray 2.60). The tables that tell are private API:
Ray is pinned, and tests/integration/test_janitor.py leaks on purpose to see that they still do.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

_Group: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]  # made at import
_Actor: Any = gcs_pb2.ActorTableData  # type: ignore[attr-defined]
WAITING = (_Group.PENDING, _Group.PREPARED, _Group.RESCHEDULING)
OF_TRAIN = ("TrainController", "RayTrainWorker", "SynchronizationActor")
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Group:
    """A placement group that is not removed. Ids are hexadecimal; `creator` is an actor's, empty
    where a driver made it."""

    id: str
    job: str
    creator: str
    is_waiting: bool
    is_detached: bool


def groups() -> list[Group]:
    """Every placement group of the cluster that is not removed."""
    found = []
    for raw in ray_state._connect_and_get_accessor().get_placement_group_table():
        group = _Group.FromString(raw)
        if group.state != _Group.REMOVED:
            by_actor = any(byte != 255 for byte in group.creator_actor_id)
            found.append(
                Group(
                    id=group.placement_group_id.hex(),
                    job=group.creator_job_id.hex(),
                    creator=group.creator_actor_id.hex() if by_actor else "",
                    is_waiting=group.state in WAITING,
                    is_detached=group.is_detached,
                )
            )
    return found


def orphans() -> list[Group]:
    """Groups whose job is dead, or, in our own job, the actor that made them.

    In another job that lives, such a group may be in use: it is left alone.
    """
    ours = ray.get_runtime_context().get_job_id()
    candidates = [group for group in groups() if not group.is_detached]
    if not candidates:
        return []
    dead = {job["JobID"] for job in ray_state.job_table() if job["IsDead"]}
    return [
        group
        for group in candidates
        if group.job in dead
        or (group.job == ours and group.creator != "" and _is_dead(group.creator))
    ]


def sweep() -> int:
    """Remove what `orphans` finds and return how many that were."""
    found = orphans()
    for group in found:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group.id)))
    return len(found)


def leftovers() -> list[str]:
    """A line for every group that nobody owns, empty where the cluster is clean."""
    return [f"placement group {group.id} of job {group.job}" for group in orphans()]


def remains(creators: set[str]) -> list[str]:
    """A line for every group of these controllers, and every process of Ray Train, that is left."""
    held = [f"placement group {g.id}" for g in groups() if g.creator in creators]
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for raw in ray_state._connect_and_get_accessor().get_actor_table(job, "ALIVE"):
        actor = _Actor.FromString(raw)
        if actor.class_name in OF_TRAIN:
            held.append(f"{actor.class_name} (pid {actor.pid})")
    return held


def clear(creators: set[str], patience_s: float) -> list[str]:
    """Sweep until nothing of these controllers is left; return what still is after so long."""
    deadline = time.monotonic() + patience_s
    while True:
        sweep()
        left = remains(creators)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)


def _is_dead(actor_id: str) -> bool:
    raw = ray_state._connect_and_get_accessor().get_actor_info(ray.ActorID.from_hex(actor_id))
    return raw is None or _Actor.FromString(raw).state == _Actor.DEAD

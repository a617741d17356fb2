"""A pool of warm gangs on a local Ray, and the micro trainings that tests hand in."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from service import gangs
from service.gangs import GangPool
from service.judge import AgainstReference
from service.specs import ReferenceCurve, Resources
from service.trials import call
from tests import tiny
from trainer.codec import dump
from trainer.runtime.tensors import load_tensors, saved_names
from trainer.specs.task import train_task

# Ray and its workers start slowly where the cores are busy with other work.
PATIENCE_S = 240.0
RESOURCES = Resources(workers=2, start_timeout_s=PATIENCE_S)
# Stops whatever is validated on its way.
JUDGE = AgainstReference(ReferenceCurve(training="reference"), {0: 0.1})


@dataclass(frozen=True)
class Desk:
    """A pool of gangs, and the jobs that tests hand in."""

    pool: GangPool
    store: Path
    data: Path

    def job(self, name: str, **values: Any) -> dict[str, Any]:
        """A training of the micro recipe; `a__b=1` stands for the path a.b."""
        paths = {path.replace("__", "."): value for path, value in values.items()}
        return {
            "id": name,
            "kind": "training",
            "folder": str(self.store / name),
            "data": str(self.data),
            "task": dump(train_task(tiny.recipe(paths))),
            "start": None,
            "states": [],
            "device": "cpu",
            "gpus": 0,
            "cpus_per_worker": 1,
        }

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        return self.start(job).outcome()

    def start(self, job: dict[str, Any]) -> "Asked":
        return Asked(lambda: call(self.pool.broker_name, job))

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.store / name / "result.json").read_text())

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.store / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def bank(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        folder = self.store / name / "bank"
        return {entry: load_tensors(folder, entry) for entry in saved_names(folder)}


class Asked:
    """A job asked for in a thread of its own; `outcome` waits for it."""

    def __init__(self, ask: Callable[[], dict[str, Any]]) -> None:
        self.answer: dict[str, Any] | None = None
        self.thread = threading.Thread(target=self._wait, args=(ask,), daemon=True)
        self.thread.start()

    def _wait(self, ask: Callable[[], dict[str, Any]]) -> None:
        self.answer = ask()

    def outcome(self) -> dict[str, Any]:
        self.thread.join(PATIENCE_S)
        assert self.answer is not None, "no outcome in time"
        return self.answer


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


def workers() -> dict[int, int]:
    """Process ids of the live workers of this Ray, by their place in the table of actors."""
    actors = ray._private.state.actors(actor_state_name="ALIVE").values()
    return {i: a["Pid"] for i, a in enumerate(actors) if a["ActorClassName"] == "RayTrainWorker"}


@contextmanager
def open_pool(tmp: Path, num_gangs: int = 1, **values: Any) -> Iterator[GangPool]:
    """A pool that gives nothing up for want of haste: neither its workers nor what they leave."""
    resources = replace(RESOURCES, **values)
    pool = GangPool(resources, num_gangs, 1, JUDGE, str(tmp / "ray"), idle_s=PATIENCE_S)
    pool._broker_options["meeting_s"] = PATIENCE_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gangs, "LEAVE_S", PATIENCE_S)
        patch.setattr(gangs, "CLEAR_S", PATIENCE_S)
        with pool:
            yield pool

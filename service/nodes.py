"""What the nodes of a connected Ray cluster have, each asked by a task of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.attention import TRY_S, Question, ask
from service.machine import Machine, look
from trainer.errors import BackendError

ANSWER_S = 60.0
_KINDS = ("CPU", "GPU")


def machines(store: Path, question: Question | None = None) -> list[Machine]:
    """Look at every living node; with a question also try attention on it, on one of its own GPUs
    where it is for a GPU and one is free.

    `store` must be absolute. A file that is put there for as long as this takes shows which nodes
    see the same store.
    """
    ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    store.mkdir(parents=True, exist_ok=True)
    mark = store / f".seen-by-{ray.get_runtime_context().get_job_id()}"
    mark.touch()
    try:
        asked = [_on(node, 0).remote(look, store, None, mark, hidden_gpus=True) for node in ids]
        found: list[Machine] = _answers(asked, ANSWER_S)
    finally:
        mark.unlink(missing_ok=True)
    if question is None:
        return found
    return _tried(found, ids, question)


def node_lines() -> list[str]:
    """Each living node's CPUs and GPUs, and how many of them are free."""
    free = available_resources_per_node()
    lines = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        has, left = node["Resources"], free.get(node["NodeID"], {})
        amounts = [f"{left.get(k, 0):g} of {has[k]:g} {k}s free" for k in _KINDS if k in has]
        lines.append(f"{node['NodeManagerHostname']}: {', '.join(amounts) or 'no CPU'}")
    return lines


def _tried(found: list[Machine], ids: list[str], question: Question) -> list[Machine]:
    """The machines with what attention each has, all asked at once; one whose GPUs are all taken
    is left alone."""
    gpus = 1 if question.device == "cuda" else 0
    free = available_resources_per_node()
    idle = [node for node in ids if not gpus or free.get(node, {}).get("GPU", 0) >= 1]
    asked = [_on(node, gpus).remote(ask, question) for node in idle]
    answers = dict(zip(idle, _answers(asked, ANSWER_S + TRY_S), strict=True))
    return [
        replace(machine, attention=answers.get(node))
        for machine, node in zip(found, ids, strict=True)
    ]


def _answers(asked: list[Any], patience_s: float) -> list[Any]:
    try:
        return ray.get(asked, timeout=patience_s)
    except RayError as error:  # late, gone, or without our packages
        raise BackendError(
            f"cluster: a node did not answer ({str(error).strip().splitlines()[-1]}); check that "
            "it is up and has this Fairway installed"
        ) from error


def _on(node: str, gpus: int) -> Any:
    """A task that calls a function on that node and takes none of its CPUs."""
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(_call).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=strategy)


def _call(function: Any, *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)

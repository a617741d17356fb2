"""What a stage's identity depends on. Pure but for reading the code's own files.

An id is the sha256 of everything that can change a stage's bytes, and of nothing else: never a
path, a name or a resource that only says where it runs.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trainer
from service.specs import Resources
from service.sweep import Sweep
from trainer.codec import dump, fingerprint
from trainer.data.shards import Dataset
from trainer.finalize.code import NOT_SHIPPED, code_digest
from trainer.protocol import SPEC_VERSION
from trainer.runtime.files import sha256_file
from trainer.specs.task import ArtifactTask, FinalTask, HessiansTask, TrainTask

ID_LENGTH = 20


@dataclass(frozen=True, slots=True)
class Inputs:
    """What identity needs beyond the sweep: the data and the code that is counted."""

    data_digest: str
    code_digest: str
    vocab_size: int


def inputs_of(dataset: Dataset) -> Inputs:
    """The inputs of a sweep on this data, with the code as it is here."""
    return Inputs(dataset.digest, code_digest(), dataset.vocab_size)


def sweep_id(sweep: Sweep, inputs: Inputs) -> str:
    """A sweep's name and what it asks for: the same file on the same data and code is the same.
    What it may spend or wait for, and what it must find or pass, can change on the way. Of its
    clock policy counts which clock each phase is on, wherever the file lies."""
    spec = dump(sweep.spec)
    for name in ("budget", "limits", "gate", "require", "clocks"):
        spec.pop(name, None)
    for name in ("start_timeout_s", "gang"):
        spec["resources"].pop(name)
    clocks = {name: phase["clock"] for name, phase in dump(sweep.clocks.phases).items()}
    asked = {"spec": spec, "recipe": sweep.recipe, "clocks": clocks, **asdict(inputs)}
    return f"{sweep.spec.name}-{fingerprint(asked)[:10]}"


def training_id(
    task: TrainTask, inputs: Inputs, resources: Resources, branch: str | None = None
) -> str:
    """Identity of a training. World size and device set the order of sums, so they count."""
    described = dump(task)
    described.pop("observe")  # what is written down on the way changes no weight
    facts = {"task": described, **_numerics(inputs, resources)}
    return _id("training", **facts, **({"branch": branch} if branch else {}))


def state_id(acts: dict[str, Any], inputs: Inputs, resources: Resources) -> str:
    """Identity of a trunk's state: `acts` is all that acts before it, as the tree tells it."""
    return _id("state", **acts, **_numerics(inputs, resources))


def _numerics(inputs: Inputs, resources: Resources) -> dict[str, Any]:
    return {
        "data": inputs.data_digest,
        "world_size": resources.workers,
        "attention": "sdpa",
        **device_of(resources),
    }


def device_of(resources: Resources) -> dict[str, Any]:
    """What sets the order of sums on one worker."""
    if resources.gpus_per_worker:
        return {"device": "cuda"}
    return {"device": "cpu", "threads": resources.cpus_per_worker}


def final_id(task: FinalTask, training: str, inputs: Inputs, device: dict[str, Any]) -> str:
    """Identity of a final. The code is part of the artifact, so its digest counts."""
    return _id("final", task=task, training=training, code=inputs.code_digest, **device)


def rank_id(task: FinalTask, training: str, inputs: Inputs, device: dict[str, Any]) -> str:
    """Identity of a final's score on held-out training shards."""
    return _id("rank", task=task, training=training, code=inputs.code_digest, **device)


def fit_id(
    task: FinalTask,
    cap_bytes: int,
    search_digest: str,
    training: str,
    inputs: Inputs,
    device: dict[str, Any],
) -> str:
    """Identity of a final whose clips and bits are chosen to fit a cap; `search_digest` says
    among which and how."""
    return _id(
        "fit",
        task=task,
        cap_bytes=cap_bytes,
        search=search_digest,
        training=training,
        code=inputs.code_digest,
        **device,
    )


def artifact_id(task: ArtifactTask, training: str, inputs: Inputs, device: dict[str, Any]) -> str:
    """Identity of an artifact, its code included."""
    return _id("artifact", task=task, training=training, code=inputs.code_digest, **device)


def hessians_id(task: HessiansTask, training: str, inputs: Inputs, device: dict[str, Any]) -> str:
    """Identity of a bank entry's Hessians. The forward that they come from is code, too."""
    return _id("hessians", task=task, training=training, code=inputs.code_digest, **device)


def parity_id(training: str) -> str:
    """Identity of a bank's parity check."""
    return _id("parity", training=training)


def _id(kind: str, **facts: Any) -> str:
    return fingerprint({"kind": kind, "spec_version": SPEC_VERSION, **facts})[:ID_LENGTH]


def fit_digest() -> str:
    """Hash the code that chooses. It is not shipped: the counted code's digest has none of it."""
    root = Path(trainer.__file__).parent.parent
    places = ("trainer/choosing.py", "trainer/finalize/")
    chooses = [name for name in sorted(NOT_SHIPPED) if name.startswith(places)]
    return fingerprint([sha256_file(root / name) for name in chooses])

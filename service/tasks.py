"""One final as a task: its bank's parity, its artifact, its score. Runs on one worker."""

from pathlib import Path
from typing import Any

import torch

from service.plan import parity_id
from service.store import Store
from trainer.codec import parse
from trainer.data.shards import Dataset, load_dataset
from trainer.results import ParityResult
from trainer.run import check_parity, collect, finalize, make_artifact
from trainer.runtime.distributed import Ranks
from trainer.specs.task import ArtifactTask, FinalTask, artifact_task, hessians_task


def run_final(job: dict[str, Any]) -> dict[str, Any]:
    """Compute a final, or find it; return {result, cached}. `job` is JSON-like.

    job: store, data, final, artifact, hessians, training, task (plain), cpus, device. Every stage
    is computed by the first final that needs it. A bank that fails its parity check is quarantined:
    {quarantined: why}.
    """
    torch.set_num_threads(job["cpus"])
    ranks = Ranks(device=torch.device(job["device"]))
    store, dataset = Store(Path(job["store"])), load_dataset(Path(job["data"]))
    training = store.folder("trainings", job["training"])
    checked, _ = store.compute(
        "parities",
        parity_id(job["training"]),
        lambda folder: check_parity(training, dataset, folder, ranks),
    )
    parity = parse(ParityResult, checked, "parity").rule
    if parity.verdict == "fail":
        return {"quarantined": f"bank quarantined by its parity check: {parity.detail}"}
    task = parse(FinalTask, job["task"], "task")

    def build(folder: Path) -> None:
        made = _artifact(job, artifact_task(task), store, dataset, ranks)
        finalize(task, training, made, dataset, folder, parity, ranks)

    result, cached = store.compute("finals", job["final"], build, resumes=True)
    return {"result": result, "cached": cached}


def _artifact(
    job: dict[str, Any], task: ArtifactTask, store: Store, dataset: Dataset, ranks: Ranks
) -> Path:
    """Make an artifact and, where it takes them, its bank's Hessians, or find them."""
    training = store.folder("trainings", job["training"])
    hessians, needed = None, hessians_task(task)
    if needed is not None:
        hessians = store.folder("hessians", job["hessians"])
        store.compute(
            "hessians",
            job["hessians"],
            lambda folder: collect(needed, training, dataset, folder, ranks),
        )
    store.compute(
        "artifacts",
        job["artifact"],
        lambda folder: make_artifact(task, training, dataset, folder, hessians, ranks),
    )
    return store.folder("artifacts", job["artifact"])

"""One final as a task: parity of its bank, then artifact and score. Runs on one worker."""

from pathlib import Path
from typing import Any

import torch

from service.plan import parity_id
from service.store import Store
from trainer.codec import parse
from trainer.data.shards import load_dataset
from trainer.results import ParityResult
from trainer.run import check_parity, finalize
from trainer.runtime.distributed import Ranks
from trainer.specs.task import FinalTask


def run_final(job: dict[str, Any]) -> dict[str, Any]:
    """Compute a final, or find it; return {result, cached}. `job` is JSON-like.

    job: store, data, final, training, task (plain), cpus, device. The bank's parity is checked
    once, by the first of its finals; a bank that fails it is quarantined: {quarantined: why}.
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
    result, cached = store.compute(
        "finals",
        job["final"],
        lambda folder: finalize(task, training, dataset, folder, parity, ranks),
    )
    return {"result": result, "cached": cached}

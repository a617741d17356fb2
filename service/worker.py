"""What runs inside a gang's worker process: one rank of one training. Knows nothing of sweeps."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer.codec import parse
from trainer.data.shards import load_dataset
from trainer.errors import FairwayError
from trainer.run import train
from trainer.runtime import distributed
from trainer.runtime.files import locked
from trainer.specs.task import TrainTask


def train_rank(job: dict[str, Any]) -> dict[str, Any]:
    """Run this rank's share of a training; `job` is JSON-like (see gang.run_gang).

    An error that would come back on every try is returned, not raised: what is raised is
    taken for a lost worker and tried again from the last checkpoint.
    """
    folder = Path(job["folder"])
    device = torch.device(job["device"], distributed.local_rank()) if job["gpus"] else None
    ranks = distributed.current(device or torch.device("cpu"))
    torch.set_num_threads(job["cpus_per_worker"])
    _log_to(folder, ranks.rank)
    # Only rank 0 writes. A rank 0 that outlives its killed driver must not write beside us.
    alone = locked(folder / "writer.lock") if ranks.is_first else nullcontext()
    try:
        with alone:
            task = parse(TrainTask, job["task"], "task")
            train(task, load_dataset(Path(job["data"])), folder, ranks)
    except FairwayError as error:
        return {"error": str(error)}
    return {}


def _log_to(folder: Path, rank: int) -> None:
    handler = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("trainer")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)

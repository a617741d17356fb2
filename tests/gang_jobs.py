"""What a gang runs, one after another: `python -m tests.gang_jobs JOBS.json`, by torchrun or alone.

Each rank leaves what became of each job beside the file, as JOBS.json.<rank>.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from trainer.codec import parse
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import FairwayError
from trainer.run import grow_trunk, train
from trainer.runtime.distributed import Ranks, from_torchrun
from trainer.specs.task import Departure, TrainTask
from trainer.train.steering import Steer


def steer_of(job: dict[str, Any]) -> Steer | None:
    """Who stops a training, fails to answer or kills the process, at the step that the job says."""
    if not {"stops_at", "fails_at", "dies_at"} & set(job):
        return None

    def steer(step: int, val_bpb: float | None) -> str | None:
        if step == job.get("dies_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == job.get("fails_at"):
            raise ConnectionError("the judge is gone")
        return "no good: überholt" if step == job.get("stops_at") else None

    return steer


def run_job(job: dict[str, Any], dataset: Dataset, ranks: Ranks) -> None:
    """Run one job: a trunk if it names states, else a training."""
    task = parse(TrainTask, job["task"], "task")
    start = Path(job["start"]) if "start" in job else None
    folder, steer = Path(job["folder"]), steer_of(job) if ranks.is_first else None
    if "states" not in job:
        train(task, dataset, folder, ranks, start=start, steer=steer)
        return
    states = [(parse(Departure, told, "state"), Path(path)) for told, path in job["states"]]
    grow_trunk(task, dataset, states, folder, ranks, start=start, steer=steer)


def main(path: Path) -> None:
    """Run the jobs one after another in this process."""
    told = json.loads(path.read_text(encoding="utf-8"))
    outcomes = []
    with from_torchrun() as ranks:
        for job in told["jobs"]:
            try:
                run_job(job, load_dataset(Path(told["data"])), ranks)
                outcomes.append(None)
            except FairwayError as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        path.with_name(f"{path.name}.{ranks.rank}").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One training as a Ray Train gang: all workers or none, with a bound on waiting and a reason.

The gang is one placement group. It never holds a part of its workers while it waits, and when
its time is up it says what it needed and what was free. Ray's own retries of the start are off.
"""

from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import ControllerError, WorkerGroupError

from service.sweep import Resources
from trainer.errors import FairwayError, TrainingError
from trainer.runtime.files import write_text


class GangFailure(FairwayError):
    """A training that ended without a result because workers never came or were lost."""


def run_gang(job: dict[str, Any], resources: Resources, infra_retries: int) -> None:
    """Run a training to its end in a gang of its own; its folder then holds result.json.

    job: name, folder, data, task (plain), device, gpus, cpus_per_worker. TrainingError if it
    would fail again the same way, GangFailure if workers were lost or never came.
    """
    # A module of its own, imported by name in the workers: nothing of this process is pickled.
    trainer = ray.train.torch.TorchTrainer(
        _train_rank,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker=resources.worker(),
            placement_strategy=resources.placement,
        ),
        run_config=ray.train.RunConfig(
            name=job["name"],
            storage_path=job["ray_storage"],
            failure_config=ray.train.FailureConfig(
                max_failures=infra_retries, controller_failure_limit=0
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if resources.gpus_per_worker else "gloo"
        ),
    )
    try:
        outcome = trainer.fit()
    except ControllerError as error:
        raise GangFailure(_start_reason(error, resources)) from error
    except WorkerGroupError as error:
        trace = Path(job["folder"]) / "error.txt"
        write_text(trace, str(error))
        raise GangFailure(
            f"workers failed {infra_retries + 1} times, last: {_last_line(error)}; see {trace} and "
            "rank*.log beside it"
        ) from error
    returned = outcome.return_value or {}
    if "error" in returned:
        raise TrainingError(returned["error"])


def _train_rank(job: dict[str, Any]) -> dict[str, Any]:
    from service.worker import train_rank  # torch is imported in the worker alone

    return train_rank(job)


def _start_reason(error: ControllerError, resources: Resources) -> str:
    if "startup timed out" not in str(error).lower():
        return f"the gang's controller failed: {_last_line(error)}"
    free = ray.available_resources()
    needs = " + ".join(f"{each:g} {kind}" for kind, each in resources.worker().items())
    have = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in resources.worker())
    return (
        f"the gang did not start within {resources.start_timeout_s:g} s: need "
        f"{resources.workers} × ({needs}), free {have} ({_last_line(error)})"
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__

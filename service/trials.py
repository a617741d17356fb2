"""The functions that Ray Tune calls: thin. A trial resolves its stage, asks the store, reports.

Each reports exactly once: `outcome`, a JSON text of facts for the ledger, and `val_bpb` for
the searcher, NaN where there is none.
"""

import json
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from service.gang import run_gang
from service.states import State
from service.store import Store
from service.sweep import Resources
from trainer.codec import parse
from trainer.errors import FairwayError
from trainer.runtime.files import write_text


def train_trial(config: dict[str, Any]) -> None:
    """One training: found in the store, or run by a gang that this trial waits for."""
    job = config["job"]
    resources = parse(Resources, job["resources"], "resources")
    store = Store(Path(job["store"]))

    def train() -> dict[str, Any]:
        result, cached = store.compute(
            "trainings",
            job["training"],
            lambda folder: run_gang(
                {**job, "folder": str(folder)}, resources, job["infra_retries"]
            ),
            resumes=True,
        )
        return {"state": State.SUCCEEDED, "reason": None, "result": result, "cached": cached}

    outcome = _outcome(train, store.folder("trainings", job["training"]))
    _report({"training": job["training"], **outcome}, math.nan)


def final_trial(config: dict[str, Any]) -> None:
    """One final, computed in this trial's process."""
    from service.tasks import run_final  # torch: the driver that imports this module has none

    job = config["job"]
    folder = Store(Path(job["store"])).folder("finals", job["final"])
    outcome = _outcome(lambda: run_final(job), folder)
    result = outcome.get("result")
    _report({"final": job["final"], **outcome}, result["score"]["val_bpb"] if result else math.nan)


def _outcome(work: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Do a stage's work; a failure becomes a fact about this stage, and the others go on."""
    try:
        return work()
    except FairwayError as error:
        reason = str(error)
    except Exception as error:  # a bug or a broken machine: its trace is kept with the stage
        trace = folder / "error.txt"
        write_text(trace, traceback.format_exc())
        first = next(iter(str(error).splitlines()), "")
        reason = f"{type(error).__name__}: {first}; see {trace}"
    return {"state": State.FAILED, "reason": reason, "result": None, "cached": False}


def _report(outcome: dict[str, Any], val_bpb: float) -> None:
    tune.report({"outcome": json.dumps(outcome), "val_bpb": val_bpb})

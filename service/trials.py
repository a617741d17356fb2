"""The functions that Ray Tune calls: thin. A trial resolves its stage, asks the store, reports.

Each reports exactly once: `outcome`, a JSON text of facts for the ledger, and `val_bpb`, NaN
where there is none. A job is JSON as well, so that Tune carries one string a trial.
"""

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from service.states import State
from service.store import Store
from trainer.errors import BackendError, FairwayError
from trainer.runtime.files import write_text

Job = dict[str, Any]
Outcome = dict[str, Any]
NOTHING: Mapping[str, Any] = {"tries": 0, "occupied_s": 0.0}
"""What a stage took that no gang worked on."""


class _Unfinished(Exception):
    """A gang's job that ended without a result; carries what the broker said of it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome["reason"])
        self.outcome = outcome


def train_trial(config: dict[str, Any]) -> None:
    """One training: found in the store, or run by a gang that this trial waits for."""
    job = json.loads(config["job"])
    folder = Store(Path(job["store"])).folder("trainings", job["training"])
    outcome = _outcome(lambda: _train(job), folder)
    result = outcome.get("result")
    _report({"training": job["training"], **outcome}, result["parity_bpb"] if result else math.nan)


def _train(job: Job) -> Outcome:
    """Grow the trunks that the training starts from, then train; what others have is taken."""
    store = Store(Path(job["store"]))
    grown: list[Outcome] = []
    spent = dict(NOTHING)

    def train(folder: Path) -> None:
        start = job["branch"] and str(store.folder("states", job["branch"]))
        spent.update(_in_gang(job, {"kind": "training", "folder": str(folder), "start": start}))

    try:
        if store.find("trainings", job["training"]) is None:
            for trunk in job["trunks"]:
                grown.append(_grow(store, job, trunk))
        result, cached = store.compute("trainings", job["training"], train, resumes=True)
    except _Unfinished as ended:
        return {**ended.outcome, "result": None, "cached": False, "trunks": grown}
    ended_well = {"state": State.SUCCEEDED, "reason": None, "trunks": grown}
    paid = {name: spent[name] for name in NOTHING}
    return {**ended_well, **paid, "result": result, "cached": cached}


def _grow(store: Store, job: Job, trunk: Job) -> Outcome:
    """Compute the states of a trunk that nobody has, from the last one before them that is there.

    The states are held in the order in which a trunk passes them, so two that share some of them
    never wait for each other.
    """
    ids = [state for state, _ in trunk["states"]]
    if all(store.find("states", state) is not None for state in ids):
        return _trunk_outcome(store, trunk, ids, NOTHING, cached=True)
    with ExitStack() as held:
        folders = {state: held.enter_context(store.claim("states", state)) for state in ids}
        missing = [state for state in ids if store.find("states", state) is None]
        spent = NOTHING
        if missing:
            before = [trunk["parent"], *ids][: ids.index(missing[0]) + 1]
            wanted = [[d, str(folders[s])] for s, d in trunk["states"] if s in missing]
            start = before[-1] and str(store.folder("states", before[-1]))
            facts = {"id": trunk["id"], "kind": "trunk", "task": trunk["task"], "states": wanted}
            work = {**facts, "folder": str(folders[ids[-1]]), "start": start}
            try:
                spent = _in_gang(job, work)
            except _Unfinished as ended:
                reason = f"its trunk {trunk['id']} ended first: {ended.outcome['reason']}"
                raise _Unfinished({**ended.outcome, "reason": reason}) from ended
        return _trunk_outcome(store, trunk, missing, spent, cached=not missing)


def _trunk_outcome(
    store: Store, trunk: Job, computed: list[str], spent: Mapping[str, Any], *, cached: bool
) -> Outcome:
    results = [store.find("states", state) or {} for state in computed]
    return {
        "trunk": trunk["id"],
        "branch": trunk["parent"],
        "states": [state for state, _ in trunk["states"]],
        "cached": cached,
        "steps_computed": sum(result["steps_computed"] for result in results),
        **{name: spent[name] for name in NOTHING},
    }


def _in_gang(job: Job, work: Job) -> Outcome:
    """Have a gang do the work of a job, and wait for it."""
    shared = ("data", "task", "device", "gpus", "cpus_per_worker")
    what = {name: job[name] for name in shared}
    facts = {"id": job["training"], "for": job["training"], "states": []}
    outcome = call(job["broker"], {**facts, **what, **work})
    if outcome["state"] != State.SUCCEEDED:
        raise _Unfinished(outcome)
    return outcome


def call(broker: str, what: dict[str, Any]) -> Outcome:
    """Have a job done by the gangs of the pool that goes by this name, and wait for its outcome.

    BackendError if the broker is gone, which ends only with the driver of the sweep.
    """
    try:
        outcome: Any = ray.get(ray.get_actor(broker, namespace=broker).run.remote(what))
    except (ValueError, RayError) as error:
        raise BackendError(f"the broker of the gangs is gone ({error!r}); run again") from error
    return outcome


def final_trial(config: dict[str, Any]) -> None:
    """One final, computed in this trial's process: scored, ranked, or fitted and scored."""
    # torch: the driver that imports this module has none
    from service.tasks import run_final, run_fit, run_rank

    job = json.loads(config["job"])
    work = {"final": run_final, "rank": run_rank, "fit": run_fit}[job["kind"]]
    kind = {"final": "finals", "rank": "ranks", "fit": "finals"}[job["kind"]]
    folder = Store(Path(job["store"])).folder(kind, job[job["kind"]])
    since = time.monotonic()
    outcome = _outcome(lambda: work(job), folder)
    occupied_s = 0.0 if outcome.get("cached") else time.monotonic() - since
    score = (outcome.get("result") or {}).get("score")
    _report(
        {"final": job["final"], "kind": job["kind"], **outcome, "occupied_s": occupied_s},
        score["val_bpb"] if score and "val_bpb" in score else math.nan,
    )


def _outcome(work: Callable[[], Outcome], folder: Path) -> Outcome:
    """Do a stage's work; a failure becomes a fact about this stage, and the others go on."""
    try:
        return work()
    except BackendError as error:  # no fault of this stage: another run tries it again
        return {"state": State.CANCELLED, "reason": str(error), "result": None, "cached": False}
    except FairwayError as error:
        reason = str(error)
    except Exception as error:  # a bug or a broken machine: its trace is kept with the stage
        trace = folder / "error.txt"
        write_text(trace, traceback.format_exc())
        first = next(iter(str(error).splitlines()), "")
        reason = f"{type(error).__name__}: {first}; see {trace}"
    return {"state": State.FAILED, "reason": reason, "result": None, "cached": False}


def _report(outcome: Outcome, val_bpb: float) -> None:
    tune.report({"outcome": json.dumps(outcome), "val_bpb": val_bpb})


@dataclass(frozen=True, slots=True)
class Work:
    """What Ray Tune calls for a training and for a final."""

    train: Callable[[dict[str, Any]], None] = train_trial
    final: Callable[[dict[str, Any]], None] = final_trial


REAL = Work()

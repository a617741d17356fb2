"""Stand-ins for a training and a final: they take their time and leave a result in the store, as
the real ones do, so that everything around them is the real thing. Times say when they worked.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from service.states import State
from service.store import Store
from service.trials import Work
from trainer.codec import dump
from trainer.results import FinalResult, Rule, Score, TrainResult
from trainer.runtime.files import write_json

Trial = Callable[[dict[str, Any]], None]
_PASSED = Rule(id="parity", verdict="pass", detail="a stand-in", source="benchmark")


def work_of(training_s: float, final_s: float) -> Work:
    """Stand-ins that take so many seconds."""
    return Work(train=training_of(training_s), final=final_of(final_s))


def training_of(seconds: float) -> Trial:
    """A trial function in the place of `service.trials.train_trial`."""

    def train_trial(config: dict[str, Any]) -> None:
        job = json.loads(config["job"])

        def build(folder: Path) -> None:
            began = time.time()
            time.sleep(seconds)
            write_json(folder / "result.json", dump(train_result(seconds)))
            write_json(folder / "times.json", [began, time.time()])

        result, cached = Store(Path(job["store"])).compute("trainings", job["training"], build)
        facts = {"training": job["training"], "state": State.SUCCEEDED, "reason": None}
        paid = {"tries": 1, "occupied_s": seconds, "trunks": []}
        outcome = {**facts, **paid, "result": result, "cached": cached}
        tune.report({"outcome": json.dumps(outcome), "val_bpb": result["parity_bpb"]})

    return train_trial


def final_of(seconds: float) -> Trial:
    """A trial function in the place of `service.trials.final_trial`."""

    def final_trial(config: dict[str, Any]) -> None:
        job = json.loads(config["job"])

        def build(folder: Path) -> None:
            began = time.time()
            time.sleep(seconds)
            result = dump(final_result(job["final"], seconds))
            write_json(folder / "times.json", [began, time.time()])
            write_json(folder / "result.json", result)

        result, cached = Store(Path(job["store"])).compute("finals", job["final"], build)
        facts = {"final": job["final"], "kind": job["kind"], "occupied_s": seconds}
        outcome = {**facts, "result": result, "cached": cached}
        bpb = result["score"]["val_bpb"]
        tune.report({"outcome": json.dumps(outcome), "val_bpb": bpb})

    return final_trial


def train_result(seconds: float) -> TrainResult:
    """What a training of no steps would return."""
    return TrainResult(
        steps=1,
        steps_computed=1,
        num_params=1,
        tokens=1,
        world_size=1,
        train_clock_s=seconds,
        clock_s={"train": seconds},
        final_train_loss=1.0,
        untrained_val_bpb=2.0,
        entries=("raw",),
        parity_entry="raw",
        parity_bpb=1.5,
        parity_tolerance=1e-6,
    )


def final_result(key: str, seconds: float) -> FinalResult:
    """A final's result; bytes and bpb follow from its id, so that points differ."""
    draw = random.Random(key)
    num_bytes, bpb = 14_000_000 + draw.randrange(3_000_000), 1.1 + draw.random()
    return FinalResult(
        entry="raw",
        num_params=1,
        artifact_bytes=num_bytes,
        weights_bytes=num_bytes - 50_000,
        code_bytes=50_000,
        forecast_bytes=num_bytes,
        weights_sha256=key,
        finalize_clock_s=0.0,
        score=Score(val_bpb=bpb, val_loss=bpb, tokens=1, bytes=1, eval_clock_s=seconds),
        audit=(_PASSED,),
    )

"""What a trunk leaves where trainings depart from it, and what a training takes up from there.

A state is a folder: state/ with the tensors, metrics.jsonl up to there and, last, result.json.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.codec import dump, fingerprint, parse
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.optim.schedule import lr_scale, start_step
from trainer.protocol import SPEC_VERSION
from trainer.results import StateResult
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import read_json, write_json
from trainer.runtime.tensors import load_tensors
from trainer.specs.task import TrainTask
from trainer.specs.train import TrainSpec
from trainer.train.journal import Journal
from trainer.train.state import TrainState, checkpoints

logger = logging.getLogger(__name__)

# What acts late, or says when a run ends: in all else, trainings that share a trunk are alike.
_LATE = ("iterations", "max_clock_s", "warmup_steps", "schedule", "qat")

IsBeyond = Callable[[int, float], bool]
"""Whether a run that stands after that many steps, with those seconds on its train clock, has
passed a place where it was to leave a state."""


def read_state(folder: Path) -> StateResult:
    """Read where on its trunk's way a state lies; DataError if it is not there."""
    path = folder / "result.json"
    return parse(StateResult, read_json(path), str(path))


def leave(state: TrainState, kin: str, path: Path, journal: Journal, steps_computed: int) -> None:
    """Write a state to `path`; every rank at once."""
    qat_start_step = None if state.fake_quants is None else state.fake_quants.start_step
    late = _late(state.spec, state.lr_scale, qat_start_step, state.averages.swa_count)
    clock_s = state.save(path / "state", trunk={"kin": kin, "late": late})
    if state.ranks.is_first:
        journal.copy_until(state.step, path / "metrics.jsonl")
        result = StateResult(
            step=state.step,
            steps_computed=steps_computed,
            train_clock_s=clock_s["train"],
            clock_s=clock_s,
        )
        write_json(path / "result.json", dump(result))
    state.ranks.barrier()  # or the others would wait on their train clocks


def take_up(
    state: TrainState, kin: str, folder: Path, starts: Sequence[Path], is_beyond: IsBeyond | None
) -> bool:
    """Load what is furthest of the checkpoints in `folder` and of the states `starts`, as long as
    it is intact and not `is_beyond`; return whether there was anything.

    DataError where there are starts and nothing is intact: from step 0 it would be another run.
    UsageError for a start that a training of this spec would not have come to by itself.
    """
    sources = [(int(path.name), path, False) for path in checkpoints(folder)]
    sources += [(read_state(path).step, path / "state", True) for path in starts]
    failure = UsageError(
        f"{folder}: its start lies beyond where trainings depart; start from an earlier state"
    )
    for _, path, is_start in sorted(sources, reverse=True):
        try:
            progress = load_tensors(path, "progress")
            if is_beyond is not None and is_beyond(progress["step"], progress["clock_s"]["train"]):
                continue
            tensors = load_tensors(path, "state")
            if is_start:
                _check(path.parent, state.spec, kin, progress, load_tensors(path, "trunk"))
        except DataError as error:
            logger.warning("%s; falling back to an older checkpoint", error)
            failure = error
            continue
        state.load(progress, tensors)
        return True
    if starts:
        raise failure
    return False


def kin_of(task: TrainTask, dataset: Dataset, ranks: Ranks) -> str:
    """Return a digest of what all trainings have in common that may share a trunk."""
    told = dump(replace(task.train, averages=replace(task.train.averages, swa=None)))
    return fingerprint(
        {
            "spec_version": SPEC_VERSION,
            "model": task.model,
            "train": {name: value for name, value in told.items() if name not in _LATE},
            "parity_window": task.parity_window,
            "data": dataset.digest,
            "world_size": ranks.world_size,
        }
    )


def _check(
    path: Path, spec: TrainSpec, kin: str, progress: dict[str, Any], trunk: dict[str, Any]
) -> None:
    """Raise UsageError unless a run of this spec would be in this very state."""
    if trunk["kin"] != kin:
        raise UsageError(
            f"{path}: left by a trunk that differs from this training in more than what acts late; "
            "give both the same model, data, seed, optimizer, EMA decays and number of workers"
        )
    found = trunk["late"]
    for what, own in _late_by(spec, progress["step"], found).items():
        if found[what] != own:
            raise UsageError(
                f"{path}: after {progress['step']} steps its {what} is {found[what]}, this "
                f"training's {own}; let it depart earlier"
            )


def _late(
    spec: TrainSpec, scale: float, qat_start_step: int | None, num_snapshots: int
) -> dict[str, Any]:
    """What acts late in a run and what has come of it; a part that has not begun is None."""
    qat, swa = spec.qat, spec.averages.swa
    rounds = qat is not None and qat_start_step is not None
    averages = None
    if swa is not None and num_snapshots:
        averages = {"every": swa.every, "snapshots": num_snapshots}
    return {
        "lr scale": scale,
        "train.qat": dump(qat) | {"start": qat_start_step} if rounds else None,
        "train.averages.swa": averages,
    }


def _late_by(spec: TrainSpec, step: int, found: dict[str, Any]) -> dict[str, Any]:
    """What a run of this spec would have come to after `step` steps.

    By wall clock nobody can tell when; there what was found counts.
    """
    qat, swa = spec.qat, spec.averages.swa
    if spec.schedule.basis == "wallclock":
        scale = found["lr scale"]
        qat_start_step = (found["train.qat"] or {}).get("start")
        num_snapshots = (found["train.averages.swa"] or {}).get("snapshots", 0)
    else:
        scale = lr_scale(spec, step - 1, 0.0)
        begins = step if qat is None or qat.start is None else start_step(spec, qat.start)
        qat_start_step = begins if begins < step else None
        begins = step if swa is None else min(start_step(spec, swa.start), step)
        num_snapshots = 0 if swa is None else step // swa.every - begins // swa.every
    if qat is not None and qat.start is None:
        qat_start_step = 0
    return _late(spec, scale, qat_start_step, num_snapshots)

"""The public functions: train, check_parity, finalize. Wiring only.

Each reads a frozen task and an input folder and leaves an output folder whose result.json,
written last, means done.
"""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from trainer.artifacts import load_training
from trainer.codec import dump, fingerprint, parse
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.evaluate import audit
from trainer.evaluate.journal import Journal, identity
from trainer.finalize.code import code_digest
from trainer.finalize.pipeline import WEIGHTS_FILE, artifact_bytes
from trainer.kernels.chosen import kernels_of
from trainer.model.build import build, load_state
from trainer.protocol import CLOCK_GPUS, SPEC_VERSION
from trainer.results import (
    ArtifactResult,
    FinalResult,
    ParityResult,
    Rule,
    Score,
    TrainResult,
)
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import link_files, read_json, sha256_file, write_json
from trainer.runtime.tensors import load_tensors
from trainer.scoring import (
    Scored,
    Text,
    load_artifact,
    score_state,
    score_text,
    val_text,
)
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.recipe import Observe
from trainer.specs.task import Departure, FinalTask, TrainTask
from trainer.train import loop
from trainer.train.memo import Memo
from trainer.train.memory import memory_watched
from trainer.train.state import discard_checkpoints
from trainer.train.steering import Steer, Steering
from trainer.train.trunk import Trunk


def train(
    task: TrainTask,
    dataset: Dataset,
    folder: Path,
    ranks: Ranks,
    *,
    start: Path | None = None,
    steer: Steer | None = None,
    memo: Memo | None = None,
) -> TrainResult:
    """Train, or resume what `folder` holds, and leave its bank and result.json there.

    start: a trunk's state to begin from, with the same result as from step 0. steer: who is asked
    on the way whether to go on. memo: what this process keeps from one training to the next.
    """
    check_vocabulary(task, dataset)
    ranks.together(lambda: _begin(task, dataset, folder, ranks))
    result = loop.train(task, dataset, folder, ranks, start=start, steer=steer, memo=memo)
    if ranks.is_first:
        write_json(folder / "result.json", dump(result))
        discard_checkpoints(folder)
    ranks.barrier()
    return result


def grow_trunk(
    task: TrainTask,
    dataset: Dataset,
    states: Sequence[tuple[Departure, Path]],
    folder: Path,
    ranks: Ranks,
    *,
    start: Path | None = None,
    steer: Steer | None = None,
    memo: Memo | None = None,
) -> None:
    """Train `task` from `start` or step 0 as far as its states need it, and leave each in its
    folder; those that lie there are passed over.

    What a restart needs lies in `folder`/trunk and is removed at the end, so that `folder` may be
    one of theirs. The rest as `train`.
    """
    check_vocabulary(task, dataset)
    trunk = Trunk(task, states, ranks)
    if not trunk.open:
        return
    work = folder / "trunk"
    ranks.together(lambda: _begin(task, dataset, work, ranks))
    with memory_watched(task.train, ranks):
        steering = Steering(steer, ranks)
        with closing(loop.Loop(task, dataset, work, ranks, steering, memo or Memo())) as run:
            trunk.grow(run, start)
    if ranks.is_first:
        shutil.rmtree(work)
    ranks.barrier()


def _begin(task: TrainTask, dataset: Dataset, folder: Path, ranks: Ranks) -> None:
    """Make the folder this training's, keeping what an earlier attempt at it left."""
    if not ranks.is_first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_begun(task, dataset, folder, ranks):
        _start_over(folder)
    write_json(folder / "inputs.json", _inputs(task, dataset, ranks))
    write_json(folder / "task.json", dump(task))


def is_trained(task: TrainTask, dataset: Dataset, folder: Path, ranks: Ranks) -> bool:
    """Whether `folder` holds a finished training of this task on this data by such a gang."""
    return (folder / "result.json").is_file() and _is_begun(task, dataset, folder, ranks)


def _is_begun(task: TrainTask, dataset: Dataset, folder: Path, ranks: Ranks) -> bool:
    path = folder / "inputs.json"
    return path.is_file() and read_json(path) == _inputs(task, dataset, ranks)


def _inputs(task: TrainTask, dataset: Dataset, ranks: Ranks) -> dict[str, Any]:
    """What a training's weights follow from; what is observed on the way is no part of it."""
    return {
        "spec_version": SPEC_VERSION,
        "task": fingerprint(replace(task, observe=Observe())),
        "data": dataset.digest,
        "world_size": ranks.world_size,
    }


def _start_over(folder: Path) -> None:
    """Remove what another task, or other data, left in the folder: it cannot be resumed."""
    (folder / "result.json").unlink(missing_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for part in ("checkpoint", "bank"):
        shutil.rmtree(folder / part, ignore_errors=True)


def check_vocabulary(task: TrainTask, dataset: Dataset) -> None:
    """Refuse a model that has no row for some token of the data."""
    if task.model.vocab_size < dataset.vocab_size:
        raise UsageError(
            f"model.vocab_size={task.model.vocab_size} is below the {dataset.vocab_size} tokens of "
            f"{dataset.tokenizer_path}; set model.vocab_size={dataset.vocab_size}"
        )


def check_parity(training: Path, dataset: Dataset, folder: Path, ranks: Ranks) -> ParityResult:
    """Repeat the trainer's own end-of-run score from the bank on disk, in this process."""
    task, trained = load_training(training)
    dtype = task.train.dtype
    kernels = kernels_of(task.train.attention, ranks.device, dtype, "train.attention")
    model = build(task.model, dtype=dtype, kernels=kernels)
    load_state(model, load_tensors(training / "bank", trained.parity_entry))
    spec = EvaluateSpec(window=task.parity_window, stride=task.parity_window)
    fresh = score_text(model.to(ranks.device), val_text(dataset), spec, ranks).score.val_bpb
    rule = audit.parity(trained.parity_bpb, fresh, trained.parity_tolerance)
    result = ParityResult(fresh_bpb=fresh, rule=rule)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", dump(result))
    return result


def read_artifact(made: Path, artifact: Path) -> ArtifactResult:
    """Read what the stage in `made` says of the artifact that it left, and that lies in `artifact`
    by now; DataError if that is another."""
    written = parse(ArtifactResult, read_json(made / "result.json"), str(made / "result.json"))
    found = artifact_bytes(artifact), sha256_file(artifact / WEIGHTS_FILE)
    if found != (written.artifact_bytes, written.weights_sha256):
        raise DataError(f"{made}: altered since it was written; remove the folder and run again")
    return written


def score_made(
    task: FinalTask, made: Path, text: Text, folder: Path, dtype: str, ranks: Ranks
) -> Scored:
    """Score the artifact in `made` on a text, or what a killed attempt in `folder` left of it."""
    model, state = load_artifact(made / "artifact", text.tokenizer)
    sha256 = sha256_file(made / "artifact" / WEIGHTS_FILE)
    what = [SPEC_VERSION, code_digest(), dump(task), sha256, dtype]
    key = identity(what, text.tokens, ranks.device.type, ranks.world_size)
    journal = Journal(folder / "journal" / key[:20], key, ranks.rank)
    scored = score_state(model, state, text, task.evaluate, ranks, dtype=dtype, journal=journal)
    shutil.rmtree(folder / "journal", ignore_errors=True)
    return scored


def finalize(
    task: FinalTask,
    training: Path,
    made: Path,
    dataset: Dataset,
    folder: Path,
    parity: Rule,
    ranks: Ranks,
) -> FinalResult:
    """Score the artifact that lies in `made`, the bytes on disk, and audit how it was done.

    Leaves artifact/ (the same files), tensors.json, score.json, audit.json and, last, result.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "task.json", dump(task))
    trained_as, trained = load_training(training)
    link_files(made, folder, ("artifact", "tensors.json"))
    written = read_artifact(made, folder / "artifact")
    scored = score_made(task, folder, val_text(dataset), folder, trained_as.train.dtype, ranks)
    # Calibration on text of the model's own reads no training data (techniques 1.7).
    calibration_s = written.calibration_clock_s or 0.0
    rules = audit.rules(
        audit.Facts(
            task=task,
            tape=scored.tape,
            totals=scored.totals,
            expected_bytes=dataset.num_bytes("val"),
            overlap=dataset.manifest.overlap,
            train_clock_s=trained.train_clock_s
            + (0.0 if written.calibration == "generated" else calibration_s),
            eval_clock_s=scored.score.eval_clock_s,
            # What a killed attempt did after its last part was written is timed by nobody.
            on_challenge_hardware=not scored.was_resumed
            and _on_challenge_hardware(trained.world_size, ranks),
            parity=parity,
        )
    )
    result = FinalResult(
        **{each.name: getattr(written, each.name) for each in fields(written)},
        score=scored.score,
        audit=rules,
    )
    write_json(folder / "score.json", dump(scored.score))
    write_json(folder / "audit.json", dump(rules))
    write_json(folder / "result.json", dump(result))
    return result


def _on_challenge_hardware(num_trained: int, ranks: Ranks) -> bool:
    """Whether as many GPUs of the kind trained and score as both clocks are defined for."""
    count, kind = CLOCK_GPUS
    is_gpu = ranks.device.type == "cuda" and kind in torch.cuda.get_device_name(ranks.device)
    return is_gpu and num_trained == ranks.world_size == count


def score_artifact(
    artifact: Path, dataset: Dataset, spec: EvaluateSpec, ranks: Ranks, *, dtype: str
) -> Score:
    """Load an artifact's weights from disk into a fresh model and score the validation split."""
    text = val_text(dataset)
    model, state = load_artifact(artifact, text.tokenizer)
    return score_state(model, state, text, spec, ranks, dtype=dtype).score

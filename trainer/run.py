"""The public functions: train, check_parity, collect, make_artifact, finalize. Wiring only.

Each reads a frozen task and an input folder and leaves an output folder whose result.json,
written last, means done.
"""

import shutil
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from trainer.codec import dump, fingerprint, parse
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.evaluate import audit
from trainer.evaluate.journal import Journal, identity
from trainer.finalize.calibration import calibration_batches
from trainer.finalize.code import code_digest
from trainer.finalize.hessians import collect_hessians, load_hessians, save_hessians
from trainer.finalize.pipeline import WEIGHTS_FILE, artifact_bytes
from trainer.finalize.pipeline import finalize as write_artifact
from trainer.model.build import build, load_state
from trainer.protocol import CLOCK_GPUS, SPEC_VERSION
from trainer.results import (
    ArtifactResult,
    FinalResult,
    HessiansResult,
    ParityResult,
    Rule,
    Score,
    TrainResult,
)
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import link_files, read_json, sha256_file, write_json
from trainer.runtime.tensors import load_tensors
from trainer.scoring import load_artifact, score_state, score_text, val_text
from trainer.sizes import forecast_weights_bytes, num_params
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.recipe import Observe
from trainer.specs.task import ArtifactTask, FinalTask, HessiansTask, TrainTask
from trainer.train import loop


def train(task: TrainTask, dataset: Dataset, folder: Path, ranks: Ranks) -> TrainResult:
    """Train, or resume what `folder` holds, and leave its bank and result.json there."""
    check_vocabulary(task, dataset)
    ranks.together(lambda: _begin(task, dataset, folder, ranks))
    result = loop.train(task, dataset, folder, ranks)
    if ranks.is_first:
        write_json(folder / "result.json", dump(result))
        loop.discard_checkpoints(folder)
    ranks.barrier()
    return result


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


def load_training(folder: Path) -> tuple[TrainTask, TrainResult]:
    """Read what a finished training in `folder` was told and what it returned."""
    task = parse(TrainTask, read_json(folder / "task.json"), str(folder / "task.json"))
    result = parse(TrainResult, read_json(folder / "result.json"), str(folder / "result.json"))
    return task, result


def check_parity(training: Path, dataset: Dataset, folder: Path, ranks: Ranks) -> ParityResult:
    """Repeat the trainer's own end-of-run score from the bank on disk, in this process."""
    task, trained = load_training(training)
    model = build(task.model, dtype=task.train.dtype)
    load_state(model, load_tensors(training / "bank", trained.parity_entry))
    spec = EvaluateSpec(window=task.parity_window, stride=task.parity_window)
    fresh = score_text(model.to(ranks.device), val_text(dataset), spec, ranks).score.val_bpb
    rule = audit.parity(trained.parity_bpb, fresh, trained.parity_tolerance)
    result = ParityResult(fresh_bpb=fresh, rule=rule)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", dump(result))
    return result


def collect(
    task: HessiansTask, training: Path, dataset: Dataset, folder: Path, ranks: Ranks
) -> HessiansResult:
    """Run a bank entry over its calibration text and leave its Hessians in `folder`."""
    trained_as, _ = load_training(training)
    started = time.monotonic()
    model = build(trained_as.model.exported(), dtype=trained_as.train.dtype)
    names = {name for name, _ in model.named_parameters()}
    state = load_tensors(training / "bank", task.entry)
    load_state(model, {name: tensor for name, tensor in state.items() if name in names})
    model.to(ranks.device).eval()
    batches = calibration_batches(model, task.gptq, dataset, ranks)
    hessians = collect_hessians(model, batches, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    save_hessians(folder, hessians)
    result = HessiansResult(
        names=tuple(hessians),
        tokens=task.gptq.sequences * task.gptq.seq_len,
        clock_s=time.monotonic() - started,
    )
    write_json(folder / "result.json", dump(result))
    return result


def make_artifact(
    task: ArtifactTask,
    training: Path,
    dataset: Dataset,
    folder: Path,
    hessians: Path | None,
    ranks: Ranks,
) -> ArtifactResult:
    """Turn one bank entry into an artifact under `folder`, with the Hessians that it asks for.

    Leaves artifact/, tensors.json and, last, result.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "artifact", ignore_errors=True)  # what is left there would be counted
    trained_as, _ = load_training(training)
    calibration = None if hessians is None else read_json(hessians / "result.json")["clock_s"]
    started = time.monotonic()
    report = write_artifact(
        load_tensors(training / "bank", task.entry),
        trained_as.model,
        task.final,
        folder / "artifact",
        sha256_file(dataset.tokenizer_path),
        None if hessians is None else load_hessians(hessians, ranks.device),
    )
    result = ArtifactResult(
        entry=task.entry,
        num_params=num_params(trained_as.model.exported()),
        artifact_bytes=report.artifact_bytes,
        weights_bytes=report.weights_bytes,
        code_bytes=report.code_bytes,
        forecast_bytes=forecast_weights_bytes(trained_as.model, task.final) + report.code_bytes,
        weights_sha256=report.weights_sha256,
        finalize_clock_s=time.monotonic() - started,
        calibration_clock_s=calibration,
    )
    write_json(folder / "tensors.json", [dump(tensor) for tensor in report.tensors])
    write_json(folder / "result.json", dump(result))
    return result


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
    text = val_text(dataset)
    model, state = load_artifact(folder / "artifact", text.tokenizer)
    written = parse(ArtifactResult, read_json(made / "result.json"), str(made / "result.json"))
    sha256 = sha256_file(folder / "artifact" / WEIGHTS_FILE)
    if (artifact_bytes(folder / "artifact"), sha256) != (
        written.artifact_bytes,
        written.weights_sha256,
    ):
        raise DataError(f"{made}: altered since it was written; remove the folder and run again")
    dtype = trained_as.train.dtype
    what = [SPEC_VERSION, code_digest(), dump(task), sha256, dtype]
    key = identity(what, dataset.digest, ranks.device.type, ranks.world_size)
    journal = Journal(folder / "journal" / key[:20], key, ranks.rank)
    scored = score_state(model, state, text, task.evaluate, ranks, dtype=dtype, journal=journal)
    rules = audit.rules(
        audit.Facts(
            task=task,
            tape=scored.tape,
            totals=scored.totals,
            expected_bytes=dataset.num_bytes("val"),
            overlap=dataset.manifest.overlap,
            train_clock_s=trained.train_clock_s + (written.calibration_clock_s or 0.0),
            eval_clock_s=scored.score.eval_clock_s,
            # A score that was resumed took longer than its last attempt.
            on_challenge_hardware=not scored.was_resumed
            and _on_challenge_hardware(trained.world_size, ranks),
            parity=parity,
        )
    )
    shutil.rmtree(folder / "journal", ignore_errors=True)
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

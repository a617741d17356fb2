"""The three public functions: train, check_parity, finalize. Wiring only.

Each reads a frozen task and an input folder and leaves an output folder whose result.json,
written last, means done.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainer.codec import dump, fingerprint, parse
from trainer.data.bytecount import ByteTable
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.evaluate import audit
from trainer.evaluate.bpb import bits_per_byte, nats_per_token
from trainer.evaluate.sliding import score_stream
from trainer.evaluate.windows import plan_windows
from trainer.finalize.artifact import read_weights
from trainer.finalize.pipeline import FinalReport
from trainer.finalize.pipeline import finalize as write_artifact
from trainer.model.build import build, load_state
from trainer.model.gpt import GPT
from trainer.protocol import SPEC_VERSION, UNKNOWN_TOKENIZER
from trainer.results import FinalResult, ParityResult, Rule, Score, Totals, TrainResult
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import read_json, sha256_file, write_json
from trainer.runtime.tensors import load_tensors
from trainer.sizes import forecast_weights_bytes, num_params
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Observe
from trainer.specs.task import FinalTask, TrainTask
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
    text = val_text(dataset)
    table = ByteTable.load(text.tokenizer, task.model.vocab_size)
    totals = _score(model, text, spec, ranks, table)
    fresh = bits_per_byte(totals)
    rule = audit.parity(trained.parity_bpb, fresh, trained.parity_tolerance)
    result = ParityResult(fresh_bpb=fresh, rule=rule)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", dump(result))
    return result


def finalize(
    task: FinalTask, training: Path, dataset: Dataset, folder: Path, parity: Rule, ranks: Ranks
) -> FinalResult:
    """Turn one bank entry into an artifact under `folder` and score the bytes on disk.

    Leaves artifact/, score.json, audit.json and, last, result.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "task.json", dump(task))
    trained_as, _ = load_training(training)
    started = time.monotonic()
    state = load_tensors(training / "bank", task.entry)
    report = write_artifact(
        state,
        trained_as.model,
        task.final,
        folder / "artifact",
        sha256_file(dataset.tokenizer_path),
    )
    finalize_clock_s = time.monotonic() - started
    score, totals = score_artifact(
        folder / "artifact", dataset, task.evaluate, ranks, dtype=trained_as.train.dtype
    )
    num_predictions = len(dataset.stream("val")) - 1
    rules = (
        audit.coverage(plan_windows(num_predictions, task.evaluate), num_predictions),
        audit.byte_accounting(totals, dataset.num_bytes("val"), num_predictions),
        parity,
    )
    result = _final_result(task, trained_as, report, score, rules, finalize_clock_s)
    write_json(folder / "tensors.json", [dump(tensor) for tensor in report.tensors])
    write_json(folder / "score.json", dump(score))
    write_json(folder / "audit.json", dump(rules))
    write_json(folder / "result.json", dump(result))
    return result


def score_artifact(
    artifact: Path, dataset: Dataset, spec: EvaluateSpec, ranks: Ranks, *, dtype: str
) -> tuple[Score, Totals]:
    """Load an artifact's weights from disk into a fresh model and score the validation split."""
    text = val_text(dataset)
    model, state = load_artifact(artifact, text.tokenizer)
    return score_state(model, state, text, spec, ranks, dtype=dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What is scored: ids [N + 1] of N predictions, the model file of their tokenizer, and where
    they come from."""

    tokens: np.ndarray
    tokenizer: Path
    where: str


def val_text(dataset: Dataset) -> Text:
    """The whole validation split."""
    stream = dataset.stream("val")
    return Text(stream.read(0, len(stream)), dataset.tokenizer_path, str(dataset.folder))


def load_artifact(folder: Path, tokenizer: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Read an artifact's model and float32 state; DataError if it was made for another tokenizer.

    An imported artifact names none.
    """
    path = folder / "weights.fw"
    model, state, facts = read_weights(path)
    check_tokenizer(facts.tokenizer_sha256, tokenizer, path)
    return model, state


def check_tokenizer(sha256: str, tokenizer: Path, path: Path) -> None:
    """Raise DataError if the weights at `path` name another tokenizer than this; some name none."""
    given = sha256_file(tokenizer)
    if sha256 not in (given, UNKNOWN_TOKENIZER):
        raise DataError(
            f"{path}: made with another tokenizer ({sha256[:12]}) than {tokenizer} ({given[:12]}); "
            "score a text of its own"
        )


def score_state(
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    text: Text,
    evaluate: EvaluateSpec,
    ranks: Ranks,
    *,
    dtype: str,
) -> tuple[Score, Totals]:
    """Score a text with a fresh model of this state; DataError for ids that it has no row for, and
    for a tokenizer that would give such ids: its table counts another text's bytes."""
    largest = int(text.tokens.max(initial=0))
    if largest >= spec.vocab_size:
        raise DataError(
            f"{text.where}: token id {largest}, but the model's vocab_size is {spec.vocab_size}; "
            "score tokens of its own tokenizer"
        )
    table = ByteTable.load(text.tokenizer, spec.vocab_size)
    if len(table.lut) > spec.vocab_size:
        raise DataError(
            f"{text.tokenizer}: {len(table.lut)} tokens, but the model's vocab_size is "
            f"{spec.vocab_size}; give the tokenizer that the model was trained with"
        )
    model = build(spec, dtype=dtype)
    load_state(model, dict(state))
    started = time.monotonic()
    totals = _score(model, text, evaluate, ranks, table)
    if totals.bytes == 0:
        raise DataError(f"{text.where}: the scored tokens stand for no text; score more of them")
    score = Score(
        val_bpb=bits_per_byte(totals),
        val_loss=nats_per_token(totals),
        tokens=totals.tokens,
        bytes=totals.bytes,
        eval_clock_s=time.monotonic() - started,
    )
    return score, totals


def _score(model: GPT, text: Text, spec: EvaluateSpec, ranks: Ranks, table: ByteTable) -> Totals:
    model.to(ranks.device)
    return score_stream(model, text.tokens, table, spec, ranks)


def _final_result(
    task: FinalTask,
    trained_as: TrainTask,
    report: FinalReport,
    score: Score,
    rules: tuple[Rule, ...],
    finalize_clock_s: float,
) -> FinalResult:
    return FinalResult(
        entry=task.entry,
        num_params=num_params(trained_as.model.exported()),
        artifact_bytes=report.artifact_bytes,
        weights_bytes=report.weights_bytes,
        code_bytes=report.code_bytes,
        forecast_bytes=forecast_weights_bytes(trained_as.model, task.final) + report.code_bytes,
        weights_sha256=report.weights_sha256,
        score=score,
        audit=rules,
        finalize_clock_s=finalize_clock_s,
    )

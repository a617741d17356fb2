"""What finals are chosen by before any of them meets validation: a rank, and a fit to a byte cap.

Both read held-out training shards: what is chosen must not have seen what it is scored on
(techniques 1.9). Nothing here is shipped with an artifact.
"""

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import numpy as np
from torch import Tensor

from trainer.artifacts import leave_artifact, load_training, make_room, open_entry
from trainer.codec import dump
from trainer.data.shards import Dataset, TokenStream
from trainer.evaluate.sliding import slide
from trainer.evaluate.tape import Tape
from trainer.finalize.fit import Subject, fit
from trainer.finalize.plans import Probe
from trainer.model.build import build, load_state
from trainer.model.gpt import GPT
from trainer.results import ArtifactResult, RankResult
from trainer.run import read_artifact, score_made
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import write_json
from trainer.scoring import Text
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.task import ArtifactTask, FinalTask

PROBE_TOKENS: Final = 8_192
# A sixtieth of the published validation split: a ranking costs little beside a score.
RANK_TOKENS: Final = 2**20


def rank(
    task: FinalTask, training: Path, made: Path, dataset: Dataset, folder: Path, ranks: Ranks
) -> RankResult:
    """Score the artifact that lies in `made` on held-out training text, as the final would be
    scored on validation. Leaves result.json; DataError where no shards are held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = holdout_text(dataset)
    trained_as, _ = load_training(training)
    written = read_artifact(made, made / "artifact")
    scored = score_made(task, made, text, folder, trained_as.train.dtype, ranks)
    result = RankResult(
        **{each.name: getattr(written, each.name) for each in fields(written)},
        holdout_bpb=scored.score.val_bpb,
        holdout_loss=scored.score.val_loss,
        tokens=scored.score.tokens,
        bytes=scored.score.bytes,
        eval_clock_s=scored.score.eval_clock_s,
    )
    write_json(folder / "result.json", dump(result))
    return result


def holdout_text(dataset: Dataset) -> Text:
    """The first `RANK_TOKENS` predictions of the held-out training shards, or all that there are.

    DataError if no shards are held out.
    """
    stream = dataset.stream("holdout")
    tokens = stream.read(0, min(RANK_TOKENS + 1, len(stream)))
    return Text(tokens, dataset.tokenizer_path, f"{dataset.folder}: holdout")


def fit_artifact(
    task: ArtifactTask,
    training: Path,
    dataset: Dataset,
    folder: Path,
    hessians: Path | None,
    cap_bytes: int,
    ranks: Ranks,
) -> ArtifactResult:
    """Turn one bank entry into an artifact of at most `cap_bytes`: clips and bits are chosen; how
    the final prunes, compresses and packs its code stays.

    Leaves what `make_artifact` leaves, choices.json, and fitted.json, the ArtifactTask that makes
    the same again. InfeasibleError names the smallest size reached.
    """
    started = time.monotonic()
    of = open_entry(task, training, dataset, hessians, ranks)
    subject = Subject(of.state, of.model, of.tokenizer_sha256, of.hessians)
    trained_as, _ = load_training(training)
    model = build(of.model.exported(), dtype=trained_as.train.dtype).to(ranks.device).eval()
    probe = probe_on(model, probe_stream(dataset), trained_as.parity_window, ranks)
    keep = {"prune", "compress", "code"}
    fitted = fit(subject, task.final, cap_bytes, make_room(folder), probe, keep)
    chosen = replace(task, final=fitted.final)
    write_json(folder / "fitted.json", dump(chosen))
    write_json(folder / "choices.json", dump(fitted.choices))
    return leave_artifact(chosen, of, fitted.report, folder, time.monotonic() - started)


def probe_stream(dataset: Dataset) -> TokenStream:
    """Training text to choose settings by: held-out shards where they hold enough."""
    is_enough = dataset.num_tokens("holdout") > PROBE_TOKENS
    return dataset.stream("holdout" if is_enough else "train")


def probe_on(model: GPT, stream: TokenStream, window: int, ranks: Ranks) -> Probe:
    """Nats per token of a state of `model` on the head of a stream, in windows without overlap."""
    tokens = stream.read(0, min(PROBE_TOKENS, len(stream) - 1) + 1)
    block = min(window, len(tokens) - 1)
    spec = EvaluateSpec(window=block, stride=block)

    def loss(state: Mapping[str, Tensor]) -> float:
        load_state(model, dict(state))
        tape = Tape(tokens)
        slide(model, tape, spec, ranks)
        return float(tape.losses.mean(dtype=np.float64))

    return loss

"""A model and a text: what scores them, for the trainer and for whoever doubts its number."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainer.data.bytecount import table_for
from trainer.data.shards import Dataset
from trainer.errors import DataError
from trainer.evaluate.bpb import score_of
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.journal import Journal
from trainer.evaluate.progress import Progress
from trainer.evaluate.tape import Tape
from trainer.finalize.artifact import read_weights
from trainer.finalize.pipeline import WEIGHTS_FILE
from trainer.kernels.chosen import kernels_of_score
from trainer.model.build import build, load_state
from trainer.model.gpt import GPT
from trainer.protocol import UNKNOWN_TOKENIZER
from trainer.results import Score, Totals
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import sha256_file
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What is scored: ids [N + 1] of N predictions, the model file of their tokenizer, and where
    they come from."""

    tokens: np.ndarray
    tokenizer: Path
    where: str


class Scored(NamedTuple):
    """A score, the sums behind it, and the record of how it came about."""

    score: Score
    totals: Totals
    tape: Tape
    was_resumed: bool


def val_text(dataset: Dataset) -> Text:
    """The whole validation split."""
    stream = dataset.stream("val")
    return Text(stream.read(0, len(stream)), dataset.tokenizer_path, str(dataset.folder))


def load_artifact(folder: Path, tokenizer: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Read an artifact's model and float32 state; DataError if it was made for another tokenizer.

    An imported artifact names none.
    """
    path = folder / WEIGHTS_FILE
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
    journal: Journal | None = None,
) -> Scored:
    """Score a text with a fresh model of this state."""
    kernels = kernels_of_score(evaluate, ranks.device, dtype)
    model = build(spec, dtype=dtype, kernels=kernels)
    load_state(model, dict(state))
    return score_text(model.to(ranks.device), text, evaluate, ranks, journal=journal)


def score_text(
    model: GPT,
    text: Text,
    spec: EvaluateSpec,
    ranks: Ranks,
    *,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Scored:
    """Score a text, or what the journal says is left of it; every rank returns the whole.

    The model is given away. The journal is gone once the score is there. DataError for ids that the
    model has no row for, or another tokenizer.
    """
    table = table_for(text.tokens, text.tokenizer, model.plan.spec.vocab_size, text.where)
    if len(text.tokens) < 2:
        raise DataError(f"{text.where}: {len(text.tokens)} tokens have nothing to predict")
    tape = Tape(text.tokens, again=spec.variant == "A", progress=progress, journal=journal)
    was_resumed = journal is not None and journal.folder.is_dir()
    started = time.monotonic()
    evaluate(model, tape, spec, ranks)
    totals = tape.totals(table)
    spent_s = time.monotonic() - started + (0.0 if journal is None else journal.spent_s)
    score = score_of(totals, spent_s, text.where)
    ranks.barrier()  # or a slow rank's last part would come after this
    if journal is not None and ranks.is_first:
        journal.remove()
    return Scored(score, totals, tape, was_resumed)

"""Score a model on disk, for anybody who doubts its number.

Finds the model and the text, holds the text's bytes against what it decodes to, picks what a time
budget allows, and has one process or several score; a score that was cut short goes on.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from service.local_ranks import run_ranks
from service.paths import Paths
from service.score_bar import ScoreBar
from service.scored_text import Source, text_of
from service.talk import Talk
from trainer.artifacts import load_training
from trainer.codec import dump, parse, with_values
from trainer.data.bytecount import decoded_bytes, table_for
from trainer.data.tokenizer import open_tokenizer
from trainer.errors import DataError, InfeasibleError, UsageError
from trainer.evaluate.journal import Journal, identity
from trainer.evaluate.progress import Progress
from trainer.evaluate.tape import Tape
from trainer.evaluate.timing import Option, measure, options, pick
from trainer.finalize.artifact import read_weights
from trainer.finalize.code import code_digest
from trainer.finalize.pipeline import WEIGHTS_FILE
from trainer.finalize.stored import restore
from trainer.importer.fitting import fit
from trainer.importer.folder import is_imported_bank, load_bank
from trainer.importer.formats import read_public
from trainer.kernels.chosen import kernels_of_score
from trainer.model.build import build, load_state
from trainer.model.gpt import GPT
from trainer.protocol import UNKNOWN_TOKENIZER
from trainer.results import Score
from trainer.runtime.distributed import Ranks, best_device, current
from trainer.runtime.files import locked, read_json
from trainer.runtime.tensors import load_tensors, saved_names
from trainer.scoring import Text, check_tokenizer, score_text
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe
from trainer.specs.task import FinalTask

_KERNELS = {"attention", "fused"}  # what of an evaluation's spec names kernels


@dataclass(frozen=True, slots=True)
class Asked:
    """What may be told besides the model and the text.

    `evaluate` sets dotted paths over how a final was scored, but for its kernels: they are torch's
    own unless it names some. `recipe` fits a public script's file; `entry` is one of a bank;
    `budget_s` has the evaluation picked to take no longer.
    """

    evaluate: tuple[tuple[str, Any], ...] = ()
    recipe: Recipe | None = None
    entry: str | None = None
    dtype: str = "float32"
    workers: int = 1
    budget_s: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model read from disk; `tokenizer` is the sha256 that it names, or unknown."""

    spec: ModelSpec
    state: Mapping[str, Tensor]
    tokenizer: str
    where: Path

    def on(self, evaluate: EvaluateSpec, dtype: str, ranks: Ranks) -> GPT:
        """Build it on a rank's device, with the kernels that its evaluation names."""
        kernels = kernels_of_score(evaluate, ranks.device, dtype)
        model = build(self.spec, dtype=dtype, kernels=kernels)
        load_state(model, dict(self.state))
        return model.to(ranks.device)


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank is told: it reads the model and the text by itself.

    `journal` is the folder in which the score `key` keeps what a later attempt goes on from.
    """

    path: Path
    asked: Asked
    home: Path
    source: Source
    spec: EvaluateSpec
    journal: Path
    key: str
    save_every_s: float = 30.0


def model_of(paths: Paths, ref: str) -> tuple[Path, Path | None]:
    """Find a model by path or by its final's id (or a unique start of it).

    Returns its folder, and that of the final where it was found by id. UsageError when nothing or
    more than one fits.
    """
    if not ref:
        raise UsageError("'': give a path, or a final's id as `fairway best` prints it")
    if Path(ref).exists():
        path = Path(ref)
        return (path if path.is_dir() else path.parent), None
    finished = sorted((paths.store / "finals").glob("*/result.json"))
    matching = [path.parent for path in finished if path.parent.name.startswith(ref)]
    if len(matching) != 1:
        raise UsageError(
            f"{ref}: no such artifact, and {len(matching)} finals in {paths.store} start so; "
            "give a path, or a final's id as `fairway best` prints it"
        )
    return matching[0] / "artifact", matching[0]


def rescore(paths: Paths, ref: str, source: Source, asked: Asked) -> dict[str, Any]:
    """Load a model on disk into a fresh one and score it on a text.

    InfeasibleError where no evaluation fits the budget, or the totals are not the text's.
    """
    path, final = _find(paths, ref)
    own = _evaluated(final) if final else {}
    # Whoever doubts a score computes it by torch's own kernels, and in float32 no others may run.
    windows = {name: value for name, value in own.items() if name not in _KERNELS}
    wanted = with_values(windows, asked.evaluate)
    if "window" not in wanted:
        raise UsageError(f"{path}: say how long a window the model was trained on: --window")
    wanted.setdefault("stride", wanted["window"])
    spec = parse(EvaluateSpec, wanted, "score")
    model = _load(path, asked)
    if model.tokenizer == UNKNOWN_TOKENIZER and source == Source(limit=source.limit):
        raise UsageError(
            f"{path}: its tokenizer is not known; name a text of it, --tokens with --tokenizer "
            "or --data"
        )
    text = text_of(paths, source)
    check_tokenizer(model.tokenizer, text.tokenizer, model.where)
    table_for(text.tokens, text.tokenizer, model.spec.vocab_size, text.where)
    talk = Talk()
    num_bytes, undecodable = decoded_bytes(
        open_tokenizer(text.tokenizer), np.asarray(text.tokens), text.where
    )
    if undecodable:
        talk.say("not_text", text=text.where, undecodable_pieces=undecodable)
    picked: dict[str, Any] = {}
    if asked.budget_s is not None:
        option = _affordable(spec, model, text, asked, talk)
        spec, picked = option.spec, {"picked": option.choices()}
    key = _key(model, text, spec, asked)
    journal = paths.home / "scores" / key[:20]
    job = Job(path, asked, paths.home, source, spec, journal, key)
    with undisturbed(journal), ScoreBar(talk, len(text.tokens) - 1) as bar:
        if asked.workers == 1:
            score = score_job(job, model, text, current(), bar)
        else:
            score = run_ranks(score_rank, job, asked.workers, bar)
    if spec.variant == "C" and (score.tokens, score.bytes) != (len(text.tokens) - 1, num_bytes):
        raise InfeasibleError(
            f"{text.where}: scored {score.tokens:,} tokens and {score.bytes:,} bytes of "
            f"{len(text.tokens) - 1:,} and {num_bytes:,}; do not use this score"
        )
    return {"artifact": str(path), **dump(score), **picked}


def score_rank(job: Job, ranks: Ranks, progress: Progress) -> Score:
    """Do one rank's share of a score; every rank returns the whole."""
    model, text = _load(job.path, job.asked), text_of(Paths(job.home), job.source)
    return score_job(job, model, text, ranks, progress)


def score_job(job: Job, model: Model, text: Text, ranks: Ranks, progress: Progress) -> Score:
    """Score a text, or what an attempt that was cut short left of it."""
    journal = Journal(job.journal, job.key, ranks.rank, job.save_every_s)
    built = model.on(job.spec, job.asked.dtype, ranks)
    return score_text(built, text, job.spec, ranks, progress=progress, journal=journal).score


@contextmanager
def undisturbed(journal: Path) -> Iterator[None]:
    """Keep other processes off a score; nothing of that is left behind.

    UsageError while another one is at it, or where the home cannot be written.
    """
    lock = journal.with_suffix(".lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError as error:
            raise UsageError(
                f"{journal}: another process is at the same score; wait for it to end"
            ) from error
        except OSError as error:
            raise UsageError(f"{lock}: {error.strerror}; take another --home") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # a journal is there
                lock.parent.rmdir()


def _key(model: Model, text: Text, spec: EvaluateSpec, asked: Asked) -> str:
    """Name everything that a score follows from."""
    # Steps on averaged gradients follow from how many share them; scores alone do not.
    gang = None if spec.ttt is None else asked.workers
    facts = [code_digest(), dump(spec), dump(model.spec), asked.dtype, best_device(0).type, gang]
    return identity(facts, dict(model.state), np.asarray(text.tokens))


def _affordable(spec: EvaluateSpec, model: Model, text: Text, asked: Asked, talk: Talk) -> Option:
    """Measure, say what each way to evaluate would take, and return the best within the budget."""
    assert asked.budget_s is not None
    ranks = current()
    speed = measure(model.on(spec, asked.dtype, ranks), spec, ranks)
    tape = Tape(text.tokens)
    starts = None if spec.documents is None else tape.document_starts(spec.documents.bos)
    found = options(spec, len(tape), starts, speed, asked.workers)
    for option in found:
        fits = "yes" if option.seconds <= asked.budget_s else "no"
        talk.say("estimate", **option.choices(), seconds=round(option.seconds, 1), fits=fits)
    picked = pick(found, asked.budget_s)
    talk.say("picked", **picked.choices(), seconds=round(picked.seconds, 1))
    return picked


def _evaluated(final: Path) -> dict[str, Any]:
    """How a final was scored."""
    path = final / "task.json"
    try:
        return dump(parse(FinalTask, read_json(path), str(path)).evaluate)
    except DataError:
        raise
    except UsageError as error:
        raise DataError(
            f"{path}: made by another version of the spec; finalize it again"
        ) from error


def _find(paths: Paths, ref: str) -> tuple[Path, Path | None]:
    """As `model_of`, but a file stands for itself, and a training's id for its bank."""
    if ref and Path(ref).is_file():
        return Path(ref), None
    trained = sorted((paths.store / "trainings").glob("*/result.json"))
    matching = [path.parent for path in trained if ref and path.parent.name.startswith(ref)]
    if len(matching) == 1 and not Path(ref).exists():
        return matching[0], None
    return model_of(paths, ref)


def _load(path: Path, asked: Asked) -> Model:
    """Read an artifact, a bank or, with its recipe, a public script's file."""
    if asked.recipe is not None:
        return _public(path, asked.recipe, asked.entry)
    folder = path.parent if (path / "index.json").is_file() else path  # the bank's own folder
    if is_imported_bank(folder):
        _only_entry(folder, "raw", asked.entry)
        return Model(*load_bank(folder), UNKNOWN_TOKENIZER, folder / WEIGHTS_FILE)
    if (folder / "bank" / "index.json").is_file() and (folder / "task.json").is_file():
        return _trained(folder, asked.entry)
    file = path if path.is_file() else path / WEIGHTS_FILE
    if asked.entry is not None:
        raise UsageError(f"--entry {asked.entry}: {file} is no bank; leave it out")
    try:
        spec, state, facts = read_weights(file)
    except DataError as error:
        if path.is_file() and path.name != WEIGHTS_FILE:
            raise DataError(f"{error}; a public script's file needs --recipe") from error
        raise
    return Model(spec, state, facts.tokenizer_sha256, file)


def _public(path: Path, recipe: Recipe, entry: str | None) -> Model:
    if not path.is_file():
        raise UsageError(f"--recipe: it fits a public script's file, and {path} is a folder")
    if entry is not None:
        raise UsageError(f"--entry {entry}: {path} is no bank; leave it out")
    file = read_public(path)
    spec = recipe.model.exported() if file.is_quantized else recipe.model
    state = {name: restore(part) for name, part in fit(file, spec, str(path)).items()}
    return Model(spec, state, UNKNOWN_TOKENIZER, path)


def _trained(folder: Path, entry: str | None) -> Model:
    task, _ = load_training(folder)
    entries = saved_names(folder / "bank")
    if entry is None and len(entries) > 1:
        raise UsageError(f"{folder}: say which entry of the bank: --entry {' | '.join(entries)}")
    state = load_tensors(folder / "bank", entry or entries[0])
    return Model(task.model, state, UNKNOWN_TOKENIZER, folder / "bank")


def _only_entry(folder: Path, name: str, entry: str | None) -> None:
    if entry not in (None, name):
        raise UsageError(f"--entry {entry}: {folder} holds only {name}")

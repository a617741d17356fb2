"""Score a model on disk again, for anybody who doubts its number."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.catalogue_view import data_of
from service.paths import Paths
from trainer.codec import dump, parse
from trainer.data.prepare import EMBEDDED_NAME
from trainer.data.shards import open_shard
from trainer.errors import DataError, UsageError
from trainer.importer.folder import is_imported_bank, load_bank
from trainer.protocol import SHARD_MAGIC
from trainer.run import Text, load_artifact, score_state, val_text
from trainer.runtime.distributed import current
from trainer.runtime.files import read_json
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.recipe import DataSpec
from trainer.specs.task import FinalTask

_NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be scored: a dataset's val split by name, or a file of ids with its tokenizer.

    Of either only the first `limit` targets, where given.
    """

    data: str | None = None
    tokens: Path | None = None
    tokenizer: Path | None = None
    limit: int | None = None


def model_of(paths: Paths, ref: str) -> tuple[Path, EvaluateSpec | None]:
    """Find a model by path or by its final's id (or a unique start of it).

    A final also tells how it was scored. UsageError when nothing or more than one fits.
    """
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
    folder = matching[0]
    task = parse(FinalTask, read_json(folder / "task.json"), str(folder / "task.json"))
    return folder / "artifact", task.evaluate


def rescore(
    paths: Paths, ref: str, source: Source, asked: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Load an artifact or an imported bank into a fresh model and score it.

    `asked` may set window, stride, variant.
    """
    folder, known = model_of(paths, ref)
    wanted = {**(dump(known) if known else {}), **asked}
    if "window" not in wanted:
        raise UsageError(f"{folder}: say how long a window the model was trained on: --window")
    wanted.setdefault("stride", wanted["window"])
    spec = parse(EvaluateSpec, wanted, "score")
    text = text_of(paths, source)
    if is_imported_bank(folder):
        model, state = load_bank(folder)
    else:
        model, state = load_artifact(folder, text.tokenizer)
    score, _ = score_state(model, state, text, spec, current(), dtype=dtype)
    return {"artifact": str(folder), **dump(score)}


def text_of(paths: Paths, source: Source) -> Text:
    """Read what is to be scored. UsageError for options that contradict, DataError for a file."""
    if source.tokens is None:
        if source.tokenizer is not None:
            raise UsageError("--tokenizer: belongs to --tokens; a dataset has its own")
        text = val_text(data_of(paths, DataSpec(name=source.data or EMBEDDED_NAME)))
    elif source.data is not None:
        raise UsageError("--tokens and --data: give one of them, each is a text to score")
    elif source.tokenizer is None:
        raise UsageError("--tokens: say which SentencePiece model made them: --tokenizer")
    else:
        text = Text(read_tokens(source.tokens), source.tokenizer, str(source.tokens))
    if source.limit is None:
        return text
    targets = len(text.tokens) - 1
    if not 0 < source.limit <= targets:
        raise UsageError(
            f"--limit {source.limit}: {text.where} has {targets} targets; ask for 1 to {targets}"
        )
    return Text(text.tokens[: source.limit + 1], text.tokenizer, text.where)


def read_tokens(path: Path) -> np.ndarray:
    """Read token ids from a .npy of one row of integers, or from a shard; told by content."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_NPY_MAGIC))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a .npy or a shard") from error
    if head.startswith(SHARD_MAGIC.to_bytes(4, "little")):
        return open_shard(path)
    if head != _NPY_MAGIC:
        raise DataError(f"{path}: neither a .npy of token ids nor a shard; give one of them")
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a whole .npy ({str(error)[:200]}); write it again") from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{path}: {ids.dtype} of shape {ids.shape}; expected one row of integers")
    # What is beyond int64 is beyond any vocabulary.
    if ids.size < 2 or int(ids.min()) < 0 or int(ids.max()) >= 2**31:
        raise DataError(f"{path}: expected two or more ids from 0 up, of a vocabulary")
    return ids.astype(np.int64)

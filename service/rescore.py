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
from trainer.finalize.artifact import read_weights
from trainer.finalize.pipeline import WEIGHTS_FILE
from trainer.importer.folder import is_imported_bank, load_bank
from trainer.protocol import SHARD_MAGIC, UNKNOWN_TOKENIZER
from trainer.run import Text, check_tokenizer, score_state, val_text
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


def rescore(
    paths: Paths, ref: str, source: Source, asked: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Load an artifact or an imported bank into a fresh model and score it.

    `asked` may set window, stride, variant.
    """
    folder, final = model_of(paths, ref)
    wanted = {**(_evaluated(final) if final else {}), **asked}
    if "window" not in wanted:
        raise UsageError(f"{folder}: say how long a window the model was trained on: --window")
    wanted.setdefault("stride", wanted["window"])
    spec = parse(EvaluateSpec, wanted, "score")
    if is_imported_bank(folder):
        model, state = load_bank(folder)
        tokenizer = UNKNOWN_TOKENIZER
    else:
        model, state, facts = read_weights(folder / WEIGHTS_FILE)
        tokenizer = facts.tokenizer_sha256
    if tokenizer == UNKNOWN_TOKENIZER and source == Source(limit=source.limit):
        raise UsageError(
            f"{folder}: its tokenizer is not known; name a text of it, --tokens with --tokenizer "
            "or --data"
        )
    text = text_of(paths, source)
    check_tokenizer(tokenizer, text.tokenizer, folder / WEIGHTS_FILE)
    score, _ = score_state(model, state, text, spec, current(), dtype=dtype)
    return {"artifact": str(folder), **dump(score)}


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
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise DataError(f"{path}: not a regular file; give a .npy or a shard")
        with path.open("rb") as file:
            head = file.read(len(_NPY_MAGIC))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a .npy or a shard") from error
    if head.startswith(SHARD_MAGIC.to_bytes(4, "little")):
        return open_shard(path)
    if head != _NPY_MAGIC:
        raise DataError(f"{path}: neither a .npy of token ids nor a shard; give one of them")
    try:
        # Mapped, so that a header which claims more than the file has costs no memory.
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    # The file is foreign bytes: the reader raises whatever it stumbles over.
    except Exception as error:
        raise DataError(
            f"{path}: not a whole .npy ({_first_line(error)}); write it again"
        ) from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            f"{path}: {ids.dtype} of shape {ids.shape}, expected one row of integers; write it so"
        )
    # What is beyond int64 is beyond any vocabulary.
    if not 2 <= ids.size < 2**31 or int(ids.min()) < 0 or int(ids.max()) >= 2**31:
        raise DataError(
            f"{path}: expected two or more ids from 0 up, of a vocabulary; write it again"
        )
    return ids.astype(np.int64)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]

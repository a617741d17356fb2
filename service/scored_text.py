"""The text that a model on disk is scored on: a dataset's val split, or a file of token ids."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.catalogue_view import data_of
from service.paths import Paths
from trainer.data.prepare import EMBEDDED_NAME
from trainer.data.shards import open_shard
from trainer.errors import DataError, UsageError
from trainer.protocol import SHARD_MAGIC
from trainer.scoring import Text, val_text
from trainer.specs.recipe import DataSpec

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

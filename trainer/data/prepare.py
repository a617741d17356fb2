"""Text to a dataset: documents, splits, tokenizer, shards, manifest.

    sources → survey (duplicates) → partition (seeded) → tokenizer (train documents only)
            → spool (encoded once, in source order) → overlap → shards in shuffled order → manifest

Two walks over the sources and one more where a tokenizer is trained; only document positions and
hashes are held in memory. Everything is written to a hidden sibling folder that is renamed at the
end, so an interrupted preparation leaves nothing that loads. The same sources, settings and
tokenizer give the same digest. `prepare_embedded` does it with the text that ships in `embedded/`.
"""

import importlib.resources
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.resources import as_file
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from trainer.data.bytecount import ByteTable, verify_document
from trainer.data.documents import Document
from trainer.data.manifest import (
    SPLITS,
    TOKENIZER_FILE,
    Manifest,
    Shard,
    Split,
    SplitName,
    Tokenizer,
    check_name,
    content_digest,
    write_manifest,
)
from trainer.data.overlap import measure_overlap
from trainer.data.partition import Survey, partition, survey_documents
from trainer.data.shards import Dataset, describe_shard, load_dataset, write_shard
from trainer.data.staging import locked, publish, staging_folder
from trainer.data.tokenizer import open_tokenizer, train_tokenizer
from trainer.errors import DataError, UsageError
from trainer.protocol import BOS_ID
from trainer.runtime import files

Progress = Callable[[int, int], None]
_BATCH_DOCUMENTS = 512

EMBEDDED_NAME = "embedded"
# Follows from the shipped files and the default settings, on any machine. A folder with another
# digest was made by another version.
EMBEDDED_DIGEST = "sha256:3aa392e74b9aa0634217b90884de67424c9ae7a7d7fa9baf74cf7766daab0c8a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How text becomes a dataset. `vocab_size` asks for a tokenizer to be trained."""

    vocab_size: int | None = None
    val_fraction: float = 0.03
    holdout_fraction: float = 0.03
    shard_tokens: int = 100_000_000
    seed: int = 1337


def prepare(
    sources: Sequence[Path],
    out: Path,
    settings: Settings = Settings(),
    *,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    replace: bool = False,
) -> Dataset:
    """Make the dataset `out` from text or JSON-lines files; its name is the folder's by default.

    Give either a `tokenizer` or `settings.vocab_size`. `progress` is called with the documents
    encoded and their number. `replace` allows `out` to hold an older dataset.
    """
    name = check_name(name or out.name)
    if (tokenizer is None) == (settings.vocab_size is None):
        raise UsageError(f"{out}: give either a tokenizer or a vocab_size to train one of")
    if settings.shard_tokens < 1:
        raise UsageError(f"shard_tokens={settings.shard_tokens}: use 1 or more")
    described = tuple(_describe_source(source) for source in sources)
    with staging_folder(out, replace=replace) as folder:
        survey = survey_documents(sources)
        members = partition(
            survey.num_documents, settings.val_fraction, settings.holdout_fraction, settings.seed
        )
        model = folder / TOKENIZER_FILE
        _place_tokenizer(model, tokenizer, survey, members["train"], settings.vocab_size)
        spool = _Spool.write(folder / "spool", survey, model, progress)
        overlap = measure_overlap(members, spool.tokens, survey.where)
        splits: dict[SplitName, Split] = {
            split: _write_split(folder, f"{name}_{split}", spool, members[split], settings)
            for split in SPLITS
        }
        spool.path.unlink()
        entry = Tokenizer(
            sha256=files.sha256_file(model), vocab_size=open_tokenizer(model).vocab_size()
        )
        write_manifest(
            folder,
            Manifest(
                name=name,
                tokenizer=entry,
                splits=splits,
                settings=_settings_entry(settings, survey),
                sources=described,
                overlap=overlap,
                digest=content_digest(entry, splits),
            ),
        )
        load_dataset(folder)
        publish(folder, out, replace=replace)
    return load_dataset(out)


def prepare_embedded(out: Path) -> Dataset:
    """Open the dataset of the shipped text at `out`, after making it if it is missing or damaged.

    Callers that arrive together wait for the first.
    """
    with locked(out):
        try:
            existing = load_dataset(out, verify=True)
        except DataError:
            existing = None
        if existing is not None and existing.digest == EMBEDDED_DIGEST:
            return existing
        with ExitStack() as stack:
            shipped = importlib.resources.files("trainer.data") / "embedded"
            text = stack.enter_context(as_file(shipped / "corpus-small.txt"))
            tokenizer = stack.enter_context(as_file(shipped / TOKENIZER_FILE))
            return prepare(
                [text], out, Settings(), tokenizer=tokenizer, name=EMBEDDED_NAME, replace=True
            )


def _describe_source(source: Path) -> dict[str, Any]:
    if not source.is_file():
        raise UsageError(f"{source}: no such file; give text or JSON-lines files")
    return {
        "file": source.name,
        "size": source.stat().st_size,
        "sha256": files.sha256_file(source),
    }


def _settings_entry(settings: Settings, survey: Survey) -> dict[str, Any]:
    return {
        **asdict(settings),
        "documents": survey.num_documents,
        "duplicates_dropped": survey.num_duplicates,
    }


def _place_tokenizer(
    model: Path,
    tokenizer: Path | None,
    survey: Survey,
    train_members: np.ndarray,
    vocab_size: int | None,
) -> None:
    if tokenizer is not None:
        open_tokenizer(tokenizer)
        shutil.copyfile(tokenizer, model)
        return
    assert vocab_size is not None
    is_train = np.zeros(survey.num_documents, dtype=bool)
    is_train[train_members] = True
    numbered = enumerate(survey.documents())
    texts = (document.text for number, document in numbered if is_train[number])
    train_tokenizer(texts, vocab_size, model)


@dataclass(frozen=True, slots=True)
class _Spool:
    """Every kept document encoded once, in source order, with what it weighs."""

    path: Path
    stream: np.ndarray
    ends: np.ndarray
    decoded_bytes: np.ndarray
    raw_bytes: np.ndarray

    @classmethod
    def write(cls, path: Path, survey: Survey, model: Path, progress: Progress | None) -> "_Spool":
        """Encode and check every document; BOS opens each."""
        tokenizer = open_tokenizer(model)
        table = ByteTable.build(tokenizer)
        lengths, decoded, raw = array("q"), array("q"), array("q")
        with path.open("wb") as file:
            for batch in _batches(survey.documents()):
                for document, tokens in zip(batch, _encode(tokenizer, batch), strict=True):
                    where = survey.where(len(lengths))
                    decoded.append(verify_document(tokenizer, table, tokens[1:], where))
                    raw.append(len(document.text.encode()))
                    lengths.append(len(tokens))
                    file.write(tokens.tobytes())
                if progress:
                    progress(len(lengths), survey.num_documents)
        stream = np.memmap(path, dtype="<u2", mode="r")
        return cls(path, stream, np.cumsum(lengths), np.array(decoded), np.array(raw))

    def tokens(self, document: int) -> np.ndarray:
        """A document's tokens, BOS first."""
        start = int(self.ends[document - 1]) if document else 0
        return np.array(self.stream[start : int(self.ends[document])])


def _encode(
    tokenizer: sentencepiece.SentencePieceProcessor, batch: Sequence[Document]
) -> list[np.ndarray]:
    pieces = tokenizer.encode([document.text for document in batch])
    return [np.array([BOS_ID, *ids], dtype="<u2") for ids in pieces]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        yield batch


def _write_split(
    folder: Path, stem: str, spool: _Spool, members: np.ndarray, settings: Settings
) -> Split:
    entries: list[Shard] = []
    documents = (spool.tokens(number) for number in members.tolist())
    for tokens in _cut(documents, settings.shard_tokens):
        path = folder / f"{stem}_{len(entries):06d}.bin"
        write_shard(path, tokens)
        entries.append(describe_shard(path))
    return Split(
        shards=tuple(entries),
        tokens=sum(entry.tokens for entry in entries),
        documents=len(members),
        bytes=int(spool.decoded_bytes[members].sum()),
        raw_bytes=int(spool.raw_bytes[members].sum()),
    )


def _cut(documents: Iterator[np.ndarray], shard_tokens: int) -> Iterator[np.ndarray]:
    """Join documents and cut them into shards; only the last may be shorter."""
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for document in documents:
        waiting.append(document)
        num_waiting += len(document)
        while num_waiting >= shard_tokens:
            tokens = np.concatenate(waiting)
            yield tokens[:shard_tokens]
            waiting, num_waiting = [tokens[shard_tokens:]], len(tokens) - shard_tokens
    if num_waiting:
        yield np.concatenate(waiting)

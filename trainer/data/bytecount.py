"""How many bytes of text a token stands for: the denominator of bits per byte.

A target pays for its piece, and for its leading space unless what comes before is a boundary (BOS
or another piece without text), because a document's first word has no space in the text. Source:
techniques.md 1.3, which also lists the ways to get this wrong; that is why `verify_decoded` holds
the table against the decoded text. Works with SentencePiece models that fall back to bytes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from trainer.data.shards import Dataset, TokenStream
from trainer.data.tokenizer import open_tokenizer
from trainer.errors import DataError
from trainer.protocol import BOS_ID

_SPACE = "\u2581"  # SentencePiece writes a space as this sign
_AGAIN = "prepare or fetch it again"


@dataclass(frozen=True, slots=True, eq=False)
class ByteTable:
    """Three columns by token id: bytes without the space, leading space, boundary."""

    lut: np.ndarray
    has_leading_space: np.ndarray
    is_boundary: np.ndarray

    @classmethod
    def load(cls, tokenizer_path: Path, vocab_size: int = 0) -> "ByteTable":
        """Build the table of a model file, as long as the larger of the two vocabularies."""
        return cls.build(open_tokenizer(tokenizer_path), vocab_size)

    @classmethod
    def build(
        cls, tokenizer: sentencepiece.SentencePieceProcessor, vocab_size: int = 0
    ) -> "ByteTable":
        """Build the table of an open tokenizer; ids above its size are boundaries without bytes."""
        size = max(tokenizer.vocab_size(), vocab_size)
        lut = np.zeros(size, dtype=np.int32)
        has_leading_space = np.zeros(size, dtype=bool)
        is_boundary = np.ones(size, dtype=bool)
        for token in range(tokenizer.vocab_size()):
            if (
                tokenizer.is_control(token)
                or tokenizer.is_unknown(token)
                or tokenizer.is_unused(token)
            ):
                continue
            is_boundary[token] = False
            if tokenizer.is_byte(token):
                lut[token] = 1
                continue
            piece = tokenizer.id_to_piece(token)
            has_leading_space[token] = piece.startswith(_SPACE)
            lut[token] = len(piece.removeprefix(_SPACE).encode())
        return cls(lut=lut, has_leading_space=has_leading_space, is_boundary=is_boundary)

    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes of each target after its predecessor, int64 in the shape of the pairs."""
        has_space = self.has_leading_space[target] & ~self.is_boundary[prev]
        return self.lut[target].astype(np.int64) + has_space


def count_stream(
    stream: TokenStream, table: ByteTable, where: Path, chunk_tokens: int = 1 << 24
) -> tuple[int, int]:
    """Count a stream's documents (BOS) and the bytes of all its targets.

    DataError names `where` if a token id lies outside the table.
    """
    num_documents = int(stream.read(0, 1)[0] == BOS_ID)
    num_bytes = 0
    for tokens in stream.chunks(chunk_tokens, overlap=1):
        _check_ids(tokens, len(table.lut), where)
        num_documents += int((tokens[1:] == BOS_ID).sum())
        num_bytes += int(table.count(tokens[:-1], tokens[1:]).sum())
    return num_documents, num_bytes


def verify_decoded(
    tokenizer: sentencepiece.SentencePieceProcessor, tokens: np.ndarray, where: Path
) -> int:
    """Return the bytes of the text that `tokens` decode to, once the table gives the same.

    Each document counts by itself, its first token without the space. Where the stream is cut
    inside a character, that character's pieces are left out. DataError if the two disagree.
    """
    table = ByteTable.build(tokenizer)
    _check_ids(tokens, tokenizer.vocab_size(), where)
    starts = np.flatnonzero(tokens == BOS_ID)
    documents = [part for part in np.split(tokens, starts) if part.size]
    total = 0
    for index, document in enumerate(documents):
        pieces = document[1:] if document[0] == BOS_ID else _without_cut_head(tokenizer, document)
        if index == len(documents) - 1:
            pieces = _without_cut_tail(tokenizer, pieces)
        if not pieces.size:
            continue
        total += verify_document(tokenizer, table, pieces, f"{where}: document {index}")
    return total


def verify_document(
    tokenizer: sentencepiece.SentencePieceProcessor,
    table: ByteTable,
    pieces: np.ndarray,
    where: str,
) -> int:
    """Return the bytes that one document's pieces (without BOS) decode to, as `verify_decoded`."""
    counted = int(table.count(np.concatenate([[BOS_ID], pieces[:-1]]), pieces).sum())
    decoded = len(tokenizer.decode(pieces.tolist()).encode())
    if counted != decoded:
        raise DataError(
            f"{where}: decodes to {decoded:,} bytes but counts {counted:,}; bits per byte would be "
            f"wrong, use a tokenizer with byte fallback and no spaces inside its pieces"
        )
    return decoded


def verify_dataset(dataset: Dataset) -> None:
    """Recount every split against the manifest, and decode val and holdout against the table."""
    tokenizer = open_tokenizer(dataset.tokenizer_path)
    table = ByteTable.build(tokenizer)
    for split, content in dataset.manifest.splits.items():
        if not content.shards:
            continue
        stream = dataset.stream(split)
        found = count_stream(stream, table, dataset.folder / content.shards[0].file)
        if found != (content.documents, content.bytes):
            raise DataError(
                f"{dataset.folder}: {split} holds {found[0]:,} documents and {found[1]:,} bytes, "
                f"the manifest says {content.documents:,} and {content.bytes:,}; {_AGAIN}"
            )
        if split != "train":
            where = dataset.folder / content.shards[0].file
            verify_decoded(tokenizer, stream.read(0, len(stream)), where)


def _check_ids(tokens: np.ndarray, vocab_size: int, where: Path) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise DataError(
            f"{where}: token id {int(tokens.max())} lies outside the tokenizer's {vocab_size} "
            f"pieces; shards and tokenizer do not belong together"
        )


def _byte_values(
    tokenizer: sentencepiece.SentencePieceProcessor, pieces: np.ndarray
) -> list[int | None]:
    """The byte of each fallback piece, written <0xAB>; None for the others."""
    names = [tokenizer.id_to_piece(token) for token in pieces.tolist()]
    is_byte = [tokenizer.is_byte(token) for token in pieces.tolist()]
    return [int(name[1:-1], 16) if b else None for name, b in zip(names, is_byte, strict=True)]


def _without_cut_head(
    tokenizer: sentencepiece.SentencePieceProcessor, pieces: np.ndarray
) -> np.ndarray:
    skip = 0
    for value in _byte_values(tokenizer, pieces[:3]):
        if value is None or not 0x80 <= value < 0xC0:
            break
        skip += 1
    return pieces[skip:]


def _without_cut_tail(
    tokenizer: sentencepiece.SentencePieceProcessor, pieces: np.ndarray
) -> np.ndarray:
    for back, value in enumerate(reversed(_byte_values(tokenizer, pieces[-3:])), start=1):
        if value is None or value < 0x80:
            break
        if value >= 0xC0:  # a lead byte; it announces how many bytes its character has
            needed = 2 if value < 0xE0 else 3 if value < 0xF0 else 4
            return pieces[:-back] if back < needed else pieces
    return pieces

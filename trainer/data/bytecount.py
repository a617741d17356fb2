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


def table_for(tokens: np.ndarray, tokenizer: Path, vocab_size: int, where: str) -> ByteTable:
    """Return the table of the tokenizer that made the tokens a model of `vocab_size` will score.

    DataError for ids that the model has no row for, and for a tokenizer that would give such ids:
    its table counts another text's bytes.
    """
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise DataError(
            f"{where}: token id {largest}, but the model's vocab_size is {vocab_size}; "
            "score tokens of its own tokenizer"
        )
    table = ByteTable.load(tokenizer, vocab_size)
    if len(table.lut) > vocab_size:
        raise DataError(
            f"{tokenizer}: {len(table.lut)} tokens, but the model's vocab_size is {vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    return table


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


def decoded_bytes(
    tokenizer: sentencepiece.SentencePieceProcessor, tokens: np.ndarray, where: str
) -> tuple[int, int]:
    """Return the bytes of text that the targets tokens[1:] stand for, from what they decode to, and
    how many pieces of the text do not decode.

    A piece of text lies between control tokens; its first token's space is not in it. The first
    token is no target, so its own bytes are left out. Of a character that an end of the tokens
    cuts, each byte counts for itself. What holds unknown tokens or broken characters is no text
    and counts as the table has it. DataError where a text decodes to other bytes than the table
    counts: bits per byte would be wrong.
    """
    table = ByteTable.build(tokenizer, int(tokens.max(initial=0)) + 1)
    is_control = table.is_boundary[tokens] & (tokens != tokenizer.unk_id())
    edges = np.unique(np.concatenate([[0], np.flatnonzero(is_control), [len(tokens)]]))
    total = undecodable = 0
    for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        targets = tokens[max(first, 1) : stop]
        counted = int(table.count(tokens[max(first, 1) - 1 : stop - 1], targets).sum())
        total += counted
        pieces = tokens[first + int(is_control[first]) : stop]
        if len(tokenizer.decode(pieces.tolist()).encode()) == counted:
            continue
        whole = _without_cut_tail(tokenizer, pieces) if stop == len(tokens) else pieces
        if first == 0 and not is_control[0]:
            counted += int(table.lut[tokens[0]])
            whole = _without_cut_head(tokenizer, whole)
        cut = len(pieces) - len(whole)
        if len(whole) and whole[0] != pieces[0]:  # what follows a cut character keeps its space
            cut += int(table.has_leading_space[whole[0]])
        text = tokenizer.decode(whole.tolist())
        if tokenizer.unk_id() in pieces or "\ufffd" in text:
            undecodable += 1
        elif len(text.encode()) + cut != counted:
            raise DataError(_wrong_bytes(f"{where}: tokens {first}..{stop - 1}", text, counted))
    return total, undecodable


def verify_document(
    tokenizer: sentencepiece.SentencePieceProcessor,
    table: ByteTable,
    pieces: np.ndarray,
    where: str,
) -> int:
    """Return the bytes that one document's pieces (without BOS) decode to, as `verify_decoded`."""
    counted = int(table.count(np.concatenate([[BOS_ID], pieces[:-1]]), pieces).sum())
    text = tokenizer.decode(pieces.tolist())
    if counted != len(text.encode()):
        raise DataError(_wrong_bytes(where, text, counted))
    return counted


def _wrong_bytes(where: str, text: str, counted: int) -> str:
    return (
        f"{where}: decodes to {len(text.encode()):,} bytes but counts {counted:,}; bits per byte "
        "would be wrong, use a tokenizer with byte fallback and no spaces inside its pieces"
    )


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

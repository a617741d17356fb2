"""A slow twin of `trainer.data.bytecount`, one pair at a time, written from techniques.md 1.3."""

from collections.abc import Sequence
from itertools import pairwise

import sentencepiece


def count_bytes(
    tokenizer: sentencepiece.SentencePieceProcessor, tokens: Sequence[int]
) -> list[int]:
    """Bytes of every token after the first, each after its predecessor."""
    return [_bytes_of(tokenizer, previous, token) for previous, token in pairwise(tokens)]


def _bytes_of(tokenizer: sentencepiece.SentencePieceProcessor, previous: int, token: int) -> int:
    if _has_no_text(tokenizer, token):
        return 0
    if tokenizer.is_byte(token):
        return 1
    text = tokenizer.id_to_piece(token)
    if not text.startswith("\u2581"):
        return len(text.encode("utf-8"))
    space = 0 if _has_no_text(tokenizer, previous) else 1
    return space + len(text[1:].encode("utf-8"))


def _has_no_text(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> bool:
    if token >= tokenizer.vocab_size():
        return True
    return tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token)

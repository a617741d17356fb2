"""SentencePiece models: opening one that may be broken, and training one.

Settings of a trained model: techniques.md 1.2. What its pieces weigh is `bytecount`'s business.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from trainer.errors import DataError, UsageError
from trainer.protocol import BOS_ID
from trainer.runtime import files

_MAX_VOCAB = 2**16  # shards hold 16-bit ids
_MAX_SENTENCE_BYTES = 1 << 26  # SentencePiece drops longer sentences, 4,192 bytes by default
_MAX_DOCUMENTS = 5_000_000  # as many as the challenge's larger vocabularies were trained on


def open_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model; DataError names a file that is missing or is not one."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; prepare or fetch it again") from error
    # An empty file passes for an empty model that complains on stderr at its first use.
    if not model:
        raise DataError(f"{path}: empty, not a SentencePiece model; prepare or fetch it again")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise DataError(
            f"{path}: not a SentencePiece model, or corrupted; prepare or fetch it again"
        ) from error
    if tokenizer.bos_id() != BOS_ID or tokenizer.vocab_size() > _MAX_VOCAB:
        raise DataError(
            f"{path}: BOS id {tokenizer.bos_id()} and {tokenizer.vocab_size()} pieces; train it "
            f"with BOS id {BOS_ID} and at most {_MAX_VOCAB} pieces"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a BPE model with byte fallback on documents and write it; the same texts give the
    same file."""
    if not 1 < vocab_size <= _MAX_VOCAB:
        raise UsageError(f"vocab_size={vocab_size}: use 2 to {_MAX_VOCAB}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.999,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=True,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error).splitlines()[0]
        raise UsageError(
            f"vocab_size={vocab_size}: the training text does not give such a tokenizer "
            f"({reason}); change vocab_size or bring more text"
        ) from error
    files.write_bytes(path, model.getvalue())
    reached = open_tokenizer(path).vocab_size()
    if reached != vocab_size:
        raise UsageError(
            f"vocab_size={vocab_size}: the training text gives only {reached} pieces; use "
            f"{reached} or bring more text"
        )


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for count, text in enumerate(texts):
        if count == _MAX_DOCUMENTS:
            return
        # NUL is reserved inside the trainer; the encoder falls back to its byte.
        yield from (line for line in text.replace("\0", " ").splitlines() if line.strip())

"""Which document goes where: duplicates dropped, then a seeded shuffle by document.

Two documents are the same if they agree after SentencePiece's nmt_nfkc normalisation, which also
folds white space: what a tokenizer cannot tell apart is kept once, so that nothing in validation
is also trained on. What survives under another tokenizer is caught by `trainer.data.overlap`.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece

from trainer.data.documents import Document, read_documents
from trainer.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first walk over the sources found: which documents are kept, and where they begin."""

    sources: tuple[Path, ...]
    is_kept: bytearray = field(default_factory=bytearray)
    source_index: array = field(default_factory=lambda: array("l"))
    line: array = field(default_factory=lambda: array("q"))

    @property
    def num_documents(self) -> int:
        return len(self.line)

    @property
    def num_duplicates(self) -> int:
        return len(self.is_kept) - self.num_documents

    def where(self, document: int) -> str:
        """File and line of a kept document."""
        return f"{self.sources[self.source_index[document]]}: line {self.line[document]}"

    def documents(self) -> Iterator[Document]:
        """Walk the sources again, over the kept documents only."""
        walked = 0
        for source in self.sources:
            for document in read_documents(source):
                if walked < len(self.is_kept) and self.is_kept[walked]:
                    yield document
                walked += 1
        if walked != len(self.is_kept):
            raise DataError(f"{self.sources[0]}: the sources changed while being read; run again")


def survey_documents(sources: Sequence[Path]) -> Survey:
    """Walk all sources once; DataError if they hold no document."""
    survey = Survey(tuple(sources))
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
    seen: set[bytes] = set()
    for index, source in enumerate(sources):
        for document in read_documents(source):
            normal = " ".join(normalizer.normalize(document.text).split())
            key = hashlib.blake2b(normal.encode(), digest_size=16).digest()
            is_new = bool(normal) and key not in seen
            survey.is_kept.append(is_new)
            if is_new:
                seen.add(key)
                survey.source_index.append(index)
                survey.line.append(document.line)
    if not survey.num_documents:
        where = ", ".join(map(str, sources)) or "sources"
        raise DataError(f"{where}: no documents; give UTF-8 text or JSON lines")
    return survey


def partition(
    num_documents: int, val_fraction: float, holdout_fraction: float, seed: int
) -> dict[str, np.ndarray]:
    """Shuffle document numbers and deal them out: split to numbers, in the order to write them."""
    if not (val_fraction > 0 and holdout_fraction >= 0 and val_fraction + holdout_fraction < 1):
        raise UsageError(
            f"val_fraction={val_fraction}, holdout_fraction={holdout_fraction}: val must be above "
            f"0, holdout not below it, and both together below 1"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_documents)
    num_val = round(num_documents * val_fraction)
    num_holdout = round(num_documents * holdout_fraction)
    if not num_val or num_val + num_holdout >= num_documents:
        raise DataError(
            f"{num_documents} documents leave {num_val} for val and "
            f"{num_documents - num_val - num_holdout} for train at val_fraction={val_fraction}, "
            f"holdout_fraction={holdout_fraction}; raise the fractions or bring more documents"
        )
    return {
        "val": order[:num_val],
        "holdout": order[num_val : num_val + num_holdout],
        "train": order[num_val + num_holdout :],
    }

"""Does validation text occur in what is trained on?

Works on encoded documents. Identical documents in two splits are refused. Near duplicates are
counted by shingles, the hashes of all runs of 50 tokens, and reported in the manifest: news
agencies and licence texts repeat themselves, and whether that matters is the user's call.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from trainer.errors import DataError

SHINGLE_TOKENS = 50
_NEAR_FRACTION = 0.5
# Any odd multiplier serves: it has an inverse modulo 2**64, and numpy's uint64 wraps there.
_BASE = 0x9E3779B97F4A7C15
_BASE_INVERSE = pow(_BASE, -1, 2**64)


def measure_overlap(
    splits: Mapping[str, Iterable[int]],
    tokens_of: Callable[[int], np.ndarray],
    where: Callable[[int], str],
) -> dict[str, int]:
    """Hold val against train and holdout; DataError names two identical documents.

    `splits` gives the documents of each split, `tokens_of` a document's tokens, `where` its file
    and line.
    """
    _refuse_identical(splits, tokens_of, where)
    per_document = [np.unique(shingles(tokens_of(number))) for number in splits["val"]]
    val = np.unique(np.concatenate(per_document)) if per_document else np.empty(0, np.uint64)
    is_met = np.zeros(len(val), dtype=bool)
    for split in ("train", "holdout"):
        for number in splits[split]:
            is_met |= _members(val, shingles(tokens_of(number)))
    met_shares = [
        is_met[np.searchsorted(val, document)].mean() for document in per_document if document.size
    ]
    return {
        "identical_documents": 0,
        "near_duplicate_val_documents": sum(bool(share >= _NEAR_FRACTION) for share in met_shares),
        "val_documents": len(per_document),
        "val_shingles": len(val),
        "val_shingles_met": int(is_met.sum()),
        "shingle_tokens": SHINGLE_TOKENS,
    }


def shingles(tokens: np.ndarray) -> np.ndarray:
    """Hash every run of SHINGLE_TOKENS tokens to a uint64; equal runs hash alike anywhere.

    A polynomial hash by prefix sums: the sum over a run, divided by the power at its start.
    """
    num_runs = len(tokens) - SHINGLE_TOKENS + 1
    if num_runs < 1:
        return np.empty(0, dtype=np.uint64)
    powers = _powers(_BASE, len(tokens))
    sums = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    return (sums[SHINGLE_TOKENS:] - sums[:num_runs]) * _powers(_BASE_INVERSE, num_runs)


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def _members(sorted_values: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Which of the sorted values occur among the candidates."""
    met = np.zeros(len(sorted_values), dtype=bool)
    if len(sorted_values) and len(candidates):
        at = np.minimum(np.searchsorted(sorted_values, candidates), len(sorted_values) - 1)
        met[at[sorted_values[at] == candidates]] = True
    return met


def _refuse_identical(
    splits: Mapping[str, Iterable[int]],
    tokens_of: Callable[[int], np.ndarray],
    where: Callable[[int], str],
) -> None:
    owner: dict[bytes, tuple[str, int]] = {}
    for split in ("val", "holdout", "train"):
        for number in splits[split]:
            key = hashlib.blake2b(tokens_of(number).tobytes(), digest_size=16).digest()
            known_split, known = owner.get(key, (split, number))
            if known_split != split:
                raise DataError(
                    f"{where(number)}: the same tokens as {where(known)}, one in {split} and one "
                    f"in {known_split}; remove one of them"
                )
            if split != "train":
                owner[key] = split, number

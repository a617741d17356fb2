"""Shards on disk: the file format, a split as one stream of tokens, and a whole dataset.

A shard is 256 little-endian int32 (magic, version, token count, zeros) and then the tokens as
little-endian uint16. Source: techniques.md 1.1. Which sequences a training reads from a stream is
`trainer.data.loader`'s business; how shards come to be is `prepare`'s and `fetch`'s.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from trainer.data.manifest import SPLITS, Manifest, Shard, SplitName, read_manifest
from trainer.errors import DataError, UsageError
from trainer.protocol import SHARD_HEADER_BYTES, SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION
from trainer.runtime import files

_AGAIN = "prepare or fetch it again"


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write token ids, a one-dimensional integer array, as one shard; atomic."""
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{path}: tokens must be one row of integers, got {tokens.dtype}")
    if not 0 < tokens.size < 2**31:
        raise DataError(f"{path}: a shard holds 1 to 2**31 - 1 tokens, got {tokens.size:,}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 0xFFFF:
        raise DataError(f"{path}: token id {low if low < 0 else high} does not fit in 16 bits")
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    files.write_bytes(path, header.tobytes() + tokens.astype("<u2").tobytes())


def open_shard(path: Path) -> np.memmap:
    """Map a shard's tokens as uint16, once its header and size have been checked."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(SHARD_HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {_AGAIN}") from error
    if len(head) < SHARD_HEADER_BYTES:
        raise DataError(
            f"{path}: truncated: {size:,} bytes, a shard's header alone has "
            f"{SHARD_HEADER_BYTES:,}; {_AGAIN}"
        )
    magic, version, num_tokens = (int(x) for x in np.frombuffer(head, dtype="<i4", count=3))
    if magic != SHARD_MAGIC:
        raise DataError(f"{path}: not a shard: magic {magic}, expected {SHARD_MAGIC}; {_AGAIN}")
    if version != SHARD_VERSION:
        raise DataError(f"{path}: shard version {version}, expected {SHARD_VERSION}; {_AGAIN}")
    if num_tokens < 1:
        raise DataError(f"{path}: header says {num_tokens} tokens; {_AGAIN}")
    expected = SHARD_HEADER_BYTES + 2 * num_tokens
    if size != expected:
        raise DataError(
            f"{path}: {'truncated' if size < expected else 'too long'}: header says "
            f"{num_tokens:,} tokens ({expected:,} bytes), file has {size:,} bytes; {_AGAIN}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(num_tokens,))


class TokenStream:
    """The shards of a split in name order, as one stream that is read without loading it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._shards = [open_shard(path) for path in sorted(paths, key=lambda path: path.name)]
        self._ends = list(accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy tokens [start, stop) as uint16, across shard borders."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {len(self)}")
        tokens = np.empty(stop - start, dtype=np.uint16)
        position = start
        index = bisect_right(self._ends, start)
        while position < stop:
            begin = self._ends[index] - len(self._shards[index])
            until = min(stop, self._ends[index])
            part = self._shards[index][position - begin : until - begin]
            tokens[position - start : until - start] = part
            position, index = until, index + 1
        return tokens

    def chunks(self, size: int, overlap: int = 0) -> Iterator[np.ndarray]:
        """Walk the stream in pieces of `size` tokens, each with the `overlap` that follow it."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size + overlap, len(self)))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A folder of shards, checked against its manifest by `load_dataset`."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def digest(self) -> str:
        """`sha256:…` over the content; the same wherever the folder lies."""
        return self.manifest.digest

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.manifest.tokenizer.file

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    def num_tokens(self, split: SplitName) -> int:
        return self.manifest.splits[split].tokens

    def num_documents(self, split: SplitName) -> int:
        """Documents that begin in the split, counted by their BOS."""
        return self.manifest.splits[split].documents

    def num_bytes(self, split: SplitName) -> int:
        """Bytes of text that the targets of the split's stream stand for."""
        return self.manifest.splits[split].bytes

    def stream(self, split: SplitName) -> TokenStream:
        """Open a split: train, holdout or val."""
        if split not in SPLITS:
            raise UsageError(f"{self.folder}: no split {split!r}; use one of {', '.join(SPLITS)}")
        shards = self.manifest.splits[split].shards
        if not shards:
            raise DataError(
                f"{self.folder}: the {split} split is empty; prepare or fetch the dataset with one"
            )
        return TokenStream([self.folder / shard.file for shard in shards])


def load_dataset(folder: Path, *, verify: bool = False) -> Dataset:
    """Open a dataset; every listed file must be there at its size, and with `verify` its sha256."""
    manifest = read_manifest(folder)
    tokenizer = folder / manifest.tokenizer.file
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: no such file; {_AGAIN}")
    if verify:
        _check_sha256(tokenizer, manifest.tokenizer.sha256)
    for split in SPLITS:
        for shard in manifest.splits[split].shards:
            _check_shard(folder / shard.file, shard)
            if verify:
                _check_sha256(folder / shard.file, shard.sha256)
    return Dataset(folder=folder, manifest=manifest)


def describe_shard(path: Path) -> Shard:
    """Check a shard file and give its manifest entry."""
    return Shard(
        file=path.name,
        tokens=len(open_shard(path)),
        size=path.stat().st_size,
        sha256=files.sha256_file(path),
    )


def _check_shard(path: Path, shard: Shard) -> None:
    num_tokens = len(open_shard(path))
    if num_tokens != shard.tokens:
        raise DataError(
            f"{path}: {num_tokens:,} tokens, the manifest says {shard.tokens:,}; {_AGAIN}"
        )


def _check_sha256(path: Path, expected: str) -> None:
    found = files.sha256_file(path)
    if found != expected:
        raise DataError(
            f"{path}: changed or corrupted: sha256 {found[:12]}…, the manifest says "
            f"{expected[:12]}…; {_AGAIN}"
        )

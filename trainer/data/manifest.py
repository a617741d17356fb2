"""What a folder of shards says about itself: `manifest.json`, and the digest that pins it.

The digest covers content only (which split, file name, size and sha256 of every shard, and the
tokenizer's sha256), so it does not change with the folder's place or the manifest's formatting.
Reading checks the manifest against itself; `trainer.data.shards` checks it against the files.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trainer.codec import dump, fingerprint, parse
from trainer.errors import DataError, UsageError
from trainer.protocol import SHARD_HEADER_BYTES
from trainer.runtime import files
from trainer.specs.base import require, spec

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
SplitName = Literal["train", "holdout", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "holdout", "val")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@spec
class Shard:
    """One shard file and what it must hash to."""

    file: str
    size: int
    sha256: str
    tokens: int

    def __post_init__(self) -> None:
        require(
            _NAME.fullmatch(self.file) is not None, f"file={self.file!r} is not a plain file name"
        )
        expected = SHARD_HEADER_BYTES + 2 * self.tokens
        require(self.size == expected, f"{self.file}: size={self.size} should be {expected}")


@spec
class Split:
    """The shards of a split, in stream order by name, and its totals.

    `bytes` is what the targets of the stream decode to, the denominator of bits per byte.
    `raw_bytes` is the source text before normalisation, absent where that is not known.
    """

    shards: tuple[Shard, ...]
    tokens: int
    documents: int
    bytes: int
    raw_bytes: int | None = None

    def __post_init__(self) -> None:
        total = sum(shard.tokens for shard in self.shards)
        require(self.tokens == total, f"tokens={self.tokens}, but the shards hold {total}")
        names = [shard.file for shard in self.shards]
        require(names == sorted(set(names)), "the shards are not in name order")


@spec
class Tokenizer:
    """The SentencePiece model that lies beside the shards."""

    file: Literal["tokenizer.model"] = TOKENIZER_FILE
    sha256: str
    vocab_size: int


@spec
class Manifest:
    """Everything known about a prepared or fetched dataset."""

    version: Literal[1] = 1
    name: str
    tokenizer: Tokenizer
    splits: dict[SplitName, Split]
    settings: dict[str, Any]
    sources: tuple[dict[str, Any], ...] = ()
    overlap: dict[str, int] | None = None
    digest: str

    def __post_init__(self) -> None:
        missing = [split for split in SPLITS if split not in self.splits]
        require(not missing, f"splits: {missing} missing")
        expected = content_digest(self.tokenizer, self.splits)
        require(
            self.digest == expected,
            f"digest={self.digest} does not follow from the files listed ({expected})",
        )


def content_digest(tokenizer: Tokenizer, splits: Mapping[SplitName, Split]) -> str:
    """Digest what a training can see of a dataset: `sha256:` and 64 hexadecimal digits."""
    shards = sorted(
        [split, shard.file, shard.size, shard.sha256]
        for split, content in splits.items()
        for shard in content.shards
    )
    return f"sha256:{fingerprint({'tokenizer': tokenizer.sha256, 'shards': shards})}"


def check_name(name: str) -> str:
    """Return a dataset name that is fit to be a folder's; UsageError otherwise."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name!r}: not a dataset name; use letters, digits, dot, dash and underscore"
        )
    return name


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`; DataError names the file and the fault."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; make the dataset with `fairway data prepare` or "
            f"`fairway data fetch`"
        )
    data = files.read_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object; prepare or fetch the dataset again")
    try:
        return parse(Manifest, data, str(path))
    except UsageError as error:
        fault = str(error).splitlines()[0]
        raise DataError(f"{fault}; prepare or fetch the dataset again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` atomically; it is the last file of a dataset to be written."""
    files.write_json(folder / MANIFEST_FILE, dump(manifest))

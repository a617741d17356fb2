"""The dataset of a run sheet: every file with its size and sha256, every split with its totals."""

import re
from typing import Literal

from trainer.data.manifest import SPLITS
from trainer.data.shards import Dataset
from trainer.specs.base import require, spec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,255}")


def require_plain(**names: str | None) -> None:
    """Raise ValueError for a name of a file or folder that leads out of where it belongs."""
    for field, name in names.items():
        require(
            name is None or _NAME.fullmatch(name) is not None,
            f"{field}={name!r} is no plain name",
        )


@spec
class DataFile:
    """One shard."""

    split: Literal["train", "holdout", "val"]
    name: str
    bytes: int
    sha256: str
    tokens: int

    def __post_init__(self) -> None:
        require_plain(name=self.name)


@spec
class DataSplit:
    """A split's totals. documents: its BOS tokens. bytes: what its targets decode to."""

    name: Literal["train", "holdout", "val"]
    tokens: int
    documents: int
    bytes: int


@spec
class SheetData:
    """The dataset that was trained and scored on."""

    name: str
    digest: str
    tokenizer_sha256: str
    vocab_size: int
    files: tuple[DataFile, ...]
    splits: tuple[DataSplit, ...]

    def __post_init__(self) -> None:
        require_plain(name=self.name)


def describe_data(dataset: Dataset) -> SheetData:
    """Everything that a dataset's manifest says of its content."""
    manifest = dataset.manifest
    return SheetData(
        name=dataset.name,
        digest=dataset.digest,
        tokenizer_sha256=manifest.tokenizer.sha256,
        vocab_size=dataset.vocab_size,
        files=tuple(
            DataFile(
                split=split, name=shard.file, bytes=shard.size, sha256=shard.sha256,
                tokens=shard.tokens,
            )
            for split in SPLITS
            for shard in manifest.splits[split].shards
        ),
        splits=tuple(
            DataSplit(
                name=split,
                tokens=dataset.num_tokens(split),
                documents=dataset.num_documents(split),
                bytes=dataset.num_bytes(split),
            )
            for split in SPLITS
        ),
    )  # fmt: skip

"""The published FineWeb exports: their shards and tokenizer, fetched into a dataset folder.

An export is a Hugging Face dataset repository: `ROOT/manifest.json` lists `datasets` (name, path,
tokenizer_name, stats.files_train, stats.files_val, stats.tokens_val) and `tokenizers` (name,
model_path). A dataset entry may carry `sha256: {file: digest}`, a tokenizer entry `sha256`; the
public ones carry none, and a shard is then checked by its header and size. The remote manifest is
read anew every time. Source of the layout: techniques.md 1.1 and parameter-golf data/README.md.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.bytecount import ByteTable, count_stream
from trainer.data.download import Patience, download, read_small
from trainer.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    Split,
    SplitName,
    Tokenizer,
    check_name,
    content_digest,
    write_manifest,
)
from trainer.data.shards import Dataset, TokenStream, describe_shard, load_dataset, open_shard
from trainer.data.staging import locked
from trainer.data.tokenizer import open_tokenizer
from trainer.errors import DataError, UsageError
from trainer.runtime import files

_REPOS = {
    "sp1024": "willdepueoai/parameter-golf",
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}
_MAX_MANIFEST_BYTES = 1 << 24
# Called with a file's name, the bytes that are there and the bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an export is published. `repo` follows from the variant unless given."""

    base_url: str = "https://huggingface.co"
    repo: str | None = None
    root: str = "datasets"
    patience: Patience = field(default_factory=Patience)

    def url(self, variant: str, path: str) -> str:
        """The address of a file of the export."""
        repo = self.repo or _REPOS.get(variant)
        if repo is None:
            raise UsageError(
                f"variant {variant!r}: known are {', '.join(_REPOS)}; for another give --repo"
            )
        return f"{self.base_url.rstrip('/')}/datasets/{repo}/resolve/main/{self.root}/{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Export:
    """What the remote manifest says about one variant."""

    name: str
    path: str
    model_path: str
    num_train: int
    num_val: int
    tokens_val: int | None
    sha256: Mapping[str, str]


def fetch(
    variant: str,
    out: Path,
    *,
    train_shards: int = 80,
    holdout: bool = True,
    origin: Origin = Origin(),
    progress: Progress | None = None,
) -> Dataset:
    """Fetch all val shards and the first train shards of an export; only what is missing travels.

    With `holdout` the last of the train shards becomes the holdout split. BackendError if the
    server cannot be reached, DataError if it serves broken files.
    """
    check_name(out.name)
    export = _read_export(variant, origin)
    fewest = 2 if holdout else 1
    if not fewest <= train_shards <= export.num_train:
        raise UsageError(
            f"--train-shards {train_shards}: {export.name} has {export.num_train}; use {fewest} to "
            f"{export.num_train}{', one of them is for the holdout' if holdout else ''}"
        )
    names: dict[SplitName, list[str]] = {
        "val": [f"fineweb_val_{i:06d}.bin" for i in range(export.num_val)],
        "train": [f"fineweb_train_{i:06d}.bin" for i in range(train_shards)],
        "holdout": [],
    }
    remote = {name: f"{export.path}/{name}" for split in names.values() for name in split}
    if holdout:
        names["holdout"] = [names["train"].pop()]
    with locked(out):
        out.mkdir(exist_ok=True)
        for name, path in {TOKENIZER_FILE: export.model_path, **remote}.items():
            check = _checker(name, export.sha256.get(name))
            _fetch_file(origin.url(variant, path), out / name, check, origin.patience, progress)
        _write_manifest(out, export, names)
        return load_dataset(out)


def _checker(name: str, sha256: str | None) -> Callable[[Path], None]:
    """What a fetched file must pass: its checksum if one is published, and its own format."""

    def check(path: Path) -> None:
        if sha256 is not None and files.sha256_file(path) != sha256:
            raise DataError(f"{path}: sha256 is not the published {sha256[:12]}…; fetch it again")
        if name == TOKENIZER_FILE:
            open_tokenizer(path)
        else:
            open_shard(path)

    return check


def _fetch_file(
    url: str,
    path: Path,
    check: Callable[[Path], None],
    patience: Patience,
    progress: Progress | None,
) -> None:
    report = progress or (lambda name, done, total: None)
    if path.exists():
        try:
            check(path)
        except DataError:
            # Its successor is another file than the one the dataset's manifest vouches for.
            path.with_name(MANIFEST_FILE).unlink(missing_ok=True)
        else:
            report(path.name, path.stat().st_size, path.stat().st_size)
            return
    download(url, path, check, patience, lambda done, total: report(path.name, done, total))


def _write_manifest(out: Path, export: _Export, names: Mapping[SplitName, Sequence[str]]) -> None:
    tokenizer = open_tokenizer(out / TOKENIZER_FILE)
    table = ByteTable.build(tokenizer)
    splits: dict[SplitName, Split] = {
        split: _count_split(out, members, table) for split, members in names.items()
    }
    if export.tokens_val not in (None, splits["val"].tokens):
        raise DataError(
            f"{out / names['val'][0]}: val holds {splits['val'].tokens:,} tokens, the published "
            f"manifest says {export.tokens_val:,}; remove the val shards and fetch again"
        )
    entry = Tokenizer(
        sha256=files.sha256_file(out / TOKENIZER_FILE), vocab_size=tokenizer.vocab_size()
    )
    write_manifest(
        out,
        Manifest(
            name=out.name,
            tokenizer=entry,
            splits=splits,
            settings={"export": export.name, "holdout_shards": len(names["holdout"])},
            digest=content_digest(entry, splits),
        ),
    )


def _count_split(out: Path, names: Sequence[str], table: ByteTable) -> Split:
    shards = tuple(describe_shard(out / name) for name in names)
    if not shards:
        return Split(shards=(), tokens=0, documents=0, bytes=0)
    stream = TokenStream([out / name for name in names])
    num_documents, num_bytes = count_stream(stream, table, out / names[0])
    return Split(shards=shards, tokens=len(stream), documents=num_documents, bytes=num_bytes)


def _read_export(variant: str, origin: Origin) -> _Export:
    url = origin.url(variant, MANIFEST_FILE)
    try:
        remote = json.loads(read_small(url, origin.patience, _MAX_MANIFEST_BYTES))
        wanted = f"fineweb10B_{variant}"
        dataset = _named(remote["datasets"], wanted)
        tokenizer = _named(remote["tokenizers"], dataset["tokenizer_name"])
        sha256 = dict(dataset.get("sha256") or {})
        if tokenizer.get("sha256"):
            sha256[TOKENIZER_FILE] = tokenizer["sha256"]
        if int(dataset["stats"]["files_val"]) < 1:
            raise ValueError(f"{wanted} has no val shards")
        return _Export(
            name=wanted,
            path=str(dataset.get("path") or f"datasets/{wanted}"),
            model_path=str(tokenizer["model_path"]),
            num_train=int(dataset["stats"]["files_train"]),
            num_val=int(dataset["stats"]["files_val"]),
            tokens_val=dataset["stats"].get("tokens_val"),
            sha256=sha256,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{url}: does not list {variant} as a FineWeb export does "
            f"({type(error).__name__}: {error}); check the variant, --repo and --base-url"
        ) from error


def _named(entries: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    for entry in entries:
        if entry["name"] == name:
            return entry
    known = ", ".join(str(entry["name"]) for entry in entries)
    raise ValueError(f"no {name!r} among {known or 'none'}")

"""`fairway data`: prepare, fetch, ls, verify.

Thin: arguments in, `trainer.data` does the work, results on stdout, progress on stderr (a bar on
a terminal, one key=value line per stage otherwise). Errors pass through to `service.cli`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from service.cli_options import HOME, Home
from service.paths import Paths
from trainer.data.bytecount import verify_dataset
from trainer.data.fetch import Origin, fetch
from trainer.data.manifest import SPLITS, check_name
from trainer.data.prepare import EMBEDDED_NAME, Settings, prepare, prepare_embedded
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import DataError, UsageError

app = typer.Typer(help="Prepare, fetch and check training data.", no_args_is_help=True)

Output = Annotated[
    Literal["table", "json"], typer.Option("-o", "--output", help="How to print the result.")
]
Report = Callable[[str, int, int], None]


@app.command("prepare")
def prepare_command(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="Text (blank lines between documents) or .jsonl; .xz and .gz too."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The dataset's name.")] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Use the small text that ships with Fairway.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A SentencePiece model to encode with.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Train a tokenizer of this many pieces.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents.")] = 0.03,
    holdout_fraction: Annotated[float, typer.Option(help="Share of the documents.")] = 0.03,
    shard_tokens: Annotated[int, typer.Option(help="Tokens in a shard.")] = 100_000_000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle by document.")] = 1337,
    home: Home = HOME,
) -> None:
    """Turn text into shards: deduplicate, split by document, tokenize, count the bytes."""
    if embedded:
        _announce("prepare", prepare_embedded(Paths(home).data(EMBEDDED_NAME)))
        return
    if not sources or name is None:
        raise UsageError("fairway data prepare: give text files and --name, or --embedded")
    settings = Settings(
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        holdout_fraction=holdout_fraction,
        shard_tokens=shard_tokens,
        seed=seed,
    )
    with _progress("prepare") as report:
        dataset = prepare(
            sources,
            Paths(home).data(check_name(name)),
            settings,
            tokenizer=tokenizer,
            progress=lambda done, total: report("documents", done, total),
        )
    _announce("prepare", dataset)


@app.command("fetch")
def fetch_command(
    variant: Annotated[str, typer.Argument(help="sp1024, sp4096 or sp8192.")] = "sp1024",
    train_shards: Annotated[int, typer.Option(help="Train shards of 100 M tokens.")] = 80,
    holdout: Annotated[bool, typer.Option(help="Make the last train shard the holdout.")] = True,
    name: Annotated[
        str | None, typer.Option(help="The dataset's name; fineweb10B_VARIANT by default.")
    ] = None,
    base_url: Annotated[str, typer.Option(help="The server, or a mirror of it.")] = (
        Origin().base_url
    ),
    repo: Annotated[str | None, typer.Option(help="OWNER/NAME of another export.")] = None,
    home: Home = HOME,
) -> None:
    """Fetch a published FineWeb export; run again, it continues where it stopped."""
    out = Paths(home).data(check_name(name or f"fineweb10B_{variant}"))
    with _progress("fetch") as report:
        dataset = fetch(
            variant,
            out,
            train_shards=train_shards,
            holdout=holdout,
            origin=Origin(base_url=base_url, repo=repo),
            progress=report,
        )
    _announce("fetch", dataset)


@app.command("ls")
def ls_command(home: Home = HOME, output: Output = "table") -> None:
    """List the datasets of a home, with what is wrong with the broken ones."""
    root = Paths(home).data(EMBEDDED_NAME).parent
    folders = sorted(root.iterdir()) if root.is_dir() else []
    rows = [_row(f) for f in folders if f.is_dir() and not f.name.startswith(".")]
    if output == "json":
        typer.echo(json.dumps(rows, indent=1))
        return
    header = ["name", "state", "vocab", *(f"{s}_tokens" for s in SPLITS), "val_bytes", "digest"]
    cells = [header, *([str(cell) for cell in _cells(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(map(str.ljust, line, widths)).rstrip())


@app.command("verify")
def verify_command(
    name: Annotated[str, typer.Argument(help="A dataset's name, as in `fairway data ls`.")],
    home: Home = HOME,
) -> None:
    """Check every file's sha256, recount tokens and bytes, and decode val and holdout."""
    dataset = load_dataset(Paths(home).data(check_name(name)), verify=True)
    verify_dataset(dataset)
    _announce("verify", dataset)


@contextmanager
def _progress(verb: str) -> Iterator[Report]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield (
            lambda item, done, total: (
                _say(f"stage={verb} item={item} total={total}") if done >= total else None
            )
        )
        return
    with Progress(console=console) as bars:
        tasks: dict[str, Any] = {}

        def report(item: str, done: int, total: int) -> None:
            if item not in tasks:
                tasks[item] = bars.add_task(item)
            bars.update(tasks[item], completed=done, total=total)

        yield report


def _announce(verb: str, dataset: Dataset) -> None:
    counts = " ".join(f"{split}_tokens={dataset.num_tokens(split)}" for split in SPLITS)
    _say(f"stage={verb} state=done name={dataset.name} {counts} folder={dataset.folder}")
    typer.echo(dataset.digest)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _row(folder: Path) -> dict[str, Any]:
    try:
        dataset = load_dataset(folder)
    except DataError as error:
        return {"name": folder.name, "folder": str(folder), "state": "broken", "fault": str(error)}
    return {
        "name": folder.name,
        "folder": str(folder),
        "state": "ready",
        "digest": dataset.digest,
        "vocab_size": dataset.vocab_size,
        "tokens": {split: dataset.num_tokens(split) for split in SPLITS},
        "documents": {split: dataset.num_documents(split) for split in SPLITS},
        "bytes": {split: dataset.num_bytes(split) for split in SPLITS},
    }


def _cells(row: dict[str, Any]) -> list[Any]:
    if row["state"] == "broken":
        return [row["name"], "broken", *["-"] * (2 + len(SPLITS)), row["fault"]]
    tokens = [row["tokens"][split] for split in SPLITS]
    digest = row["digest"][: len("sha256:") + 12]
    return [row["name"], "ready", row["vocab_size"], *tokens, row["bytes"]["val"], digest]

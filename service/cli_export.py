"""`fairway export` and `fairway verify`: a result leaves the house, and is held to its claims.

Thin: arguments in, `service.export` writes, `service.verify` compares, data on stdout. Exit 3
where a claim does not hold, with one line for each.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.cli_options import HOME, Home, Output, print_document
from service.paths import Paths
from service.talk import Talk
from trainer.errors import InfeasibleError

app = typer.Typer()


@app.command("export")
def export_command(
    final: Annotated[
        str,
        typer.Argument(
            help="A final's id or a unique start of it, or a sweep: its best, or the "
            "configuration that it confirmed."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder for the record.")],
    author: Annotated[str | None, typer.Option(help="Your name, as the record gives it.")] = None,
    github: Annotated[str | None, typer.Option(help="Your name on GitHub.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The record's title; default: the sweep.")
    ] = None,
    blurb: Annotated[
        str | None, typer.Option(help="What it is, in a line or two; default: the point.")
    ] = None,
    date: Annotated[
        str | None, typer.Option(help="YYYY-MM-DD; default: of the last score.")
    ] = None,
    seeds: Annotated[
        Literal["all", "one"],
        typer.Option(help="Every seed of the configuration, or this final's alone, and say so."),
    ] = "all",
    home: Home = HOME,
    output: Annotated[
        Literal["table", "json", "yaml"], typer.Option("--output", help="How to print the data.")
    ] = "table",
) -> None:
    """Write a record folder: README, submission.json, logs, weights, and one file of code."""
    from service.export import Given, export

    given = Given(author=author, github_id=github, name=name, blurb=blurb, date=date)
    record = export(Paths(home), final, out, given, seeds)
    document: dict[str, Any] = {
        "folder": str(out),
        "seeds": [entry.seed for entry in record.entries],
        "val_bpb": {entry.seed: entry.sheet.result.val_bpb for entry in record.entries},
        "bytes_total": record.bytes_total,
        "bytes_code": record.code_bytes,
        "seeds_left_out": dict(record.left_out),
        "files": record.file_names,
    }
    print_document(document, output)
    if author is None or github is None:
        Talk().say("warning", submission="author or github_id is null; give --author and --github")


@app.command("verify")
def verify_command(
    record: Annotated[Path, typer.Argument(help="A record folder, as `fairway export` writes it.")],
    data: Annotated[
        Path | None,
        typer.Option(help="The folder of the dataset; default: the one in the home that it names."),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Run its train_gpt.py even if it is not what its recipe "
            "makes: only for a folder whose author you trust.",
        ),
    ] = False,
    home: Home = HOME,
    output: Output = "table",
) -> None:
    """Recount, decode and score a record in a clean process, and compare every claim. Exit 3 with
    one line for each that does not hold."""
    from service.clean_room import CleanRoom
    from service.record_folder import open_folder
    from service.verify import verify

    found = verify(
        open_folder(record),
        lambda sheet: _dataset(Paths(home), data, sheet),
        CleanRoom(dict(os.environ)),
        trusts=trust,
    )
    document = {
        "verified": not found.mismatches,
        "seeds": list(found.seeds),
        "val_bpb": found.scored,
        "network": found.network,
        "mismatches": [asdict(each) for each in found.mismatches],
        "notes": list(found.notes),
    }
    if output != "table":
        print_document(document, output)
    else:
        for each in found.mismatches:
            sys.stdout.write(f"{each.line()}\n")
        if not found.mismatches:
            scored = ", ".join(f"seed {seed} {bpb:.8f}" for seed, bpb in found.scored.items())
            sys.stdout.write(f"verified: {scored} ({found.network})\n")
    for note in found.notes:
        Talk().say("note", record=note)
    if found.mismatches:
        sys.stdout.flush()
        count = len(found.mismatches)
        held = "1 claim does" if count == 1 else f"{count} claims do"
        raise InfeasibleError(f"{record}: {held} not hold")


def _dataset(paths: Paths, folder: Path | None, sheet: Any) -> Any:
    """The dataset that is given, or the home's of the sheet's digest."""
    from service.replay_checks import require_data
    from trainer.data.shards import load_dataset

    return load_dataset(folder or require_data(sheet, paths.home / "data"))

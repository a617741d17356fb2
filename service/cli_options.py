"""What the verbs share: their common flags, and how they print data."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.codec import to_yaml

HOME = Path(".fairway")
Home = Annotated[
    Path, typer.Option("--home", envvar="FAIRWAY_HOME", help="Where Fairway keeps its files.")
]
Output = Annotated[
    Literal["table", "json", "yaml"], typer.Option("-o", "--output", help="How to print the data.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("-S", metavar="PATH=VALUE", help="Set a value of the spec.")
]
SweepFile = Annotated[Path, typer.Argument(help="A sweep file (YAML), or a shipped sweep's name.")]
SweepRef = Annotated[
    str | None, typer.Argument(help="Sweep id, a unique start of it, or its name; default: newest.")
]


def print_document(document: Any, output: str) -> None:
    """Write data to stdout as JSON, or as YAML where `table` or `yaml` is asked for."""
    text = json.dumps(document, indent=1) + "\n" if output == "json" else to_yaml(document)
    sys.stdout.write(text)


def print_rows(rows: list[dict[str, Any]], output: str) -> None:
    """Write rows of one shape: as a table whose last column wraps, or as `print_document` does."""
    if output != "table":
        print_document(rows, output)
        return
    table = Table(box=None)
    *facts, text = rows[0] if rows else [""]
    for name in facts:
        table.add_column(name, no_wrap=True)
    table.add_column(text, overflow="fold")
    for row in rows:
        cells = (f"{v:,}" if isinstance(v, int) else str(v) for v in row.values())
        table.add_row(*map(Text, cells))  # what somebody else wrote is no markup
    # One line a row into a pipe or a log.
    Console(width=None if sys.stdout.isatty() else 200).print(table)

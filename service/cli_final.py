"""`fairway quantize` and `fairway fit`: an artifact from a bank, without a sweep.

Thin: arguments in, `service.finals` does the work, results on stdout. Errors pass through to
`service.cli`.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from service.cli_options import HOME, Home, print_document
from service.paths import Paths

app = typer.Typer()

BankRef = Annotated[
    str, typer.Argument(metavar="BANK", help="A training's id, or the folder of an import.")
]
Entry = Annotated[str | None, typer.Option(help="Which entry of the bank: raw, ema-0.997, swa.")]
RecipeName = Annotated[
    str | None, typer.Option(help="The recipe whose final is meant; default: the import's own.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-S", metavar="PATH=VALUE", help="Set a value of the final: final.…"),
]
TrainTokens = Annotated[
    Path | None,
    typer.Option(help="Training ids to measure on, a .npy or a shard; default: the bank's data."),
]
Data = Annotated[
    str | None, typer.Option(help="The dataset of the model; default: what it was trained on.")
]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="What the model computes in.")]


@app.command()
def quantize(
    bank: BankRef,
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder for the artifact.")],
    overrides: Overrides = None,
    entry: Entry = None,
    recipe: RecipeName = None,
    data: Data = None,
    train_tokens: TrainTokens = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model of an import.")
    ] = None,
    dtype: Dtype = "float32",
    home: Home = HOME,
    output: Annotated[
        Literal["table", "json", "yaml"], typer.Option("--output", help="How to print the data.")
    ] = "table",
) -> None:
    """Prune, quantize and write a bank entry as an artifact; show what each tensor cost."""
    from service.banks import Wanted
    from service.finals import quantize_bank

    wanted = Wanted(
        bank, entry, recipe, tuple(overrides or ()), data, train_tokens, tokenizer, dtype
    )
    document = quantize_bank(Paths(home), wanted, out)
    if output == "table":
        _print_tensors(document.pop("tensors"), document["weights_bytes"])
    print_document(document, output)


@app.command()
def fit(
    bank: BankRef,
    cap: Annotated[int, typer.Option(min=1, help="Bytes that the artifact may have at most.")],
    overrides: Overrides = None,
    entry: Entry = None,
    recipe: RecipeName = None,
    data: Data = None,
    train_tokens: TrainTokens = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Score these ids: a .npy or a shard. Nothing is chosen by.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model that made the tokens.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first so many targets.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window reads.")] = None,
    stride: Annotated[int | None, typer.Option(help="Predictions a later window scores.")] = None,
    variant: Annotated[
        Literal["A", "C"] | None, typer.Option(help="C scores each prediction once; A is old logs.")
    ] = None,
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder for a copy; it stays in the home.")
    ] = None,
    home: Home = HOME,
    output: Annotated[
        Literal["table", "json", "yaml"],
        typer.Option("-o", "--output", help="How to print the data."),
    ] = "table",
) -> None:
    """Choose clips, bits, pruning and coder so that the artifact fills a cap with the least loss.

    Exit 3, with the smallest size reached, where no artifact is so small.
    """
    from service.banks import Wanted
    from service.finals import fit_bank
    from service.rescore import Asked
    from service.scored_text import Source

    wanted = Wanted(
        bank, entry, recipe, tuple(overrides or ()), data, train_tokens, tokenizer, dtype
    )
    plain = {"window": window, "stride": stride, "variant": variant}
    given = tuple((name, value) for name, value in plain.items() if value is not None)
    named = (None, tokens, tokenizer) if tokens is not None else (data, None, None)
    source = Source(*named, limit)
    asked = Asked(evaluate=given, dtype=dtype)
    print_document(fit_bank(Paths(home), wanted, cap, source, asked, out), output)


_COLUMNS = (
    "tensor", "bits", "method", "bytes", "share", "mse", "hessian error", "damping", "seconds",
)  # fmt: skip


def _print_tensors(records: Sequence[Mapping[str, Any]], weights_bytes: int) -> None:
    """A line a tensor and one for the header: in colour on a terminal, whole lines elsewhere."""
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, no_wrap=True, justify="left" if name == "tensor" else "right")
    rest = weights_bytes - sum(record["bytes"] for record in records)
    for record in records:
        table.add_row(*_cells(record, weights_bytes))
    table.add_row("header and rest", "", "", f"{rest:,}", f"{rest / weights_bytes:.2%}")
    console = Console()
    if not console.is_terminal:
        console = Console(file=io.StringIO(), width=200)
    console.print(table)
    if isinstance(console.file, io.StringIO):
        lines = console.file.getvalue().splitlines()
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in lines))


def _cells(record: Mapping[str, Any], weights_bytes: int) -> list[str]:
    output, nearest = record.get("hessian_error"), record.get("nearest_hessian_error")
    saved = f" ({output / nearest - 1:+.0%})" if output is not None and nearest else ""
    return [
        record["name"],
        str(record["bits"]),
        record["method"],
        f"{record['bytes']:,}",
        f"{record['bytes'] / weights_bytes:.2%}",
        f"{record['mse']:.3g}",
        "" if output is None else f"{output:.3g}{saved}",
        f"{record['damping']:g}" if record.get("damping") is not None else "",
        f"{record['seconds']:.2f}",
    ]

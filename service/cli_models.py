"""`fairway import` and `fairway score`: models on disk, brought in and scored.

Thin: arguments in, the importer and the scorer do the work, results on stdout. Errors pass
through to `service.cli`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.paths import Paths
from trainer.codec import parse, parse_assignment, to_yaml, with_values
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

app = typer.Typer()

Home = Annotated[
    Path, typer.Option("--home", envvar="FAIRWAY_HOME", help="Where Fairway keeps its files.")
]
Output = Annotated[
    Literal["table", "json", "yaml"], typer.Option("-o", "--output", help="How to print the data.")
]
_HOME = Path(".fairway")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="A state dict or quantized file, also compressed.")],
    recipe: Annotated[str, typer.Option(help="The recipe that fits it: a shipped name or a file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder for what is imported.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("-S", metavar="PATH=VALUE", help="Set a value of the recipe."),
    ] = None,
) -> None:
    """Bring in a file of the public scripts: a state dict as a bank, a quantized one as it is."""
    values = [parse_assignment(text) for text in overrides or []]
    # What a final keeps as float16 is no part of the model: its layers must not stop an import.
    data = with_values(load_recipe(recipe, "--recipe"), [("final.quantize.float16_keys", [])])
    parsed = parse(Recipe, with_values(data, values), recipe)
    from trainer.importer.folder import import_file
    from trainer.importer.unseen import line

    imported = import_file(file, parsed, out)
    sys.stdout.write(to_yaml(asdict(imported)))
    sys.stderr.write(f"{line(imported.assumed)}\n")


@app.command()
def score(
    artifact: Annotated[
        str, typer.Argument(help="A final's id, or the folder of an artifact or an import.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="The dataset whose val split is scored; default, but for an import: embedded."
        ),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Score these ids instead: a .npy or a shard.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model that made --tokens.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Score only the first so many targets; variant A counts their tail again."
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window reads.")] = None,
    stride: Annotated[int | None, typer.Option(help="Predictions a later window scores.")] = None,
    variant: Annotated[
        Literal["A", "C"] | None, typer.Option(help="C scores each prediction once; A is old logs.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="What the model computes in.")
    ] = "float32",
    home: Home = _HOME,
    output: Output = "table",
) -> None:
    """Score a model on disk again; a final is scored as it was unless told otherwise."""
    from service.rescore import Source, rescore

    asked = {"window": window, "stride": stride, "variant": variant}
    given = {name: value for name, value in asked.items() if value is not None}
    source = Source(data, tokens, tokenizer, limit)
    _print(rescore(Paths(home), artifact, source, given, dtype), output)


def _print(document: dict[str, Any], output: str) -> None:
    text = json.dumps(document, indent=1) + "\n" if output == "json" else to_yaml(document)
    sys.stdout.write(text)

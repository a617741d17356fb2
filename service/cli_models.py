"""`fairway import` and `fairway score`: models and records on disk, brought in and scored.

Thin: arguments in, the importers and the scorer do the work, results on stdout. Errors pass
through to `service.cli`.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.cli_options import HOME, Home, Output, print_document
from service.paths import Paths
from trainer.codec import dump, parse, parse_assignment, to_yaml, with_values
from trainer.errors import UsageError
from trainer.runtime.files import write_text
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

app = typer.Typer()


@app.command("import")
def import_command(
    file: Annotated[
        Path,
        typer.Argument(help="A state dict or quantized file, also compressed; or a record folder."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="A new folder for what is imported; of a record: a new YAML file."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="The recipe that fits the file: a shipped name or a file of your own."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-S", metavar="PATH=VALUE", help="Set a value of the recipe."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of a record whose logs do not say it: tokens that were scored."),
    ] = None,
) -> None:
    """Bring in what others made: a state dict as a bank, a quantized file, a record as a baseline.

    A record's README, submission.json and logs are held against one another; where they disagree,
    the baseline says so.
    """
    if file.is_dir():
        if recipe is not None or overrides:
            raise UsageError(f"{file}: a record folder takes no --recipe and no -S")
        _import_record(file, out, tokens)
        return
    if recipe is None:
        raise UsageError(f"{file}: name the recipe that fits it with --recipe")
    if tokens is not None:
        raise UsageError(f"{file}: --tokens goes with a record folder")
    values = [parse_assignment(text) for text in overrides or []]
    parsed = _recipe(recipe, values)
    from trainer.importer.folder import import_file
    from trainer.importer.unseen import line

    imported = import_file(file, parsed, out)
    sys.stdout.write(to_yaml(asdict(imported)))
    sys.stderr.write(f"{line(imported.assumed)}\n")


def _import_record(folder: Path, out: Path, tokens: int | None) -> None:
    """Write a published record folder as a baseline file, with what its papers disagree on."""
    from service.published import read_published
    from service.record_folder import open_folder

    if out.suffix not in (".yaml", ".yml") or out.exists():
        raise UsageError(f"-o {out}: name a new file that ends in .yaml")
    text = to_yaml(dump(read_published(open_folder(folder), tokens)))
    write_text(out, text)
    sys.stdout.write(text)


Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A final's or training's id; the folder or file of an artifact, an import or a bank; "
        "or, with --recipe, a public script's file."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="The dataset whose val split is scored; default, but for an import: embedded."
    ),
]
Tokens = Annotated[Path | None, typer.Option(help="Score these ids instead: a .npy or a shard.")]
Tokenizer = Annotated[Path | None, typer.Option(help="The SentencePiece model that made --tokens.")]
Limit = Annotated[
    int | None,
    typer.Option(help="Score only the first so many targets; variant A counts their tail again."),
]
Window = Annotated[int | None, typer.Option(help="Tokens a window reads.")]
Stride = Annotated[int | None, typer.Option(help="Predictions a later window scores.")]
Variant = Annotated[
    Literal["A", "C"] | None, typer.Option(help="C scores each prediction once; A is old logs.")
]
Documents = Annotated[
    bool, typer.Option("--documents", help="Keep documents apart: no context crosses a BOS.")
]
ScoreOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "-S",
        metavar="PATH=VALUE",
        help="Set a value of the evaluation, such as evaluate.ttt.kind=sgd, or of --recipe.",
    ),
]
ItsRecipe = Annotated[str | None, typer.Option(help="The recipe that fits a public script's file.")]
Entry = Annotated[str | None, typer.Option(help="Which entry of a training's bank.")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="What the model computes in.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes that share the work, one a GPU where there are any.")
]
Budget = Annotated[
    float | None, typer.Option(help="Measure, and pick the best evaluation that takes no longer.")
]


@app.command()
def score(
    checkpoint: Checkpoint,
    data: Data = None,
    tokens: Tokens = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    window: Window = None,
    stride: Stride = None,
    variant: Variant = None,
    documents: Documents = False,
    overrides: ScoreOverrides = None,
    recipe: ItsRecipe = None,
    entry: Entry = None,
    dtype: Dtype = "float32",
    workers: Workers = 1,
    budget_seconds: Budget = None,
    home: Home = HOME,
    output: Output = "table",
) -> None:
    """Score a model on disk again; a final by the windows that it was scored with, unless told.

    A score that was cut short goes on where it was when the same command runs again.
    """
    values = [parse_assignment(text) for text in overrides or []]
    of_evaluation = [(path, value) for path, value in values if _is_of_evaluation(path)]
    of_recipe = [(path, value) for path, value in values if not _is_of_evaluation(path)]
    if of_recipe and recipe is None:
        raise UsageError(
            f"-S {of_recipe[0][0]}: only evaluate.… is set here, or a --recipe's value"
        )
    plain = {"window": window, "stride": stride, "variant": variant}
    given = [(f"evaluate.{name}", value) for name, value in plain.items() if value is not None]
    given += [("evaluate.documents", {})] if documents else []
    from service.rescore import Asked, Source, rescore

    asked = Asked(
        evaluate=tuple((path.partition(".")[2], value) for path, value in given + of_evaluation),
        recipe=None if recipe is None else _recipe(recipe, of_recipe),
        entry=entry,
        dtype=dtype,
        workers=workers,
        budget_s=budget_seconds,
    )
    source = Source(data, tokens, tokenizer, limit)
    print_document(rescore(Paths(home), checkpoint, source, asked), output)


def _is_of_evaluation(path: str) -> bool:
    return path.startswith("evaluate.")


def _recipe(name: str, values: list[tuple[str, Any]]) -> Recipe:
    """Read a recipe that fits a public script's file."""
    # What a final keeps as float16 is no part of the model: its layers must not stop an import.
    data = with_values(load_recipe(name, "--recipe"), [("final.quantize.float16_keys", [])])
    return parse(Recipe, with_values(data, values), name)

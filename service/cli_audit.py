"""`fairway audit`: the rules of a finished final, or the liveness checks of a recipe.

Thin: arguments in, rules on stdout, a failed rule as an error (exit 3).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.paths import Paths
from trainer.codec import dump, parse, parse_assignment, with_values
from trainer.errors import DataError, InfeasibleError, UsageError
from trainer.results import Rule
from trainer.runtime.files import read_json
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

AUDIT_FILE = "audit.json"


def audit(
    subject: Annotated[
        str, typer.Argument(help="A final's id or folder; a recipe with --liveness.")
    ],
    liveness: Annotated[
        bool, typer.Option("--liveness", help="Check that every part of a recipe acts.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-S", metavar="PATH=VALUE", help="Set a value of the recipe."),
    ] = None,
    home: Annotated[
        Path, typer.Option("--home", envvar="FAIRWAY_HOME", help="Where Fairway keeps its files.")
    ] = Path(".fairway"),
    output: Annotated[
        Literal["table", "json"], typer.Option("-o", "--output", help="How to print the rules.")
    ] = "table",
) -> None:
    """Print the audit rules of a final, or check a recipe's parts. Exit 3 if a rule fails."""
    if overrides and not liveness:
        raise UsageError("-S: a finished final is audited as it is; -S goes with --liveness")
    rules = _liveness(subject, overrides or []) if liveness else _finished(Paths(home), subject)
    if output == "json":
        sys.stdout.write(json.dumps(dump(rules), indent=1) + "\n")
    else:
        width = max(len(rule.id) for rule in rules)
        for rule in rules:
            sys.stdout.write(f"{rule.verdict:<11}  {rule.id:<{width}}  {rule.detail}\n")
    _raise_failed(subject, rules)


def _liveness(name: str, overrides: list[str]) -> tuple[Rule, ...]:
    data = load_recipe(name, "fairway audit")
    recipe = parse(Recipe, with_values(data, map(parse_assignment, overrides)), name)
    from trainer.liveness.check import check_recipe

    return check_recipe(recipe)


def _finished(paths: Paths, ref: str) -> tuple[Rule, ...]:
    from service.rescore import model_of

    artifact, _ = model_of(paths, ref)
    # A folder may be given as the final's or as the artifact's within it.
    files = [folder / AUDIT_FILE for folder in (artifact, artifact.parent)]
    for file in files:
        if file.is_file():
            return _rules(file)
    raise UsageError(
        f"{artifact}: no {AUDIT_FILE} there or beside it; give a final's id or its folder, or a "
        "recipe with --liveness"
    )


def _rules(file: Path) -> tuple[Rule, ...]:
    rules = read_json(file)
    fix = f"remove {file.parent} and run its sweep again"
    if not isinstance(rules, list) or not rules:
        raise DataError(f"{file}: expected a list of rules; {fix}")
    try:
        return tuple(parse(Rule, rule, str(file)) for rule in rules)
    except UsageError as error:
        raise DataError(f"{str(error).partition(chr(10))[0]}; {fix}") from error


def _raise_failed(subject: str, rules: tuple[Rule, ...]) -> None:
    failed = [rule for rule in rules if rule.verdict == "fail"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InfeasibleError(f"{subject}: audit {failed[0].id}: {failed[0].detail}{more}")

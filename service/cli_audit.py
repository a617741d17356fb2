"""`fairway audit`: the rules of a finished final, probed again, or the liveness checks of a recipe.

Thin: arguments in, rules on stdout, a failed rule as an error (exit 3).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.cli_options import HOME, Home
from service.paths import Paths
from trainer.codec import dump, parse, parse_assignment, with_values
from trainer.errors import DataError, InfeasibleError, UsageError
from trainer.evaluate.profiles import PROBED, Profile, is_legal, judge, merge, not_checked
from trainer.results import Rule
from trainer.runtime.files import read_json
from trainer.specs.recipe import Recipe
from trainer.specs.task import FinalTask
from tune_spaces.catalogue import load_recipe

AUDIT_FILE = "audit.json"
PROBE_TOKENS = 128

app = typer.Typer()


@app.command()
def audit(
    subject: Annotated[
        str, typer.Argument(help="A final's id or folder; a recipe with --liveness.")
    ],
    liveness: Annotated[
        bool, typer.Option("--liveness", help="Check that every part of a recipe acts.")
    ] = False,
    profile: Annotated[
        Profile, typer.Option(help="How to read what is contested or was not checked.")
    ] = "community",
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe", help="Run the final's evaluation on altered texts as well."
        ),
    ] = True,
    limit: Annotated[
        int, typer.Option(metavar="TOKENS", help="Length of the probes' text.")
    ] = PROBE_TOKENS,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-S", metavar="PATH=VALUE", help="Set a value of the recipe."),
    ] = None,
    home: Home = HOME,
    output: Annotated[
        Literal["table", "json"], typer.Option("-o", "--output", help="How to print the rules.")
    ] = "table",
) -> None:
    """Audit a final by its rules, or check a recipe's parts. Exit 3 if a rule fails."""
    if liveness:
        if (profile, probe, limit) != ("community", True, PROBE_TOKENS):
            raise UsageError("--profile, --probe and --limit: they audit a final; drop --liveness")
        rules = _liveness(subject, overrides or [])
        document = dump(rules)
    else:
        if overrides:
            raise UsageError("-S: a finished final is audited as it is; -S goes with --liveness")
        rules = judge(_of_final(Paths(home), subject, limit if probe else None), profile)
        document = {"profile": profile, "legal": is_legal(rules), "rules": dump(rules)}
    if output == "json":
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
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


def _of_final(paths: Paths, ref: str, probe_tokens: int | None) -> tuple[Rule, ...]:
    """Read what was recorded of a final, and probe it on so many tokens where that is asked."""
    from service.rescore import model_of

    artifact, final = model_of(paths, ref)
    # A folder may be given as the final's or as the artifact's within it.
    folders = [artifact, artifact.parent] if final is None else [final]
    folder = next((each for each in folders if (each / AUDIT_FILE).is_file()), None)
    if folder is None:
        raise UsageError(
            f"{folders[0]}: no {AUDIT_FILE} there or beside it; give a final's id or its folder, "
            "or a recipe with --liveness"
        )
    recorded = _rules(folder / AUDIT_FILE)
    if probe_tokens is None:
        return recorded
    return merge(recorded, _probed(folder, artifact, probe_tokens))


def _probed(final: Path, artifact: Path, num_tokens: int) -> tuple[Rule, ...]:
    """Probe a final's evaluation with its artifact; every rule is `not checked` where one of the
    two is not there to be run."""
    from trainer.evaluate.probes.check import check_final
    from trainer.finalize.artifact import read_weights
    from trainer.finalize.pipeline import WEIGHTS_FILE

    inside = [folder / WEIGHTS_FILE for folder in (artifact, artifact / "artifact")]
    weights = next((path for path in inside if path.is_file()), None)
    if weights is None:
        return tuple(not_checked(name, f"{inside[0]}: no such file to run") for name in PROBED)
    path = final / "task.json"
    try:
        task = parse(FinalTask, read_json(path), str(path))
    except DataError:
        raise
    except UsageError:
        why = f"{path}: made by another version of the spec"
        return tuple(not_checked(name, why) for name in PROBED)
    model, state, _ = read_weights(weights)
    return check_final(model, state, task.evaluate, num_tokens)


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

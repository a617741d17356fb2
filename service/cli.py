"""Verbs to functions. Exit codes live here and nowhere else.

0 done · 1 a run failed · 2 usage, spec or preflight (nothing spent) · 3 nothing feasible or legal
4 budget or deadline · 5 server, cluster or tracking out of reach · 130 interrupted.
Data goes to stdout, talk to stderr. Ray, torch and MLflow are imported by the verbs that run.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service import (
    cli_audit,
    cli_data,
    cli_doctor,
    cli_export,
    cli_final,
    cli_models,
    cli_remote,
    cli_replay,
    cli_results,
    cli_serve,
    cli_verdicts,
    report,
)
from service.budget import seconds_per_step
from service.catalogue_view import data_of, plan_document, recipe_rows
from service.cli_options import HOME, Home, Output, Overrides, SweepFile, print_document, print_rows
from service.cli_results import draw_report, show_end, show_tracking
from service.control import INTERRUPTS, answer_signals
from service.identity import inputs_of, sweep_id
from service.ledger import SweepView, replay
from service.paths import Paths
from service.plan import make_plan
from service.plan_view import print_tree, tree_document
from service.preflight import require_ready
from service.specs import SweepSpec
from service.states import State
from service.sweep import load_sweep
from service.talk import Talk
from trainer.codec import json_schema
from trainer.errors import BudgetError, FairwayError, InfeasibleError, UsageError
from trainer.runtime.environment import prepare_for_ray
from trainer.specs.recipe import Recipe

app = typer.Typer(
    help="Sweeps for language models that must fit in a byte budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_audit.app)
app.add_typer(cli_doctor.app)
app.add_typer(cli_export.app)
app.add_typer(cli_final.app)
app.add_typer(cli_verdicts.app)
app.add_typer(cli_verdicts.baseline_app, name="baseline")
app.add_typer(cli_remote.app)
app.add_typer(cli_replay.app)
app.add_typer(cli_results.app)
app.add_typer(cli_serve.app)
app.add_typer(cli_serve.token_app, name="token")
app.add_typer(cli_serve.quota_app, name="quota")
app.add_typer(cli_models.app)  # without a name: its verbs are verbs of `fairway`


@app.command()
def validate(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    home: Home = HOME,
    output: Output = "table",
) -> None:
    """Check a sweep and show what it would run. Nothing is started."""
    source, sweep = _load(sweep_file, overrides)
    dataset = data_of(Paths(home), sweep.data)
    plan = make_plan(sweep, inputs_of(dataset), source)
    print_document(plan_document(sweep, plan), output)


@app.command("plan")
def plan_command(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="What a step takes; default: as measured by this sweep so far."
        ),
    ] = None,
    home: Home = HOME,
    output: Output = "table",
) -> None:
    """Show which steps a sweep shares between trainings, and what that saves."""
    source, sweep = _load(sweep_file, overrides)
    paths = Paths(home)
    inputs = inputs_of(data_of(paths, sweep.data))
    ledger = paths.sweep(sweep_id(sweep, inputs)).ledger
    if step_seconds is None and ledger.is_file():
        step_seconds = seconds_per_step(replay(ledger))
    plan = make_plan(sweep, inputs, source, seconds_per_step=step_seconds)
    document = tree_document(sweep, plan, step_seconds)
    if output == "table":
        print_tree(sweep, plan, document)
    else:
        print_document(document, output)


@app.command()
def run(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    home: Home = HOME,
    num_cpus: Annotated[
        int | None, typer.Option(help="CPUs that a Ray of our own may use; default: all.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; default: one of our own."),
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow; default: a file in the home."),
    ] = None,
    no_tracking: Annotated[
        bool,
        typer.Option("--no-tracking", help="Leave MLflow to `fairway sync`, or to the service."),
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option("--expect", hidden=True, help="Refuse any other than what was queued."),
    ] = None,
    output: Output = "table",
) -> None:
    """Run a sweep in the foreground, or what is left of it: run again to go on."""
    since = time.time()
    source, sweep = _load(sweep_file, overrides)
    paths = Paths(home)
    dataset = data_of(paths, sweep.data)
    inputs = inputs_of(dataset)
    plan = make_plan(sweep, inputs, source)  # finds every fault before Ray starts
    _check_expected(plan.sweep_id, expect)
    prepare_for_ray()
    from service.cluster import Where
    from service.follower import Follower
    from service.launch import Site
    from service.search import Setting, run_sweep
    from service.tracking import default_uri

    talk = Talk()
    for check in require_ready(sweep, paths, dataset, plan, is_local=address is None):
        talk.say("warning", check=check.line())
    site = Site(paths, dataset, Where(address, num_cpus))
    setting = Setting(sweep, plan, inputs, source, site, since)
    folder = paths.sweep(plan.sweep_id)
    uri = tracking_uri or default_uri(paths)
    after = replay(folder.ledger).events if folder.ledger.is_file() else 0
    follows = nullcontext() if no_tracking else Follower(paths, plan.sweep_id, uri, after)
    with _interruptible(plan.sweep_id), follows as follower:
        view = run_sweep(setting, talk)
        draw_report(view, paths, talk)
        try:
            if follower is not None:
                follower.finish()
        finally:
            show_end(view, paths, talk, output)
            if follower is not None:
                show_tracking(view, paths, talk, is_embedded=tracking_uri is None)
    _exit_by(view)


def _check_expected(sweep_id: str, expected: str | None) -> None:
    """The service waits for the ledger of the sweep that it queued, and of no other."""
    if expected not in (None, sweep_id):
        raise UsageError(
            f"this submission is sweep {sweep_id} by now (code, data or a recipe has changed); "
            "submit it again"
        )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    output: Output = "table",
) -> None:
    """List the shipped recipes, or show one with everything it extends."""
    rows = recipe_rows(name)
    if name is None:
        print_rows(rows, output)
    else:
        print_document(rows, output)


@app.command()
def schema(
    of: Annotated[Literal["sweep", "recipe"], typer.Argument()] = "sweep",
) -> None:
    """Print the JSON Schema of a sweep file or of a recipe."""
    print_document(json_schema(SweepSpec if of == "sweep" else Recipe), "json")


class Interrupted(FairwayError):
    """Ctrl-C, SIGTERM, or somebody's order: what is finished is kept."""

    exit_code = 130

    def __init__(self, sweep: str, reason: object) -> None:
        super().__init__(f"sweep {sweep}: {reason}; run the same command again to go on")


@contextmanager
def _interruptible(sweep: str) -> Iterator[None]:
    answer_signals()
    try:
        yield
    except INTERRUPTS as error:
        reason = str(error) if isinstance(error, KeyboardInterrupt) else ""
        raise Interrupted(sweep, reason or "interrupted") from error


def _load(sweep_file: Path, overrides: list[str] | None) -> tuple[str, Any]:
    from tune_spaces.catalogue import find

    path = find("sweeps", str(sweep_file), "fairway")
    return str(path), load_sweep(path, overrides or [])


def _exit_by(view: SweepView) -> None:
    codes = {State.SUCCEEDED: 0, State.INFEASIBLE: 3, State.ILLEGAL: 3}
    code = codes.get(view.state, 1)
    if view.order is not None:
        raise Interrupted(view.started["sweep_id"], view.reason)
    if view.state == State.STOPPED:
        raise BudgetError(
            f"sweep {view.started['sweep_id']}: {view.reason}; raise it and run the "
            "same command to go on"
        )
    if code == 3:
        report.best_document(view, {})  # raises, with the nearest miss
    gate = None if view.verdict is None else view.verdict["gate"]
    if code == 0 and gate is not None and gate["verdict"] != "passed":
        raise InfeasibleError(f"sweep {view.started['sweep_id']}: {gate['reason']}")
    if code:
        raise typer.Exit(code)


def main() -> None:
    """The console script: one line on stderr and the right code for every foreseen error."""
    try:
        app()
    except FairwayError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)

"""Verbs to functions. Exit codes live here and nowhere else.

0 done · 1 a run failed · 2 usage, spec or preflight (nothing spent) · 3 nothing feasible or legal
4 budget or deadline · 5 server, cluster or tracking out of reach · 130 interrupted.
Data goes to stdout, talk to stderr. Ray, torch and MLflow are imported by the verbs that run.
"""

import json
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from service import (
    cli_audit,
    cli_data,
    cli_doctor,
    cli_final,
    cli_models,
    cli_verdicts,
    report,
)
from service.budget import seconds_per_step
from service.catalogue_view import data_of, plan_document, recipe_rows
from service.identity import inputs_of, sweep_id
from service.knobs import dead_knobs
from service.labels import short_value
from service.ledger import SweepView, is_held, replay
from service.paths import Paths, find_sweep
from service.plan import make_plan
from service.plan_view import print_tree, tree_document
from service.preflight import require_ready
from service.specs import SweepSpec
from service.states import State
from service.sweep import load_sweep
from service.talk import Talk
from trainer.codec import json_schema, to_yaml
from trainer.errors import BudgetError, FairwayError, InfeasibleError
from trainer.runtime.environment import prepare_for_ray
from trainer.runtime.files import read_json
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
app.add_typer(cli_final.app)
app.add_typer(cli_verdicts.app)
app.add_typer(cli_verdicts.baseline_app, name="baseline")
app.add_typer(cli_models.app)  # without a name: its verbs are verbs of `fairway`

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
_HOME = Path(".fairway")


@app.command()
def validate(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    home: Home = _HOME,
    output: Output = "table",
) -> None:
    """Check a sweep and show what it would run. Nothing is started."""
    source, sweep = _load(sweep_file, overrides)
    dataset = data_of(Paths(home), sweep.data)
    plan = make_plan(sweep, inputs_of(dataset), source)
    _print(plan_document(sweep, plan), output)


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
    home: Home = _HOME,
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
        _print(document, output)


@app.command()
def run(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    home: Home = _HOME,
    num_cpus: Annotated[
        int | None, typer.Option(help="CPUs that a Ray of our own may use; default: all.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; default: one of our own."),
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI", help="MLflow; default: a SQLite file in the home."
        ),
    ] = None,
    output: Output = "table",
) -> None:
    """Run a sweep in the foreground, or what is left of it: run again to go on."""
    source, sweep = _load(sweep_file, overrides)
    paths = Paths(home)
    dataset = data_of(paths, sweep.data)
    inputs = inputs_of(dataset)
    plan = make_plan(sweep, inputs, source)  # finds every fault before Ray starts
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
    setting = Setting(sweep, plan, inputs, source, site)
    folder = paths.sweep(plan.sweep_id)
    uri = tracking_uri or default_uri(paths)
    after = replay(folder.ledger).events if folder.ledger.is_file() else 0
    with _interruptible(), Follower(paths, plan.sweep_id, uri, after) as follower:
        view = run_sweep(setting, talk)
        _write_report(view, paths, talk)
        try:
            follower.finish()
        finally:
            _show_end(view, paths, talk, output)
            _show_tracking(view, paths, talk, is_embedded=tracking_uri is None)
    _exit_by(view)


@app.command()
def status(sweep: SweepRef = None, home: Home = _HOME, output: Output = "table") -> None:
    """Say how far a sweep is."""
    view = _view(Paths(home), sweep)
    if output == "table":
        _print_finals(view)
    _print(report.status_document(view), output)


@app.command()
def best(sweep: SweepRef = None, home: Home = _HOME, output: Output = "table") -> None:
    """Name the best final that is feasible and legal. Exit 3 if there is none."""
    paths = Paths(home)
    view = _view(paths, sweep)
    run_ids = _tracking(paths, view).get("run_ids", {})
    _print(report.best_document(view, run_ids, paths.home), output)


@app.command("report")
def report_command(
    sweep: SweepRef = None,
    home: Home = _HOME,
    output: Output = "table",
    open_page: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Draw the table and the plots of a sweep again."""
    paths, talk = Paths(home), Talk()
    view = _view(paths, sweep)
    page = _write_report(view, paths, talk)
    if output == "table":
        _print_finals(view)
    else:
        _print(report.table_records(view), output)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


@app.command()
def sync(
    sweep: SweepRef = None,
    home: Home = _HOME,
    tracking_uri: Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI")] = None,
) -> None:
    """Write a sweep's ledger to MLflow again. Doing it twice changes nothing."""
    from service import tracking

    paths = Paths(home)
    view = _view(paths, sweep)
    uri = tracking_uri or tracking.default_uri(paths)
    projection = tracking.sync(paths, view.started["sweep_id"], uri)
    Talk().say("synced", runs=len(projection.run_ids), link=projection.link)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    output: Output = "table",
) -> None:
    """List the shipped recipes, or show one with everything it extends."""
    _print(recipe_rows(name), "yaml" if name and output == "table" else output)


@app.command()
def schema(
    of: Annotated[Literal["sweep", "recipe"], typer.Argument()] = "sweep",
) -> None:
    """Print the JSON Schema of a sweep file or of a recipe."""
    _print(json_schema(SweepSpec if of == "sweep" else Recipe), "json")


class Interrupted(FairwayError):
    """Ctrl-C: what is finished is kept."""

    exit_code = 130


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; run the same command again to go on") from error


def _load(sweep_file: Path, overrides: list[str] | None) -> tuple[str, Any]:
    from tune_spaces.catalogue import find

    path = find("sweeps", str(sweep_file), "fairway")
    return str(path), load_sweep(path, overrides or [])


def _view(paths: Paths, ref: str | None) -> SweepView:
    ledger = find_sweep(paths, ref).ledger
    view = replay(ledger)
    if view.state == State.RUNNING and not is_held(ledger):
        view.state = State.LOST
        view.running.clear()
    return view


def _tracking(paths: Paths, view: SweepView) -> dict[str, Any]:
    path = paths.sweep(view.started["sweep_id"]).tracking
    return read_json(path) if path.is_file() else {}


def _write_report(view: SweepView, paths: Paths, talk: Talk) -> Path:
    from service.plots import write_report

    files = write_report(view, paths.sweep(view.started["sweep_id"]).report)
    for path in files.files():
        talk.say("written", file=path)
    return files.html


def _show_end(view: SweepView, paths: Paths, talk: Talk, output: str) -> None:
    """The table, what was counted, and the best."""
    if output == "table":
        _print_finals(view)
    else:
        _print(report.status_document(view), output)
    counts = report.status_document(view)
    talk.say(
        "counted",
        trainings=counts["trainings"]["done"],
        finals=counts["finals"]["done"],
        infeasible=counts["finals"]["infeasible"],
        cache_hits=counts["cache_hits"],
        trained_steps=counts["trained_steps"],
    )
    for found in dead_knobs(view):
        values = ",".join(map(short_value, found.values))
        identical = f"{found.identical} of {found.compared}"
        talk.say("dead_knob", knob=found.knob, values=values, identical=identical)
    top = report.best(view)
    if top is not None:
        sys.stdout.flush()
        talk.say(
            "best",
            final=top["final"],
            bpb=top["result"]["score"]["val_bpb"],
            bytes=top["result"]["artifact_bytes"],
            untrained_bpb=_untrained_bpb(view),
        )


def _show_tracking(view: SweepView, paths: Paths, talk: Talk, *, is_embedded: bool) -> None:
    """How to open MLflow at this sweep; the embedded store has to be served first."""
    from service.tracking import ui_command

    link = _tracking(paths, view).get("link")
    if not link:
        return
    say = talk.console.print
    if is_embedded:
        say("To compare the runs in MLflow, start its page and open the link:", markup=False)
        say(f"  {ui_command(paths)}", soft_wrap=True, markup=False)
    else:
        say("To compare the runs in MLflow, open the link:", markup=False)
    say(f"  {link}", soft_wrap=True, markup=False)


def _print_finals(view: SweepView) -> None:
    """In colour on a terminal; plain, and whatever the width, into a pipe or a log."""
    console = Console()
    if console.is_terminal:
        console.print(report.summary_table(view))
    else:
        sys.stdout.write(report.text_table(view))


def _untrained_bpb(view: SweepView) -> float | None:
    results = [training["result"] for training in view.trainings.values() if training["result"]]
    return results[0]["untrained_val_bpb"] if results else None


def _exit_by(view: SweepView) -> None:
    codes = {State.SUCCEEDED: 0, State.INFEASIBLE: 3, State.ILLEGAL: 3}
    code = codes.get(view.state, 1)
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


def _print(data: Any, output: str) -> None:
    if output == "json":
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    elif output == "yaml" or isinstance(data, dict):
        sys.stdout.write(to_yaml(data))
    else:
        from rich.table import Table

        *facts, text = data[0]
        table = Table(box=None)
        for name in facts:
            table.add_column(name, no_wrap=True)
        table.add_column(text, overflow="fold")
        for row in data:
            table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
        # One line a row into a pipe or a log.
        Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    """The console script: one line on stderr and the right code for every foreseen error."""
    try:
        app()
    except FairwayError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)

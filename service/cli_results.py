"""`fairway status`, `best`, `report` and `sync`: what a sweep in the home came to."""

import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from service import report
from service.cli_options import HOME, Home, Output, SweepRef, print_document
from service.knobs import dead_knobs
from service.labels import short_value
from service.ledger import SweepView, is_held, replay
from service.paths import Paths, find_sweep
from service.states import State
from service.talk import Talk
from trainer.runtime.files import read_json

app = typer.Typer()


@app.command()
def status(sweep: SweepRef = None, home: Home = HOME, output: Output = "table") -> None:
    """Say how far a sweep is."""
    view = view_of(Paths(home), sweep)
    if output == "table":
        print_finals(view)
    print_document(report.status_document(view), output)


@app.command()
def best(sweep: SweepRef = None, home: Home = HOME, output: Output = "table") -> None:
    """Name the best final that is feasible and legal. Exit 3 if there is none."""
    paths = Paths(home)
    view = view_of(paths, sweep)
    run_ids = _tracking(paths, view).get("run_ids", {})
    print_document(report.best_document(view, run_ids, paths.home), output)


@app.command("report")
def report_command(
    sweep: SweepRef = None,
    home: Home = HOME,
    output: Output = "table",
    open_page: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Draw the table and the plots of a sweep again."""
    paths, talk = Paths(home), Talk()
    view = view_of(paths, sweep)
    page = draw_report(view, paths, talk)
    if output == "table":
        print_finals(view)
    else:
        print_document(report.table_records(view), output)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


@app.command()
def sync(
    sweep: SweepRef = None,
    home: Home = HOME,
    tracking_uri: Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI")] = None,
) -> None:
    """Write a sweep's ledger to MLflow again. Doing it twice changes nothing."""
    from service import tracking

    paths = Paths(home)
    view = view_of(paths, sweep)
    uri = tracking_uri or tracking.default_uri(paths)
    projection = tracking.sync(paths, view.started["sweep_id"], uri)
    Talk().say("synced", runs=len(projection.run_ids), link=projection.link)


def view_of(paths: Paths, ref: str | None) -> SweepView:
    """Replay a sweep's ledger; a sweep that is under way but that nobody writes is lost."""
    ledger = find_sweep(paths, ref).ledger
    view = replay(ledger)
    if view.state == State.RUNNING and not is_held(ledger):
        view.state = State.LOST
        view.running.clear()
    return view


def _tracking(paths: Paths, view: SweepView) -> dict[str, Any]:
    path = paths.sweep(view.started["sweep_id"]).tracking
    return read_json(path) if path.is_file() else {}


def draw_report(view: SweepView, paths: Paths, talk: Talk) -> Path:
    """Write a sweep's report and say where; return the page."""
    from service.plots import write_report

    files = write_report(view, paths.sweep(view.started["sweep_id"]).report)
    for path in files.files():
        talk.say("written", file=path)
    return files.html


def show_end(view: SweepView, paths: Paths, talk: Talk, output: str) -> None:
    """The table, what was counted, and the best."""
    if output == "table":
        print_finals(view)
    else:
        print_document(report.status_document(view), output)
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


def show_tracking(view: SweepView, paths: Paths, talk: Talk, *, is_embedded: bool) -> None:
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


def print_finals(view: SweepView) -> None:
    """In colour on a terminal; plain, and whatever the width, into a pipe or a log."""
    console = Console()
    if console.is_terminal:
        console.print(report.summary_table(view))
    else:
        sys.stdout.write(report.text_table(view))


def _untrained_bpb(view: SweepView) -> float | None:
    results = [training["result"] for training in view.trainings.values() if training["result"]]
    return results[0]["untrained_val_bpb"] if results else None

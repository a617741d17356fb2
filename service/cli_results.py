"""`fairway status`, `best`, `report` and `sync`: what a sweep in the home came to."""

import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from service import report
from service.cli_options import HOME, Home, Output, SweepRef, print_document
from service.cli_remote import Server, Token, chosen_server, newest_or, show_status
from service.client import Client
from service.knobs import dead_knobs
from service.labels import short_value
from service.ledger import SweepView, is_held, replay
from service.paths import Paths, find_sweep
from service.states import State
from service.talk import Talk
from trainer.errors import UsageError
from trainer.runtime.files import read_json, write_text

app = typer.Typer()


@app.command()
def status(
    context: typer.Context,
    sweep: SweepRef = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it until it ends; the exit code is the sweep's.")
    ] = False,
    home: Home = HOME,
    server: Server = None,
    token: Token = None,
    output: Output = "table",
) -> None:
    """Say how far a sweep is: one of this home, or of the service that is named."""
    server = chosen_server(context, server)
    if server is not None:
        show_status(sweep, server, token, output, is_watched=watch)
        return
    if watch:
        raise UsageError("--watch: shows a sweep of a service; name it with --server")
    view = view_of(Paths(home), sweep)
    if output == "table":
        print_finals(view)
    print_document(report.status_document(view), output)


@app.command()
def best(
    context: typer.Context,
    sweep: SweepRef = None,
    home: Home = HOME,
    server: Server = None,
    token: Token = None,
    output: Output = "table",
) -> None:
    """Name the best final that is feasible and legal. Exit 3 if there is none."""
    server = chosen_server(context, server)
    if server is not None:
        with Client(server, token) as client:
            print_document(client.best(newest_or(sweep, client)), output)
        return
    paths = Paths(home)
    view = view_of(paths, sweep)
    run_ids = _tracking(paths, view).get("run_ids", {})
    print_document(report.best_document(view, run_ids, paths.home), output)


@app.command("report")
def report_command(
    context: typer.Context,
    sweep: SweepRef = None,
    home: Home = HOME,
    server: Server = None,
    token: Token = None,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="table|json|yaml|FILE.html",
            help="How to print the finals, or where to write the report, one file.",
        ),
    ] = "table",
    open_page: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Draw the table and the plots of a sweep again, of this home or of the service named."""
    file = _page_file(output)
    server = chosen_server(context, server)
    if open_page and server is not None and file is None:
        raise UsageError("--open: say where to write the service's report with -o FILE.html")
    if server is not None:
        with Client(server, token) as client:
            page = _remote_report(newest_or(sweep, client), client, output, file)
    else:
        page = _local_report(sweep, Paths(home), output, file)
    if open_page and page is not None:
        webbrowser.open(page.resolve().as_uri())


def _page_file(output: str) -> Path | None:
    """The file that -o names, None where it names a way to print."""
    if output in ("table", "json", "yaml"):
        return None
    file = Path(output)
    if file.suffix.lower() != ".html" or file.is_dir():
        raise UsageError(f"-o {output}: write table, json, yaml, or a file that ends in .html")
    return file


def _local_report(sweep: str | None, paths: Paths, output: str, file: Path | None) -> Path:
    view, talk = view_of(paths, sweep), Talk()
    if file is not None:
        from service.report_page import report_html

        return _write_page(file, report_html(view, paths))
    page = draw_report(view, paths, talk)
    if output == "table":
        print_finals(view)
    else:
        print_document(report.table_records(view), output)
    return page


def _remote_report(sweep: str, client: Client, output: str, file: Path | None) -> Path | None:
    if file is not None:
        return _write_page(file, client.report(sweep))
    print_document([*client.finals(sweep)], output)
    return None


def _write_page(file: Path, page: str) -> Path:
    try:
        write_text(file, page)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; name a file that can be written") from error
    Talk().say("written", file=file)
    return file


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

    files = write_report(view, paths.sweep(view.started["sweep_id"]).report, paths)
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

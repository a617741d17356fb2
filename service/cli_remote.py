"""`fairway submit`, `ls`, `logs`, `pause`, `resume`, `stop`, `cancel`: sweeps of a service.

Thin: `service.client` talks to it. The verbs that also work on a home (`status`, `best`, `report`,
`compare`) come here when a server is named.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from service.cli_options import (
    Output,
    Overrides,
    SweepFile,
    print_document,
    print_rows,
)
from service.client import DEFAULT_SERVER, Client
from service.states import State
from service.talk import Talk
from service.watch import render, watch
from trainer.errors import BudgetError, FairwayError, InfeasibleError, UsageError

app = typer.Typer()

Server = Annotated[
    str | None,
    typer.Option(
        "--server", envvar="FAIRWAY_SERVER", help=f"A service; default: {DEFAULT_SERVER}."
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="FAIRWAY_TOKEN", help="Who we are there.", show_envvar=True),
]
Ref = Annotated[str, typer.Argument(metavar="SWEEP", help="Id, a unique start of it, or name.")]
_ENDED_BY_HAND = ("paused by ", "stopped by ", "cancelled by ", "interrupted")


class Detached(FairwayError):
    """We no longer watch; the sweep goes on without us."""

    exit_code = 130


@app.command()
def submit(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    key: Annotated[
        str | None, typer.Option(help="A name for this request: asked again, it is the same one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would run and cost; queue nothing.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show it until it ends; the exit code is the sweep's.")
    ] = False,
    server: Server = None,
    token: Token = None,
    output: Output = "table",
) -> None:
    """Queue a sweep at a service. The same file is the same sweep, however often it is sent."""
    assignments = overrides or []
    with _client(server, token) as client:
        if dry_run:
            print_document(client.validate(sweep_file, assignments), output)
            return
        sweep = client.submit(sweep_file, assignments, priority=priority, key=key)
        if not wait:
            _print_sweep(sweep, output)
            return
        Talk().say("submitted", sweep=sweep["id"], state=sweep["state"])
        _watch_to_end(client, sweep["id"], output)


@app.command("ls")
def ls_command(
    state: Annotated[list[State] | None, typer.Option(help="Only these states.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only this user's.")] = None,
    name: Annotated[str | None, typer.Option(help="Only sweeps of this name.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 50,
    server: Server = None,
    token: Token = None,
    output: Output = "table",
) -> None:
    """List the sweeps of a service."""
    filters = {"state": [str(s) for s in state or ()], "owner": owner, "name": name}
    with _client(server, token) as client:
        found = [s for s, _ in zip(client.sweeps(**filters), range(limit), strict=False)]
    print_rows([_row(sweep) for sweep in found] if output == "table" else found, output)


@app.command()
def logs(
    sweep: Ref,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until it ends.")] = False,
    source: Annotated[
        str, typer.Option(help="`driver`, or a training's id for its curve.")
    ] = "driver",
    server: Server = None,
    token: Token = None,
) -> None:
    """Print what a sweep said, also when the node that it ran on is gone."""
    with _client(server, token) as client, _detachable(sweep):
        for text in client.logs(sweep, source, follow=follow):
            sys.stdout.write(text)
            sys.stdout.flush()


@app.command()
def pause(sweep: Ref, server: Server = None, token: Token = None, output: Output = "table") -> None:
    """Stop a sweep's trainings at a checkpoint and free its gangs, until it is resumed."""
    _ask("pause", sweep, server, token, output)


@app.command()
def resume(
    sweep: Ref, server: Server = None, token: Token = None, output: Output = "table"
) -> None:
    """Queue a sweep again: it goes on with what is missing."""
    _ask("resume", sweep, server, token, output)


@app.command()
def stop(sweep: Ref, server: Server = None, token: Token = None, output: Output = "table") -> None:
    """Let what runs of a sweep finish and start nothing more."""
    _ask("stop", sweep, server, token, output)


@app.command()
def cancel(
    sweep: Ref, server: Server = None, token: Token = None, output: Output = "table"
) -> None:
    """End a sweep now. What is finished is kept."""
    _ask("cancel", sweep, server, token, output)


def chosen_server(context: typer.Context, server: str | None) -> str | None:
    """The service that is meant, None for the home: a --home on the command line says more than a
    FAIRWAY_SERVER in the environment. UsageError where the command line names both."""

    def is_typed(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    if server is None or not is_typed("home"):
        return server
    if is_typed("server"):
        raise UsageError("--home and --server: a sweep is of one or of the other; give one")
    return None


def show_status(
    ref: str | None, server: str, token: str | None, output: str, *, is_watched: bool
) -> None:
    """`fairway status` of a sweep of a service, the newest without a reference."""
    with _client(server, token) as client:
        ref = newest_or(ref, client)
        if is_watched:
            _watch_to_end(client, ref, output)
            return
        _print_sweep(client.sweep(ref), output)


def newest_or(ref: str | None, client: Client) -> str:
    """The reference, or the id of the service's newest sweep."""
    if ref is not None:
        return ref
    for sweep in client.sweeps():
        return sweep["id"]
    raise UsageError(f"{client.server}: no sweep yet; queue one with `fairway submit`")


def raise_end(sweep: dict[str, Any]) -> None:
    """Turn how a sweep ended into an exit code, as `fairway run` does."""
    state, reason = State(sweep["state"]), sweep["reason"] or ""
    line = f"sweep {sweep['id']}: {state}" + (f": {reason}" if reason else "")
    verdict = (sweep.get("status") or {}).get("verdict")
    if state == State.SUCCEEDED:
        if verdict is not None and verdict["verdict"] != "passed":
            raise InfeasibleError(f"{line}: {verdict['reason']}")
        return
    if state in (State.INFEASIBLE, State.ILLEGAL):
        raise InfeasibleError(line)
    if state in (State.PAUSED, State.CANCELLED) or reason.startswith(_ENDED_BY_HAND):
        raise Detached(f"{line}; `fairway resume {sweep['id']}` goes on")
    if state == State.STOPPED:
        raise BudgetError(f"{line}; raise it and submit the file again to go on")
    raise FairwayError(f"{line}; see `fairway logs {sweep['id']}`")


def _client(server: str | None, token: str | None) -> Client:
    return Client(server or DEFAULT_SERVER, token)


def _ask(verb: str, ref: str, server: str | None, token: str | None, output: str) -> None:
    with _client(server, token) as client:
        sweep = client.ask(ref, verb)
    Talk().say(verb, sweep=sweep["id"], state=sweep["state"], reason=sweep["reason"])
    if output != "table":
        print_document(sweep, output)


def _watch_to_end(client: Client, ref: str, output: str) -> None:
    """Show a sweep until it rests; then its document, where one is asked for, and its exit code."""
    with _detachable(ref):
        sweep = watch(client, ref, Console(), Talk())
    if output != "table":
        print_document(sweep, output)
    raise_end(sweep)


@contextmanager
def _detachable(ref: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Detached(
            f"no longer watching; sweep {ref} goes on: `fairway status {ref} --watch` shows it"
        ) from error


def _print_sweep(sweep: dict[str, Any], output: str) -> None:
    if output != "table":
        print_document(sweep, output)
        return
    Console().print(render(sweep, [], time.time()))


def _row(sweep: dict[str, Any]) -> dict[str, Any]:
    best, progress = sweep["best"], sweep["progress"]
    return {
        "sweep": sweep["id"],
        "state": sweep["state"],
        "owner": sweep["owner"],
        "priority": sweep["priority"],
        "trainings": f"{progress['trainings_done']}/{progress['trainings_total']}",
        "finals": f"{progress['finals_done']}/{progress['finals_total']}",
        "val_bpb": "-" if best is None else f"{best['val_bpb']:.4f}",
        "bytes": "-" if best is None else best["artifact_bytes"],
        "reason": sweep["reason"] or "",
    }

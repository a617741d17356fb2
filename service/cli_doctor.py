"""`fairway doctor`: what a sweep needs that is not there, before anything is spent.

Thin: arguments in, `preflight` judges, its checks on stdout, exit 2 if one failed.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.attention import Question
from service.catalogue_view import data_of
from service.cli_options import HOME, Home, Output, Overrides
from service.identity import inputs_of
from service.machine import Machine, look
from service.paths import Paths
from service.plan import make_plan
from service.preflight import Check, checks, question
from service.specs import Resources
from service.sweep import Sweep, load_sweep
from trainer.codec import to_yaml
from trainer.data.shards import Dataset
from trainer.errors import UsageError
from trainer.runtime.environment import prepare_for_ray
from tune_spaces.catalogue import find

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


app = typer.Typer()


@app.command()
def doctor(
    sweep_file: Annotated[
        Path | None,
        typer.Argument(help="A sweep file (YAML), or a shipped sweep's name; default: no sweep."),
    ] = None,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every shard and compare its sha256.")
    ] = False,
    home: Home = HOME,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster to look at; default: this machine."),
    ] = None,
    output: Output = "table",
) -> None:
    """Check what a sweep needs: kernel, compressor, shards, disk, versions, GPUs, clocks.

    A check is ok, warn or fail, with what was found and what to do about it. `run` makes the same
    checks before it starts. A cluster is asked node by node: GPUs, free places, whether all see
    the same home, and placement groups that nobody owns. Exit 2 if a check failed.
    """
    paths = Paths(home.absolute())
    sweep, source = None, ""
    if sweep_file is not None:
        path = find("sweeps", str(sweep_file), "fairway")
        sweep, source = load_sweep(path, overrides or []), str(path)
    elif overrides:
        raise UsageError("-S: sets a value of a sweep; name the sweep file")
    found = _examine(sweep, source, paths, address, verify=verify)
    _print(found, output)
    failed = [check.name for check in found if check.verdict == "fail"]
    if failed:
        names = ", ".join(dict.fromkeys(failed))
        raise UsageError(f"doctor: {len(failed)} of {len(found)} checks failed: {names}")


def _examine(
    sweep: Sweep | None, source: str, paths: Paths, address: str | None, *, verify: bool
) -> list[Check]:
    dataset = _dataset(sweep, paths)
    plan = None
    if sweep is not None and dataset is not None:
        plan = make_plan(sweep, inputs_of(dataset), source)
    asked = None if sweep is None else question(sweep, plan)
    here = look(paths.store, asked if address is None else None)
    machines, more = [here], []
    if address is not None:
        machines, more = _cluster(sweep, asked, paths, address)
    return [*checks(sweep, paths, dataset, plan, here, machines, verify=verify), *more]


def _dataset(sweep: Sweep | None, paths: Paths) -> Dataset | None:
    """The sweep's data, the embedded one made where it is missing; None where a check will fail."""
    try:
        return None if sweep is None else data_of(paths, sweep.data)
    except UsageError:
        return None


def _cluster(
    sweep: Sweep | None, asked: Question | None, paths: Paths, address: str
) -> tuple[list[Machine], list[Check]]:
    """The cluster's machines, and what only Ray can tell of them."""
    prepare_for_ray()
    from service.cluster import Where, cluster, never_fits

    with cluster(Where(address), Resources()):
        from service.janitor import leftovers
        from service.nodes import machines, node_lines

        found = machines(paths.store, asked)
        more = [Check("node", "ok", line) for line in node_lines()]
        missing = None if sweep is None else never_fits(sweep.spec.resources)
        if missing is not None:
            more.append(Check("gang", "fail", f"resources: {missing}", _LOWER))
        more += [Check("leftover", "warn", line, _REMOVE) for line in leftovers()]
    return found, more


_LOWER = "lower resources.workers or cpus_per_worker, or run on a larger cluster"
_REMOVE = "`fairway run` removes it when it starts, or restart the cluster"


def _print(found: list[Check], output: str) -> None:
    if output != "table":
        rows = [asdict(check) for check in found]
        text = json.dumps(rows, indent=1) + "\n" if output == "json" else to_yaml(rows)
        sys.stdout.write(text)
        return
    if not sys.stdout.isatty():
        width = max(len(check.name) for check in found)
        for check in found:
            words = check.line().removeprefix(f"{check.name}: ")
            sys.stdout.write(f"{check.verdict:<4}  {check.name:<{width}}  {words}\n")
        return
    table = Table("", "check", "found", "what to do", box=None)
    for check in found:
        colour = _COLOURS[check.verdict]
        table.add_row(f"[{colour}]{check.verdict}[/]", check.name, check.detail, check.fix)
    Console().print(table)

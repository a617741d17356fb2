"""`fairway compare`, `gate` and `baseline`: better, or lucky?

Thin: arguments in, `service.sides` and `service.verdicts` judge, data on stdout. Exit 2 where two
sides cannot be compared, 3 where a gate is not passed. scipy is imported by the verbs that need it.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from service.cli_options import HOME, Home, Output, SweepRef, print_document
from service.cli_remote import Server, Token, chosen_server
from service.client import Client
from service.paths import Paths, find_sweep
from trainer.codec import dump
from trainer.errors import InfeasibleError, UsageError

app = typer.Typer()
baseline_app = typer.Typer(
    help="What results are held against, and how much noise is in them.", no_args_is_help=True
)

Mode = Annotated[
    Literal["strict", "frontier", "systems"],
    typer.Option(help="A gain of so much, any gain at p < 0.25, or no loss: for speed alone."),
]
MinGain = Annotated[
    float | None, typer.Option(min=0, help="Nats per token, with strict; default: 0.005.")
]
Alpha = Annotated[
    float | None, typer.Option(min=0, max=1, help="What p must be below, with strict: 0.01.")
]
_SIDE = "A sweep (its confirmed point, else its best over its seeds), a final's id (its point), "
_SIDE += "a baseline's name or file."


@app.command()
def compare(
    context: typer.Context,
    sides: Annotated[
        list[str], typer.Argument(help=f"{_SIDE} The first is what the others are held against.")
    ],
    home: Home = HOME,
    server: Server = None,
    token: Token = None,
    output: Output = "table",
) -> None:
    """Set results side by side: mean, spread, gain over the first, interval and p."""
    from service.sides import compare_sides

    if len(sides) < 2:
        raise UsageError("compare: give two sides or more, the old one first")
    server = chosen_server(context, server)
    if server is None:
        document = compare_sides(Paths(home), sides)
    else:
        with Client(server, token) as client:
            document = client.compare(sides)
    if output == "table":
        _print_sides(document["sides"], document["contrasts"])
    else:
        print_document(document, output)


@app.command()
def gate(
    subject: Annotated[str, typer.Argument(help=_SIDE)],
    against: Annotated[str, typer.Option(help="What it is held against: named like the subject.")],
    mode: Mode = "strict",
    min_gain_nats: MinGain = None,
    alpha: Alpha = None,
    home: Home = HOME,
    output: Output = "table",
) -> None:
    """Judge whether a result is better than a baseline. Exit 3 if it does not pass."""
    from service.sides import find_side
    from service.verdicts import decide, verdict_document

    thresholds = _thresholds(mode, min_gain_nats, alpha)
    paths = Paths(home)
    verdict = decide(find_side(paths, subject), find_side(paths, against), mode, **thresholds)
    document = verdict_document(verdict)
    if output == "table":
        new, old = document["sides"]
        _print_sides([old, new], [document])
        sys.stdout.write(f"{document['verdict']}: {document['reason']}\n")
    else:
        print_document(document, output)
    if not verdict.passed:
        sys.stdout.flush()
        raise InfeasibleError(f"{subject} against {against}: {verdict.reason}")


def _thresholds(mode: str, min_gain_nats: float | None, alpha: float | None) -> dict[str, float]:
    given = {"min_gain_nats": min_gain_nats, "alpha": alpha}
    asked = {name: value for name, value in given.items() if value is not None}
    if asked and mode != "strict":
        raise UsageError(
            f"--min-gain-nats and --alpha go with --mode strict; {mode} has its own level"
        )
    return asked


@baseline_app.command("list")
def list_baselines(output: Output = "table") -> None:
    """List the baselines that ship with Fairway."""
    from service.baselines import read_baseline, shipped

    rows = []
    for name in shipped():
        sample = read_baseline(name).sample()
        rows.append(
            {
                "name": name,
                "seeds": len(sample.values),
                "mean_bpb": round(sample.mean, 6),
                "sd_bpb": None if sample.sd is None else round(sample.sd, 6),
                "source": sample.source,
            }
        )
    if output == "table":
        _print_table(rows)
    else:
        print_document(rows, output)


@baseline_app.command()
def show(
    baseline: Annotated[str, typer.Argument(help="A shipped baseline's name, or a file.")],
    output: Output = "table",
) -> None:
    """Show a baseline in full: its results by seed and where they come from."""
    from service.baselines import read_baseline

    print_document(dump(read_baseline(baseline)), output)


@baseline_app.command()
def measure(sweep: SweepRef = None, home: Home = HOME, output: Output = "table") -> None:
    """Measure a sweep's noise over its seeds; what is printed as YAML is a baseline file."""
    from service.ledger import replay
    from service.sides import measure as measure_sweep

    view = replay(find_sweep(Paths(home), sweep).ledger)
    print_document(dump(measure_sweep(view)), output)


@baseline_app.command()
def plan(
    subject: Annotated[str, typer.Argument(help=f"Whose noise is meant. {_SIDE}")],
    gain_nats: Annotated[float, typer.Option(help="The true gain, in nats per token.")],
    mode: Annotated[
        Literal["strict", "frontier"], typer.Option(help="What the gate will ask.")
    ] = "strict",
    min_gain_nats: MinGain = None,
    alpha: Alpha = None,
    power: Annotated[float, typer.Option(help="How likely the gate should be passed.")] = 0.8,
    paired: Annotated[
        bool, typer.Option("--paired", help="Finals of one bank: a sweep's paired noise.")
    ] = False,
    gpu_seconds: Annotated[
        float | None, typer.Option(min=0, help="Of one seed; default: as the sweep's took.")
    ] = None,
    usd_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="The price.")] = None,
    home: Home = HOME,
    output: Output = "table",
) -> None:
    """Say how many seeds a gate takes to see a true gain, and what they cost."""
    from service.noise import plan_seeds
    from service.sides import find_spread, seed_cost_s
    from service.verdicts import least_seeds, level_of

    asked = _thresholds(mode, min_gain_nats, alpha)
    least, level = level_of(mode, **asked)
    spread = find_spread(Paths(home), subject, paired=paired)
    min_n = least_seeds(mode, paired=paired)
    exceeds = gain_nats - least
    planned = plan_seeds(spread.sd_nats, exceeds, level, power, paired=paired, min_n=min_n)
    if gpu_seconds is None and spread.view is not None:
        gpu_seconds = seed_cost_s(spread.view)
    total_s = None if gpu_seconds is None else planned.n * gpu_seconds
    document = {
        "seeds": planned.n,
        "power": planned.power,
        "test": "paired" if paired else "welch",
        "sd_nats": spread.sd_nats,
        "gain_nats": gain_nats,
        "min_gain_nats": least,
        "level": level,
        "gpu_seconds": total_s,
        "usd": None
        if total_s is None or usd_per_gpu_hour is None
        else total_s / 3600 * usd_per_gpu_hour,
    }
    print_document(document, output)


def _print_sides(
    sides: Sequence[Mapping[str, Any]], contrasts: Sequence[Mapping[str, Any]]
) -> None:
    first, *others = sides
    rows = [_side_row(first, {})]
    rows += [_side_row(side, held) for side, held in zip(others, contrasts, strict=True)]
    _print_table(rows)
    for held in contrasts:
        if held["no_test"]:
            sys.stdout.write(f"{held['new']}: no p: {held['no_test']}\n")
    for side in sides:
        for remark in side["remarks"]:
            sys.stdout.write(f"{side['name']}: {remark}\n")


def _side_row(side: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, str]:
    gain, interval = held.get("gain_nats"), held.get("interval_nats")
    return {
        "side": side["name"],
        "n": str(side["n"]),
        "mean bpb": f"{side['mean_bpb']:.6f}",
        "sd bpb": "-" if side["sd_bpb"] is None else f"{side['sd_bpb']:.6f}",
        "gain mbpb": f"{held['gain_mbpb']:+.3f}" if held else "-",
        "gain nats": "-" if gain is None else f"{gain:+.6f}",
        "95 % interval": "-" if not interval else f"{interval[0]:+.6f} {interval[1]:+.6f}",
        "p": f"{held['p']:.4g}" if "p" in held else "-",
        "test": held.get("test", "-"),
    }


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """In colour on a terminal; whole lines into a pipe or a log."""
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    out = io.StringIO()
    Console(file=out, width=1_000, color_system=None).print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines()))

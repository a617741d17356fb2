"""`fairway replay`: run a recorded final again.

Thin: arguments in, `service.replay` checks, runs and compares; its document on stdout. Exit 0 where
the same came out, 3 where not, 2 where it was refused before anything was spent, 5 where MLflow is
out of reach: the result is printed all the same.
"""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from service.cli_options import HOME, Home, Output, print_document
from service.paths import Paths, is_taken
from service.talk import Talk
from trainer.codec import parse_assignment
from trainer.errors import BackendError, InfeasibleError, UsageError

app = typer.Typer()


@app.command()
def replay(
    run: Annotated[
        str,
        typer.Argument(
            help="A final's id, a sweep (its best), a sheet.json or a folder with one, or "
            "mlflow:RUN_ID."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="The dataset's folder; default: the home's with the recorded digest."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="NAME", help="Accept that this fact differs."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-S", metavar="PATH=VALUE", help="Set a value of the recipe."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="A new folder for the stages; default: they are removed.")
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow, to write the replay to as a run."),
    ] = None,
    home: Home = HOME,
    output: Output = "table",
) -> None:
    """Run a recorded final again and say whether the same comes out."""
    from service import replay
    from service.replay_run import open_experiment, write_run

    paths, talk, values = Paths(home), Talk(), [parse_assignment(text) for text in overrides or []]
    if keep is not None and is_taken(keep):
        raise UsageError(f"--keep {keep}: holds something already; name a new folder")
    sheet = _sheet(paths, run, tracking_uri)
    prepared = replay.prepare(paths, sheet, data, values, allow or ())
    for note in prepared.notes:
        talk.say("note", fact=note.name, recorded=note.recorded, here=note.here)
    if tracking_uri is not None:
        open_experiment(paths, tracking_uri, sheet)  # or it is not there after hours of training
    with ExitStack() as stack:
        store = keep or Path(stack.enter_context(TemporaryDirectory(prefix="fairway-replay-")))
        document = replay.compare(prepared, replay.run(prepared, store, talk))
    lost: BackendError | None = None
    try:
        if tracking_uri is not None:
            document["mlflow_run_id"] = write_run(paths, tracking_uri, sheet, document)
    except BackendError as error:
        lost = error
        talk.say("not_in_mlflow", replay=sheet.final, reason=str(error))
    finally:
        print_document(document, output)
    if not document["same"]:
        raise InfeasibleError(f"{sheet.final}: {document['verdict']}")
    if lost is not None:
        raise lost


def _sheet(paths: Paths, run: str, tracking_uri: str | None) -> Any:
    """The sheet that a run in MLflow carries, or that the home has."""
    from service.references import find_sheet
    from service.replay_run import MLFLOW, sheet_of_run

    if run.startswith(MLFLOW):
        return sheet_of_run(paths, run, tracking_uri)
    return find_sheet(paths, run)

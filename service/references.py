"""What a user may call a recorded final: its id or a start of it, its sweep, its sheet, its run in
MLflow."""

from pathlib import Path
from tempfile import TemporaryDirectory

from service import mlflow_store, report
from service.ledger import replay
from service.paths import Paths, find_sweep
from service.sheet import SHEET_FILE, Sheet, read_sheet, sheet_of
from trainer.errors import UsageError
from trainer.runtime.environment import quiet_mlflow

MLFLOW = "mlflow:"


def find_sheet(paths: Paths, ref: str, tracking_uri: str | None = None) -> Sheet:
    """Read the sheet of what `ref` names: a sheet.json, a folder with one, mlflow:RUN_ID, or what
    `find_final` takes. UsageError where that is nothing, or more than one."""
    if ref.startswith(MLFLOW):
        return _of_run(paths, ref.removeprefix(MLFLOW), tracking_uri)
    path = Path(ref)
    if ref and path.is_dir():
        return read_sheet(_sheet_in(path))
    if ref and (path.is_file() or "/" in ref or ref.endswith(".json")):
        return read_sheet(path)
    return sheet_of(paths, find_final(paths, ref))


def find_final(paths: Paths, ref: str) -> str:
    """Find a scored final by its id or a unique start of it, or a sweep's best; the full id."""
    if not ref:
        raise UsageError("'': give a final's id, or a sweep's")
    finished = (path.parent.name for path in (paths.store / "finals").glob("*/result.json"))
    matching = sorted(name for name in finished if name.startswith(ref))
    if len(matching) > 1:
        raise UsageError(f"{ref!r} fits {len(matching)} finals; give more of its id")
    if matching:
        return matching[0]
    try:
        view = replay(find_sweep(paths, ref).ledger)
    except UsageError as error:
        raise UsageError(
            f"{ref!r}: no final in {paths.store / 'finals'} starts so, and {error}"
        ) from error
    top = report.best(view)
    if top is None:
        raise UsageError(f"{ref}: the sweep has no final that is feasible and legal; name one")
    return top["final"]


def _sheet_in(folder: Path) -> Path:
    """The one sheet of a final's folder, or of a record's, which has one a seed."""
    if (folder / SHEET_FILE).is_file():
        return folder / SHEET_FILE
    found = sorted(folder.glob("sheet*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{folder}: has no {SHEET_FILE} but {names}; name the file itself")
    return found[0]


def _of_run(paths: Paths, run_id: str, uri: str | None) -> Sheet:
    """Fetch the sheet that a final's run in MLflow carries; of this home's store without a URI."""
    quiet_mlflow()
    if uri is None:
        if not paths.mlflow_db.is_file():
            raise UsageError(
                f"{MLFLOW}{run_id}: {paths.mlflow_db} does not exist; name the server with "
                "--tracking-uri"
            )
        uri = f"sqlite:///{paths.mlflow_db.resolve()}"
    client = mlflow_store.connect(paths, uri)
    with TemporaryDirectory() as folder:
        with mlflow_store.talking(uri):
            names = {each.path for each in client.list_artifacts(run_id)}
            if SHEET_FILE not in names:
                raise UsageError(
                    f"{MLFLOW}{run_id}: has no {SHEET_FILE}; name the run of a final that was "
                    "scored"
                )
            path = client.download_artifacts(run_id, SHEET_FILE, folder)
        return read_sheet(Path(path))

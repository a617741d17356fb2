"""What a user may call a recorded final: its id or a start of it, its sweep, its sheet."""

from dataclasses import dataclass
from pathlib import Path

from service import report
from service.ledger import SweepView, replay
from service.paths import Paths, find_sweep
from service.sheet import SHEET_FILE, Sheet, read_sheet, sheet_of
from trainer.errors import UsageError


@dataclass(frozen=True, slots=True)
class Named:
    """What a reference means: a sweep or, with its full id, a final. view: of the sweep, or of the
    newest that tells of the final; None where the final is in the store alone."""

    view: SweepView | None
    final: str | None


def find_named(paths: Paths, ref: str) -> Named:
    """Find what a reference means in a home: a sweep by its name, its id or a start of it, as
    `compare` does too, else a final by its id or a unique start of it."""
    known = [path.parent.name for path in paths.sweeps.glob("*/events.jsonl")]
    if ref and any(name.startswith(ref) or name.rpartition("-")[0] == ref for name in known):
        return Named(replay(find_sweep(paths, ref).ledger), None)
    found = _finals(paths, ref) if ref else {}
    if not found:
        raise UsageError(
            f"{ref!r}: no sweep of {paths.home}, and none of its finals; `fairway best` prints one"
        )
    if len(found) > 1:
        raise UsageError(f"{ref!r} fits {len(found)} finals; give more of its id")
    [(final, view)] = found.items()
    return Named(view, final)


def _finals(paths: Paths, start: str) -> dict[str, SweepView | None]:
    """The finals that begin so, in the store and in the ledgers, with the newest sweep of each."""
    finished = (path.parent.name for path in (paths.store / "finals").glob("*/result.json"))
    found: dict[str, SweepView | None] = {name: None for name in finished if name.startswith(start)}
    mark = f'"final":"{start}'.encode()
    ledgers = paths.sweeps.glob("*/events.jsonl")
    for ledger in sorted(ledgers, key=lambda path: path.stat().st_mtime):
        if mark in ledger.read_bytes():
            view = replay(ledger)
            found |= {name: view for name in view.finals if name.startswith(start)}
    return found


def find_final(paths: Paths, ref: str) -> str:
    """The final that a reference means, a sweep's best where it names a sweep; the full id."""
    named = find_named(paths, ref)
    if named.final is not None:
        return named.final
    assert named.view is not None
    top = report.best(named.view)
    if top is None:
        raise UsageError(f"{ref}: the sweep has no final that is feasible and legal; name one")
    return top["final"]


def find_sheet(paths: Paths, ref: str) -> Sheet:
    """Read the sheet of what `ref` names: a sheet.json, a folder with one, or what `find_final`
    takes. UsageError where that is nothing, or more than one."""
    path = Path(ref)
    if ref and path.is_dir():
        return read_sheet(_sheet_in(path))
    if ref and (path.is_file() or "/" in ref or ref.endswith(".json")):
        return read_sheet(path)
    return sheet_of(paths, find_final(paths, ref))


def _sheet_in(folder: Path) -> Path:
    """The one sheet of a final's folder, or of a record's, which has one a seed."""
    if (folder / SHEET_FILE).is_file():
        return folder / SHEET_FILE
    found = sorted(folder.glob("sheet*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{folder}: has no {SHEET_FILE} but {names}; name the file itself")
    return found[0]

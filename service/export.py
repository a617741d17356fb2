"""A record folder of a home's final: every file from what its stages have recorded.

All seeds of a configuration go in, or none: one that has no feasible and legal result is an error
that names it, unless one seed alone is asked for, and then the record says which are left out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from service import report
from service.confirmed import (
    Group,
    best_confirmed,
    bpb_of,
    confirm_groups,
    counts,
    is_scored,
    registered_seeds,
    sample_of_sweep,
    search_groups,
)
from service.labels import short_value
from service.ledger import SweepView
from service.paths import Paths, is_taken
from service.record import (
    CODE,
    REQUIREMENTS,
    By,
    Entry,
    Record,
    claims_of,
    fault_in,
    log_name,
    requirements_of,
    sheet_name,
    weights_name,
)
from service.record_folder import README, SUBMISSION
from service.record_log import log_text
from service.record_readme import readme_of, texts_of
from service.record_text import NOT_RECORDED, people_mismatches
from service.references import find_named
from service.sheet import Sheet, sheet_of, write_sheet
from service.singlefile.write import write_single_file
from trainer.errors import DataError, InfeasibleError, UsageError
from trainer.finalize.code import code_digest
from trainer.protocol import SPEC_VERSION
from trainer.runtime.files import sha256_file, write_bytes, write_json, write_text

WEIGHTS_FILE = "weights.fw"  # as a final's artifact calls it
_OPTIONS = {"github_id": "github"}
Which = Literal["all", "one"]


@dataclass(frozen=True, slots=True)
class Given:
    """What a user says of a record; None takes what was recorded, or leaves it out."""

    author: str | None = None
    github_id: str | None = None
    name: str | None = None
    blurb: str | None = None
    date: str | None = None


@dataclass(frozen=True, slots=True)
class Configuration:
    """One configuration of a sweep with its finals by seed, and the final that stands for it."""

    view: SweepView
    group: Group
    chosen: dict[str, Any]

    @property
    def seeds(self) -> list[int]:
        """The chosen final's seed, then the others in order."""
        first = self.chosen["seed"]
        return [first, *sorted(self.group.finals.keys() - {first})]


def export(paths: Paths, ref: str, folder: Path, given: Given, which: Which = "all") -> Record:
    """Write the record of a final, or of a sweep's best configuration, into a new folder.

    UsageError where a fact is missing, a file was altered or the folder holds something already;
    InfeasibleError where the configuration, or one of its seeds, is not feasible and legal.
    """
    if is_taken(folder):
        raise UsageError(f"{folder}: not empty; name a new folder")
    of = find_configuration(paths, ref)
    seeds = of.seeds if which == "all" else of.seeds[:1]
    if which == "all":
        _require_all(of)
    sheets = [sheet_of(paths, of.group.finals[seed]["final"]) for seed in seeds]
    _require_one_code(sheets)
    _require_this_code(sheets)
    by = _by(of, given, sheets[0])
    if (fault := fault_in(by)) is not None:
        raise UsageError(f"--{_OPTIONS.get(fault[0], fault[0])}: {fault[1]}")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fairway-export-", dir=folder.parent) as place:
        making = Path(place) / "record"
        record = _write(paths, of, sheets, making, by)
        _appear(making, folder)
    return record


def _appear(making: Path, folder: Path) -> None:
    """Put what was made where it was asked for. An empty folder stays itself, for somebody may
    stand in it; submission.json, without which it is no record, comes last."""
    if not folder.exists():
        making.rename(folder)
        return
    for path in sorted(making.iterdir(), key=lambda path: path.name == SUBMISSION):
        path.rename(folder / path.name)


def find_configuration(paths: Paths, ref: str) -> Configuration:
    """The configuration that a sweep's name or id, or a final's id or its start, is about."""
    named = find_named(paths, ref)
    view = named.view
    if view is None:
        raise UsageError(f"{named.final}: no sweep of {paths.home} tells of it; run its sweep")
    if named.final is None:
        group = _best(view)
        return Configuration(view, group, group.typical())
    event = view.finals[named.final]
    if not counts(view, event):
        raise InfeasibleError(f"{named.final}: it is {event['state']}: {event['reason']}")
    return Configuration(view, _group(view, event), event)


def _best(view: SweepView) -> Group:
    """The configuration that a gate would judge: the confirmed one, else the lowest mean over all
    seeds of the search. Raises where there is none, with the nearest miss."""
    report.best_document(view, {})
    sample_of_sweep(view)
    confirmed, seeds = best_confirmed(view), registered_seeds(view, "search")
    if confirmed is not None:
        return confirmed
    whole = [
        group
        for group in search_groups(view)
        if group.finals.keys() >= set(seeds)
        and all(counts(view, event) for event in group.finals.values())
    ]
    return min(whole, key=lambda group: (group.mean, group.key))


def _group(view: SweepView, event: dict[str, Any]) -> Group:
    is_confirmed = event.get("phase") == "confirm"
    groups = confirm_groups(view) if is_confirmed else search_groups(view)
    return next(
        group
        for group in groups
        if any(each["final"] == event["final"] for each in group.finals.values())
    )


def _missing(of: Configuration) -> list[int]:
    """The seeds that the sweep asked for, and that have no final of this configuration."""
    asked = registered_seeds(of.view, of.chosen.get("phase", "search"))
    return [seed for seed in asked if seed not in of.group.finals]


def _require_all(of: Configuration) -> None:
    """Raise where a seed of the configuration has no result that counts: none is dropped."""
    fix = "every seed of a configuration is exported; name one with --seeds one"
    for seed in _missing(of):
        raise InfeasibleError(f"{of.chosen['final']}: no result for its seed {seed}; {fix}")
    for seed, event in sorted(of.group.finals.items()):
        if not counts(of.view, event):
            raise InfeasibleError(
                f"{event['final']}: seed {seed} is {event['state']}: "
                f"{event['reason'] or 'see its audit'}; {fix}"
            )


def _require_one_code(sheets: list[Sheet]) -> None:
    first = sheets[0]
    for sheet in sheets[1:]:
        if (sheet.code_digest, sheet.data.digest) != (first.code_digest, first.data.digest):
            raise UsageError(
                f"{sheet.final}: scored with other code or data than {first.final}; one record is "
                "of one code"
            )


def _require_this_code(sheets: list[Sheet]) -> None:
    """Raise UsageError where other code scored than runs here: train_gpt.py is cut out of this."""
    here = code_digest()
    for sheet in sheets:
        if sheet.code_digest == here and sheet.spec_version == SPEC_VERSION:
            continue
        told = "code that was not recorded"
        if sheet.code_digest is not None:
            told = f"code {sheet.code_digest[:12]}, spec version {sheet.spec_version}"
        commit = sheet.driver.git_commit or "the commit that scored it"
        raise UsageError(
            f"{sheet.final}: scored by {told}, this is code {here[:12]}, spec version "
            f"{SPEC_VERSION}; check out {commit} and export there"
        )


def _require_known_numbers(record: Record) -> None:
    """Raise UsageError for a number in people's words that the record does not have."""
    words = {name: word for name, word in asdict(record.by).items() if name != "date"}
    for each in people_mismatches(words, texts_of(record.wordless())):
        option = _OPTIONS.get(each.field, each.field)
        raise UsageError(
            f"--{option}: {each.claimed} is {NOT_RECORDED}; leave the number out, verify refuses it"
        )


def _write(paths: Paths, of: Configuration, sheets: list[Sheet], folder: Path, by: By) -> Record:
    """Write every file of the record into `folder`."""
    folder.mkdir(parents=True)
    entries = [Entry(sheet, _place(paths, sheet, folder)) for sheet in sheets]
    first = sheets[0]
    made = write_single_file(first.train_task, first.final_task, folder, first.world_size)
    left_out = {
        seed: bpb_of(event) if is_scored(event) else None
        for seed, event in sorted(of.group.finals.items())
        if seed not in [sheet.seed for sheet in sheets]
    }
    missing: dict[int, float | None] = dict.fromkeys(_missing(of))
    record = Record(tuple(entries), by, made.num_bytes, {**left_out, **missing})
    _require_known_numbers(record)
    assert made.path == folder / CODE
    write_text(folder / REQUIREMENTS, requirements_of(record))
    for entry in entries:
        journal = paths.store / "trainings" / entry.sheet.training / "metrics.jsonl"
        if not journal.is_file():
            raise DataError(f"{journal}: no such file; seed {entry.seed} has no log without it")
        lines = journal.read_text(encoding="utf-8").splitlines()
        write_text(folder / log_name(entry.seed), log_text(record, entry, lines))
    hashes = {name: sha256_file(folder / name) for name in record.hashed_names}
    write_json(folder / SUBMISSION, claims_of(record, hashes))
    write_text(folder / README, readme_of(record))
    return record


def _place(paths: Paths, sheet: Sheet, folder: Path) -> int:
    """Put a seed's sheet and weights into the folder; return the bytes of the weights."""
    source = paths.store / "finals" / sheet.final / "artifact" / WEIGHTS_FILE
    if not source.is_file():
        raise DataError(f"{source}: no such file; run the sweep again")
    target = folder / weights_name(sheet.seed)
    write_bytes(target, source.read_bytes())
    if sha256_file(target) != sheet.result.weights_sha256:
        raise DataError(f"{source}: altered since it was written; remove its folder and run again")
    write_sheet(folder / sheet_name(sheet.seed), sheet)
    return target.stat().st_size


def _by(of: Configuration, given: Given, first: Sheet) -> By:
    """What the user says, and where they do not, what was recorded."""
    point: Mapping[str, Any] = of.group.point
    knobs = ", ".join(f"{name}={short_value(value)}" for name, value in point.items())
    scored = datetime.fromtimestamp(of.chosen["at"], UTC)
    recorded = By(
        author=None,
        github_id=None,
        name=of.view.started["name"],
        blurb=f"Recipe {first.recipe.name}" + (f" with {knobs}" if knobs else ""),
        date=scored.strftime("%Y-%m-%d"),
    )
    said = {
        name: value
        for name in ("author", "github_id", "name", "blurb", "date")
        if (value := getattr(given, name)) is not None
    }
    return replace(recorded, **said)

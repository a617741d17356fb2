"""A submission, checked and planned: what a user sends becomes a sweep of the queue, or one line
that says which file and which field is wrong.

A submission is data from a stranger. The files that its spec names must be shipped ones, part of
the submission, or inside a folder that the service was given (a root); nothing else of the server
is opened or told of. `plan_bundle` runs in a child process (`service.api.planner`), in the bundle's
folder: there relative names mean what they mean to `fairway run`, and ids come out the same.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from service.baselines import read_baseline, shipped
from service.budget import seconds_per_step
from service.catalogue_view import data_of, plan_document
from service.identity import inputs_of, sweep_id
from service.ledger import replay
from service.paths import Paths
from service.plan import make_plan
from service.sides import is_baseline
from service.specs import ReferenceCurve
from service.sweep import Sweep, load_sweep
from trainer.codec import parse_assignment, read_mapping, with_values
from trainer.data.manifest import check_name
from trainer.errors import DataError, UsageError
from trainer.runtime.files import read_json, write_json, write_text
from tune_spaces.catalogue import names

SWEEP_FILE = "sweep.yaml"
RECORD_FILE = "submission.json"
MAX_FILES = 16
MAX_FILE_BYTES = 256 * 1024
MAX_ASSIGNMENTS = 256
MAX_ASSIGNMENT = 4_096  # characters
MAX_ASSIGNMENT_BYTES = 64 * 1024  # of all together, which travel on a command line
MAX_RECIPES = 64  # that one recipe may extend, all together
DIGEST_LENGTH = 20  # of the digest, in the folder's name
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.yaml")
_TRAINING = re.compile(r"[0-9a-f]{20}")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Submission:
    """What a user sends: YAML texts, the files by name, and `-S` values."""

    sweep: str
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    assignments: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of the request, byte for byte."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Planned:
    """What a submission comes to."""

    sweep_id: str
    name: str
    recipe: str
    gangs: int
    plan: dict[str, Any]
    usd: float | None
    """Its price, where both that of an hour and the length of a step are known."""


def check_submission(submission: Submission) -> None:
    """Raise UsageError unless names, sizes and characters are what a bundle may have."""
    if len(submission.files) > MAX_FILES:
        raise UsageError(f"files: {len(submission.files)} files; at most {MAX_FILES} are taken")
    if len(submission.assignments) > MAX_ASSIGNMENTS:
        raise UsageError(f"assignments: more than {MAX_ASSIGNMENTS}; write them into the sweep")
    for name in submission.files:
        if not _FILE_NAME.fullmatch(name) or name == SWEEP_FILE:
            raise UsageError(
                f"files: {name[:80]!r} is no name for a file; use letters, digits, dots, dashes "
                f"and underscores, at most 64, then .yaml, and not {SWEEP_FILE}"
            )
    for name, text in [(SWEEP_FILE, submission.sweep), *submission.files.items()]:
        _check_text(text, name)
        if len(text.encode()) > MAX_FILE_BYTES:
            raise UsageError(f"{name}: larger than {MAX_FILE_BYTES} bytes; a spec is a short text")
    for i, text in enumerate(submission.assignments):
        _check_text(text, f"assignments[{i}]")
        if len(text) > MAX_ASSIGNMENT:
            raise UsageError(f"assignments[{i}]: longer than {MAX_ASSIGNMENT} characters")
    if sum(len(text.encode()) for text in submission.assignments) > MAX_ASSIGNMENT_BYTES:
        raise UsageError(
            f"assignments: more than {MAX_ASSIGNMENT_BYTES} bytes; write them into the sweep"
        )


def _check_text(text: str, where: str) -> None:
    if found := _UNPRINTABLE.search(text):
        raise UsageError(f"{where}: character {found.start() + 1} is {found[0]!r}, not text")


class Bundles:
    """The submissions on disk, HOME/submissions/DIGEST/, each written once and whole."""

    def __init__(self, paths: Paths) -> None:
        self._folder = paths.submissions.resolve()

    def clear(self) -> None:
        """Remove what an earlier service was killed over."""
        for left in self._folder.glob(".new-*"):
            shutil.rmtree(left, ignore_errors=True)

    def lay_out(self, submission: Submission) -> Path:
        """Write a submission into a new folder, to be kept or discarded."""
        folder = self._folder / f".new-{secrets.token_hex(8)}"
        folder.mkdir(parents=True)
        for name, text in [(SWEEP_FILE, submission.sweep), *submission.files.items()]:
            write_text(folder / name, text)
        record = {"digest": submission.digest, "assignments": list(submission.assignments)}
        write_json(folder / RECORD_FILE, record)
        return folder

    def keep(self, folder: Path, digest: str) -> Path:
        """Give a folder its name for good, or find there what it says again."""
        target = self._folder / digest[:DIGEST_LENGTH]
        try:
            folder.rename(target)
        except OSError:
            # Not empty: the same was submitted before.
            if not target.is_dir() or read_json(target / RECORD_FILE)["digest"] != digest:
                raise DataError(
                    f"submissions/{target.name}: another submission is there; move it away"
                ) from None
            self.discard(folder)
        else:
            self._flush()
        return target

    def discard(self, folder: Path) -> None:
        """Remove a folder that was only looked at."""
        shutil.rmtree(folder, ignore_errors=True)

    def _flush(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def plan_bundle(
    bundle: Path, assignments: Sequence[str], paths: Paths, roots: Sequence[Path]
) -> Planned:
    """Check and plan the bundle in the working directory, which `bundle` names as well.

    Nothing is fetched or started; the data must be in the home. UsageError names file and field.
    """
    places = Places(bundle, roots)
    _check_named(_with_own_fields(assignments), places)
    sweep = load_sweep(Path(SWEEP_FILE), assignments)
    _check_ids(sweep)
    inputs = inputs_of(data_of(paths, sweep.data))
    pace = _pace(paths, sweep_id(sweep, inputs))
    plan = make_plan(sweep, inputs, SWEEP_FILE, seconds_per_step=pace)
    spec = sweep.spec
    price = None if spec.budget is None else spec.budget.usd_per_gpu_hour
    seconds = plan.forecast.get("worker_seconds")
    return Planned(
        sweep_id=plan.sweep_id,
        name=spec.name,
        recipe=spec.recipe,
        gangs=spec.limits.max_concurrent or 1,
        plan=plan_document(sweep, plan),
        usd=None if price is None or seconds is None else round(seconds / 3_600 * price, 2),
    )


def _pace(paths: Paths, sweep: str) -> float | None:
    """Seconds a step, where this sweep has run before."""
    ledger = paths.sweep(sweep).ledger
    return seconds_per_step(replay(ledger)) if ledger.is_file() else None


def _with_own_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """The sweep file as a mapping, with those `-S` values that choose files."""
    data = read_mapping(Path(SWEEP_FILE))
    for path, value in map(parse_assignment, assignments):
        if path.partition(".")[0] in ("recipe", "clocks", "gate"):
            data = with_values(data, [(path, value)])
    return data


def _check_named(data: Mapping[str, Any], places: "Places") -> None:
    """Raise UsageError unless every file that a sweep names may be read. What is not even a name
    is left to the spec's own check."""
    recipe, clocks, gate = data.get("recipe"), data.get("clocks"), data.get("gate")
    if isinstance(recipe, str) and recipe not in names("recipes"):
        _check_recipe(places.file(recipe, f"{SWEEP_FILE}: recipe"), places)
    if isinstance(clocks, str):
        places.file(clocks, f"{SWEEP_FILE}: clocks")
    baseline = gate.get("baseline") if isinstance(gate, dict) else None
    if isinstance(baseline, str) and is_baseline(baseline) and baseline not in shipped():
        read_baseline(str(places.file(baseline, f"{SWEEP_FILE}: gate.baseline")))


def _check_recipe(path: Path, places: "Places") -> None:
    """Hold everything that a recipe extends, however far, to the same rule."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        recipe = todo.pop()
        if recipe in seen:
            continue
        seen.add(recipe)
        if len(seen) > MAX_RECIPES:
            raise UsageError(f"{recipe}: extends more than {MAX_RECIPES} recipes")
        for name in _extended(recipe):
            named = name if name.endswith(".yaml") else f"{name}.yaml"
            todo.append(places.file(str(recipe.parent / named), f"{recipe}: extends"))


def _extended(recipe: Path) -> Iterator[str]:
    extends = read_mapping(recipe).get("extends")
    for name in extends if isinstance(extends, list) else [extends]:
        if isinstance(name, str) and name:
            yield name


def _check_ids(sweep: Sweep) -> None:
    """Raise UsageError unless what becomes part of a path is a plain word."""
    check_name(sweep.data.name)
    moving = [path for path in sweep.spec.space if path.partition(".")[0] == "data"]
    if moving:
        raise UsageError(f"{SWEEP_FILE}: space.{moving[0]}: a sweep has one dataset; set data.name")
    stop = sweep.spec.search.train.stop
    if isinstance(stop, ReferenceCurve) and not _TRAINING.fullmatch(stop.training):
        raise UsageError(
            f"{SWEEP_FILE}: search.train.stop.training: {stop.training[:80]!r} is no training's "
            "id; it has 20 hexadecimal digits"
        )


class Places:
    """Where the files that a sweep names may lie: in its bundle, or under a root."""

    def __init__(self, bundle: Path, roots: Sequence[Path]) -> None:
        self._bundle = bundle.resolve()
        self._roots = [(root, root.resolve()) for root in roots]

    def file(self, name: str, where: str) -> Path:
        """Return the file of a name as it was written; UsageError unless it may be read, before
        anything is told of whether it exists."""
        real = self._real(name)
        if real is None:
            roots = ", ".join(str(root) for root, _ in self._roots)
            hint = f", or name one under {roots}" if roots else ""
            raise UsageError(
                f"{where}: {name[:200]!r} is neither shipped nor part of the submission; send it "
                f"along under `files`{hint}"
            )
        if os.path.realpath(real) != str(real):
            raise UsageError(f"{where}: {name[:200]!r} is a link; name the file itself")
        try:
            size = real.stat().st_size if real.is_file() else None
        except OSError:  # longer than a name can be, or not ours to look at
            size = None
        if size is None:
            raise UsageError(f"{where}: there is no file {name[:200]!r}")
        if size > MAX_FILE_BYTES:
            raise UsageError(f"{where}: {name[:200]!r} is larger than {MAX_FILE_BYTES} bytes")
        return Path(name)

    def _real(self, name: str) -> Path | None:
        """Where a name leads if no link is followed below its root; None if it is outside."""
        path = Path(name)
        if "\x00" in name or ".." in path.parts:
            return None
        if not path.is_absolute():
            # A bundle is flat, and sweep.yaml and the record are no recipes.
            is_file = len(path.parts) == 1 and _FILE_NAME.fullmatch(name) and name != SWEEP_FILE
            return self._bundle / path if is_file else None
        for root, resolved in self._roots:
            for base in (root, resolved):
                if path.is_relative_to(base):
                    return resolved / path.relative_to(base)
        return None

"""The run sheet: one JSON document with everything that it takes to run one final again.

`finals/ID/sheet.json` is written when a final is scored, from what its stages and its sweep's
ledger have recorded, and is read strictly: it may come from anybody. What was not recorded is null.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from service.facts import DriverFacts, WorkerFacts, read_facts
from service.ledger import read, replay
from service.paths import Paths
from service.sheet_data import SheetData, describe_data, require_plain
from service.sides import measure
from service.store import Store
from trainer.codec import dump, parse
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import DataError, UsageError
from trainer.protocol import SPEC_VERSION
from trainer.results import FinalResult, TrainResult
from trainer.runtime.files import read_json, write_json
from trainer.specs.base import require, require_positive, spec
from trainer.specs.recipe import DataSpec, Recipe
from trainer.specs.task import FinalTask, TrainTask

SHEET_FILE = "sheet.json"
MAX_SHEET_BYTES = 1 << 24  # a thousand shards take a fifth of a megabyte
_EMA = "ema-"
Event = Mapping[str, Any]


@spec
class Branch:
    """The trunk's state that a training started from. The same training from step 0 is what the
    sheet's train_task says; on a CPU, with a schedule by steps, it ends in the same bits."""

    state: str
    step: int | None = None


@spec
class Verdict:
    """One audit rule's verdict."""

    id: str
    verdict: Literal["pass", "fail", "not checked"]
    detail: str
    source: str
    contested: bool = False


@spec
class SheetResult:
    """What came out. val_loss is in nats per token; tokens and bytes are the scored text's."""

    entry: str
    num_params: int
    artifact_bytes: int
    weights_bytes: int
    code_bytes: int
    weights_sha256: str
    val_bpb: float
    val_loss: float
    tokens: int
    bytes: int
    steps: int
    train_tokens: int
    train_clock_s: float
    finalize_clock_s: float
    eval_clock_s: float
    audit: tuple[Verdict, ...]


@spec
class Noise:
    """How far seeds alone move a score: a standard deviation with its degrees of freedom, None
    where it was not measured."""

    sd_bpb: float | None = None
    df: int | None = None

    def __post_init__(self) -> None:
        require((self.sd_bpb is None) == (self.df is None), "give both sd_bpb and df")
        require_positive(sd_bpb=self.sd_bpb, df=self.df)


@spec
class Sheet:
    """One final and all that it follows from.

    recipe: of exactly this point and seed; `python -m trainer` runs it. threads: torch's, on one
    worker. fitted: its clips and bits, which final_task has, were chosen to fit the sweep's cap.
    """

    version: Literal[1] = 1
    final: str
    training: str
    sweep: str | None = None
    fitted: bool = False
    seed: int
    recipe: Recipe
    train_task: TrainTask
    final_task: FinalTask
    world_size: int
    device: Literal["cpu", "cuda"]
    threads: int
    data: SheetData
    code_digest: str | None = None
    spec_version: int
    branch: Branch | None = None
    driver: DriverFacts
    train_worker: WorkerFacts | None = None
    final_worker: WorkerFacts | None = None
    result: SheetResult
    noise: Noise

    def __post_init__(self) -> None:
        require_plain(final=self.final, training=self.training, sweep=self.sweep)
        require_positive(world_size=self.world_size, threads=self.threads)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a final comes from, as a sweep's ledger tells it: the event that started the sweep, and
    the state that its training started from. facts: what the run that computed it was started
    from; empty where that is not known."""

    started: Event
    facts: Event
    final: str
    training: str
    seed: int
    branch: str | None
    fitted: bool


def sheet_of(paths: Paths, final_id: str) -> Sheet:
    """Read a final's sheet or, where it has none, make it of what its home has recorded; with the
    noise that its sweep has measured since. UsageError where too little is there."""
    written = paths.store / "finals" / final_id / SHEET_FILE
    if written.is_file():
        sheet = read_sheet(written)
    else:
        origin = find_origin(paths, final_id)
        sheet = build_sheet(paths, origin, _dataset(paths, origin.started))
    return replace(sheet, noise=noise_of(paths, sheet.sweep)) if sheet.sweep else sheet


def noise_of(paths: Paths, sweep_id: str) -> Noise:
    """The spread over seeds that a sweep of this home has measured, if it has."""
    ledger = paths.sweep(sweep_id).ledger
    if not ledger.is_file():
        return Noise()
    try:
        floor = measure(replay(ledger)).noise
    except UsageError:  # one seed, or nothing that counts
        return Noise()
    if floor is None or floor.sd_bpb == 0:  # a seed that reaches nothing
        return Noise()
    return Noise(sd_bpb=floor.sd_bpb, df=floor.df)


@dataclass(frozen=True, slots=True)
class Sheets:
    """Leaves the sheets of a sweep's finals in their folders."""

    paths: Paths
    dataset: Dataset

    def leave(self, origin: Origin, *, was_found: bool = False) -> None:
        """Write a scored final's sheet, unless it has one or is not in the store. A final that was
        found there, not computed, is told by the ledger of whoever did."""
        folder = self.paths.store / "finals" / origin.final
        if not (folder / "result.json").is_file() or (folder / SHEET_FILE).is_file():
            return
        if was_found:
            origin = replace(origin, facts={})
            with suppress(UsageError):
                origin = find_origin(self.paths, origin.final)
        write_sheet(folder / SHEET_FILE, build_sheet(self.paths, origin, self.dataset))


def find_origin(paths: Paths, final_id: str) -> Origin:
    """Look a final up in the ledgers of its home, the newest first: in that of the run which
    computed it, where one says so. UsageError where none has scored it."""
    mark = f'"final":"{final_id}"'.encode()
    found: Origin | None = None
    for ledger in sorted(paths.sweeps.glob("*/events.jsonl"), key=lambda path: -_modified(path)):
        if mark in ledger.read_bytes():
            for origin in _origins(ledger, final_id):
                if origin.facts:
                    return origin
                found = found or origin
    if found is None:
        raise UsageError(
            f"{final_id}: no ledger in {paths.sweeps} has scored it; give a final's id as "
            "`fairway best` prints it"
        )
    return found


def _origins(ledger: Path, final_id: str) -> Iterator[Origin]:
    """Every time that a ledger tells of a final's score."""
    started: Event = {}
    branches: dict[str, str | None] = {}
    for event in read(ledger):
        match event["event"]:
            case "sweep_started":
                started = event
            case "training_started":
                branches[event["training"]] = event.get("branch")
            case "final_scored" if event["final"] == final_id and event["result"] is not None:
                yield Origin(
                    started=started,
                    facts={} if event["cached"] else started.get("facts") or {},
                    final=final_id,
                    training=event["training"],
                    seed=event["seed"],
                    branch=branches.get(event["training"]),
                    fitted=bool(event.get("fitted")),
                )


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _dataset(paths: Paths, started: Event) -> Dataset:
    """The data of a sweep, told by its digest."""
    facts = started.get("facts") or {}
    digest = facts.get("data_digest")
    for folder in sorted((paths.home / "data").glob("*/manifest.json")):
        if (found := load_dataset(folder.parent)).digest == digest:
            return found
    raise UsageError(
        f"{paths.home / 'data'}: has no dataset {facts.get('data_name')!r} with digest {digest}; "
        "prepare or fetch it again"
    )


def build_sheet(paths: Paths, origin: Origin, dataset: Dataset) -> Sheet:
    """Put a scored final's sheet together from the folders of its stages."""
    training = paths.store / "trainings" / origin.training
    final = paths.store / "finals" / origin.final
    train_task = _read(TrainTask, training / "task.json")
    final_task = _read(FinalTask, final / "task.json")
    trained = _read(TrainResult, training / "result.json")
    final_worker = read_facts(final)
    resources = (origin.started.get("spec") or {}).get("resources") or {}
    return Sheet(
        final=origin.final,
        training=origin.training,
        sweep=origin.started["sweep_id"],
        fitted=origin.fitted,
        seed=origin.seed,
        recipe=recipe_of(train_task, final_task, _recipe_name(origin.started), dataset),
        train_task=train_task,
        final_task=final_task,
        world_size=trained.world_size,
        device="cuda" if resources.get("gpus_per_worker") else "cpu",
        threads=resources.get("cpus_per_worker", 1),
        data=describe_data(dataset),
        code_digest=final_worker and final_worker.code_digest,
        spec_version=read_json(training / "inputs.json")["spec_version"],
        branch=_branch(paths, origin.branch),
        driver=_driver(origin),
        train_worker=read_facts(training),
        final_worker=final_worker,
        result=_result(trained, _read(FinalResult, final / "result.json")),
        noise=Noise(),
    )


def recipe_of(train: TrainTask, final: FinalTask, name: str, dataset: Dataset) -> Recipe:
    """The one recipe that asks for both tasks, on this data. Its evaluation sets the block of the
    training's own last score too, which moves no weight."""
    is_ema = final.entry.startswith(_EMA)
    decay = float(final.entry.removeprefix(_EMA)) if is_ema else None
    averages = replace(train.train.averages, ema_decay=decay)
    return Recipe(
        name=name,
        model=train.model,
        data=DataSpec(name=dataset.name, digest=dataset.digest),
        train=replace(train.train, averages=averages),
        final=final.final,
        evaluate=final.evaluate,
        observe=train.observe,
    )


def _read(cls: type[Any], path: Path) -> Any:
    return parse(cls, read_json(path), str(path))


def _recipe_name(started: Event) -> str:
    return (started.get("effective_recipe") or {}).get("name") or str(started["recipe"])


def _branch(paths: Paths, state: str | None) -> Branch | None:
    if state is None:
        return None
    left = Store(paths.store).find("states", state)
    return Branch(state=state, step=None if left is None else left["step"])


def _driver(origin: Origin) -> DriverFacts:
    known = {field.name: origin.facts.get(field.name) for field in fields(DriverFacts)}
    return parse(DriverFacts, known, f"sweep {origin.started['sweep_id']}: facts")


def _result(trained: TrainResult, final: FinalResult) -> SheetResult:
    score = final.score
    same = ("entry", "num_params", "artifact_bytes", "weights_bytes", "code_bytes")
    return SheetResult(
        **{name: getattr(final, name) for name in (*same, "weights_sha256", "finalize_clock_s")},
        **{name: getattr(score, name) for name in ("val_bpb", "val_loss", "tokens", "bytes")},
        steps=trained.steps,
        train_tokens=trained.tokens,
        train_clock_s=trained.train_clock_s,
        eval_clock_s=score.eval_clock_s,
        audit=tuple(Verdict(**asdict(rule)) for rule in final.audit),
    )


def sheet_document(sheet: Sheet) -> dict[str, Any]:
    """A sheet as plain data. Absent parts of a spec are left out, a missing fact is null."""
    told = (Noise, Branch, DriverFacts, WorkerFacts)
    values = {field.name: getattr(sheet, field.name) for field in fields(sheet)}
    return {n: asdict(v) if isinstance(v, told) else dump(v) for n, v in values.items()}


def write_sheet(path: Path, sheet: Sheet) -> None:
    """Write a sheet's file, whole or not at all."""
    write_json(path, sheet_document(sheet))


def read_sheet(path: Path) -> Sheet:
    """Read a sheet from its file, or from the folder that has it. DataError names the file and the
    field that is wrong."""
    file = path / SHEET_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a sheet.json, or a folder with one")
    if file.stat().st_size > MAX_SHEET_BYTES:
        raise DataError(f"{file}: larger than {MAX_SHEET_BYTES:,} bytes; a sheet is a short text")
    try:
        data = read_json(file)
    except RecursionError as error:
        raise DataError(f"{file}: nested too deeply for a sheet") from error
    if not isinstance(data, dict):
        raise DataError(f"{file}: expected a JSON object; a sheet is one")
    try:
        return parse(Sheet, data, str(file))
    except UsageError as error:
        fault, made = str(error).splitlines()[0], data.get("spec_version")
        if isinstance(made, int) and made != SPEC_VERSION:
            fault += f" (the sheet is of spec version {made}, this code reads {SPEC_VERSION})"
        raise DataError(fault) from error

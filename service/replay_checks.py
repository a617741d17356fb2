"""What differs between a run sheet and the place where it is to be run again.

Every fact that differs is named with what was recorded and what is here. One that can change a
byte or a score counts, unless its name is allowed; the rest are notes: what a GPU, whose sums are
never twice the same, was driven by, or what only says when and where. Reads files, runs nothing.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from service.facts import DriverFacts, WorkerFacts
from service.identity import Inputs, final_id, training_id
from service.sheet import Sheet
from service.sheet_data import describe_data
from service.specs import Resources
from trainer.codec import dump, flatten, parse, suggest, with_values
from trainer.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, read_manifest
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.protocol import SPEC_VERSION
from trainer.runtime.files import sha256_file
from trainer.specs.recipe import Recipe
from trainer.specs.task import FinalTask, TrainTask, final_task, train_task

SEED_PATH = "train.seed"  # its difference goes by the name `seed`
SHOWN = 3  # differences of the data that a message names
MAX_SD_BPB = 0.0017  # the largest over seeds that techniques 1.8 has published ones of
_ALWAYS = frozenset({"torch", "numpy", "python", "device"})
"""Facts of a worker that count on every device."""
_ON_CPU = frozenset({"cpu_capability", "matmul_precision", "deterministic"})
"""Facts that set the order of a CPU's sums."""
_CPU_VARIABLES = frozenset({"MKL_CBWR", "ONEDNN_MAX_CPU_ISA"})
"""Variables that set it too, and that no other fact tells: cpu_capability has ATEN's, and how many
threads there are a replay sets itself."""
_COMPRESSORS = {
    "zstd": ("zstandard", "libzstd"),
    "brotli": ("brotli",),
    "lzma": ("liblzma",),
    "zlib": ("zlib",),
    "range": ("constriction",),
}
_OWN = frozenset(
    {"code", "data", "final", "noise", "seed", "spec", "threads", "training", "world_size"}
)
_NAMES = _OWN | _ALWAYS | _ON_CPU | _CPU_VARIABLES | {"zlib"}.union(*_COMPRESSORS.values())
"""What can count, besides the recipe's paths."""
_TOLD_APART = frozenset({"code_digest", "environment", "fused", "resumed", "spec_version"})


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact that is not as it was recorded. counts: it can change a byte or a score."""

    name: str
    recorded: str
    here: str
    counts: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.recorded} → {self.here}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be run: the sheet's tasks, or what -S makes of them."""

    train_task: TrainTask
    final_task: FinalTask
    differences: tuple[Difference, ...]


def wanted_of(sheet: Sheet, values: Sequence[tuple[str, Any]]) -> Wanted:
    """The tasks of a sheet with -S values laid over its recipe. A value that is another than the
    recorded one is a difference by its path; another seed is `seed`. A clock that ended nothing is
    left out: on a slower machine it might."""
    if not values:
        return Wanted(_without_idle_clock(sheet, sheet.train_task), sheet.final_task, ())
    plain = dump(sheet.recipe)
    recipe = parse(Recipe, with_values(plain, values), "-S")
    made = dump(recipe)
    pairs = ((path, _at(plain, path), _at(made, path)) for path, _ in values)
    # Its own last score does not follow from the evaluation: it stays what it was.
    task = replace(train_task(recipe), parity_window=sheet.train_task.parity_window)
    return Wanted(
        _without_idle_clock(sheet, task),
        final_task(recipe),
        tuple(
            Difference("seed" if path == SEED_PATH else path, _text(old), _text(new))
            for path, old, new in pairs
            if old != new
        ),
    )


def _without_idle_clock(sheet: Sheet, task: TrainTask) -> TrainTask:
    recorded = sheet.train_task.train
    is_idle = recorded.schedule.basis == "steps" and sheet.result.steps == recorded.iterations
    if not is_idle or task.train.schedule.basis == "wallclock":
        return task
    return replace(task, train=replace(task.train, max_clock_s=None))


def paths_of(sheet: Sheet, values: Sequence[tuple[str, Any]]) -> set[str]:
    """Every path that a value of the sheet's recipe has, the parts that hold others included."""
    leaves = [*flatten(sheet.recipe), *(path for path, _ in values)]
    parts = [path.split(".") for path in leaves]
    return {".".join(words[:end]) for words in parts for end in range(1, len(words) + 1)}


def _at(data: Any, path: str) -> Any:
    """What lies at a dotted path of plain data, None where nothing does."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def check_sheet(sheet: Sheet) -> Iterator[Difference]:
    """Hold a sheet against itself and against the code that is to run it."""
    if sheet.spec_version != SPEC_VERSION:
        yield Difference("spec", f"version {sheet.spec_version}", f"version {SPEC_VERSION}")
        return
    task = sheet.train_task
    if sheet.seed != task.train.seed:
        yield Difference("seed", str(sheet.seed), f"{task.train.seed} in train_task")
    made = train_task(sheet.recipe)
    made = replace(made, parity_window=task.parity_window, observe=task.observe)
    told = flatten({"train": made, "final": final_task(sheet.recipe)})
    own = flatten({"train": task, "final": sheet.final_task})
    for path in sorted(told.keys() | own.keys()):
        if told.get(path) != own.get(path):
            kept, asked = _text(own.get(path)), _text(told.get(path))
            yield Difference(path, f"{kept} in the tasks", f"{asked} in the recipe")
    named = sheet.recipe.data
    for part, asked in (("name", named.name), ("digest", named.digest)):
        kept = getattr(sheet.data, part)
        if asked is not None and asked != kept:
            yield Difference("data", f"{part} {kept} in the sheet", f"{asked} in the recipe")
    if sheet.device == "cpu":
        for threads in {facts.threads: None for _, facts in _workers(sheet) if facts is not None}:
            if threads not in (None, sheet.threads):
                yield Difference("threads", str(threads), f"{sheet.threads} in the sheet")
    yield from _check_ids(sheet)


def _check_ids(sheet: Sheet) -> Iterator[Difference]:
    """The ids say what ran: a sheet that was edited has others."""
    is_cuda = sheet.device == "cuda"
    resources = Resources(
        workers=sheet.world_size,
        cpus_per_worker=sheet.threads,
        gpus_per_worker=int(is_cuda),
    )
    inputs = Inputs(sheet.data.digest, sheet.code_digest or "", sheet.data.vocab_size)
    state = None if sheet.branch is None else sheet.branch.state
    trainings = [training_id(sheet.train_task, inputs, resources, at) for at in (None, state)]
    train = sheet.train_task.train
    # Where a branch moves bits the id has its state: without knowing that, nothing is shown.
    moves = is_cuda or train.compile or train.max_clock_s is not None
    if sheet.training not in trainings:
        told = f"{trainings[0]} by its task and its data"
        is_shown = sheet.branch is not None or not moves
        yield Difference("training", sheet.training, told, counts=is_shown)
    if sheet.fitted:
        yield Difference("final", sheet.final, "not checked: it was fitted", counts=False)
    if sheet.fitted or sheet.code_digest is None:
        return
    device = {"device": "cuda"} if is_cuda else {"device": "cpu", "threads": sheet.threads}
    final = final_id(sheet.final_task, sheet.training, inputs, device)
    if sheet.final != final:
        yield Difference("final", sheet.final, f"{final} by its task and its training")


def check_data(sheet: Sheet, folder: Path) -> Iterator[Difference]:
    """Hold every file of a dataset against the sheet: is it there, its size, its sha256."""
    manifest = read_manifest(folder)
    found = describe_data(Dataset(folder=folder, manifest=manifest))
    for file in sheet.data.files:
        yield from _check_file(folder / file.name, file.bytes, file.sha256)
    yield from _check_file(folder / TOKENIZER_FILE, None, sheet.data.tokenizer_sha256)
    listed = {file.name for file in sheet.data.files}
    for file in found.files:
        if file.name not in listed:
            yield Difference("data", f"no {file.name}", f"{folder / file.name} in the manifest")
    totals = {split.name: asdict(split) for split in found.splits}
    for split in sheet.data.splits:
        for part, old in asdict(split).items():
            new = totals[split.name][part]
            if old != new:
                told = f"{split.name}.{part} {old:,}"
                yield Difference("data", told, f"{new:,} in {folder / MANIFEST_FILE}")


def _check_file(path: Path, size: int | None, sha256: str) -> Iterator[Difference]:
    if not path.is_file():
        yield Difference("data", f"{path.name} sha256 {sha256[:12]}", f"{path}: missing")
        return
    there = path.stat().st_size
    if size is not None and there != size:
        yield Difference("data", f"{path.name} of {size:,} bytes", f"{path}: {there:,} bytes")
    elif (found := sha256_file(path)) != sha256:
        yield Difference("data", f"{path.name} sha256 {sha256[:12]}", f"{path}: {found[:12]}")


def check_workers(
    sheet: Sheet, trains: WorkerFacts, scores: WorkerFacts, num_gpus: int
) -> Iterator[Difference]:
    """Hold what the stages were computed with against this machine: what a worker of the replay
    finds when it trains, and when it makes and scores the final."""
    counting = _counting(sheet)
    told = [(role, facts) for role, facts in _workers(sheet) if facts is not None]
    skipped = _TOLD_APART | ({"threads"} if sheet.device == "cpu" else set[str]())
    for name in (field.name for field in fields(WorkerFacts) if field.name not in skipped):
        others: dict[tuple[str, Any], list[str]] = {}
        for role, facts in told:
            found = getattr(trains if role.startswith("training") else scores, name)
            value = getattr(facts, name)
            if value not in (None, (), found):
                others.setdefault((_text(value), found), []).append(role)
        for (value, found), roles in others.items():
            recorded = value if len(roles) == len(told) else f"{value} ({roles[0]})"
            is_counted = name in counting and not (name == "python" and _minor(value, found))
            yield Difference(name, recorded, _text(found), is_counted)
    yield from _check_variables(sheet, told, _variables(scores))
    if sheet.device == "cuda" and num_gpus < sheet.world_size:
        yield Difference("world_size", f"{sheet.world_size} GPUs", f"{num_gpus} GPUs")


def _check_variables(
    sheet: Sheet, told: Sequence[tuple[str, WorkerFacts]], here: Mapping[str, str]
) -> Iterator[Difference]:
    """Hold the environment's variables, by name, against those that replay's workers will have."""
    recorded = [(role, _variables(facts)) for role, facts in told]
    for name in sorted({*here}.union(*(variables for _, variables in recorded))):
        counts = name in _CPU_VARIABLES and sheet.device == "cpu"
        found = here.get(name, "absent")
        others = [(role, variables.get(name, "absent")) for role, variables in recorded]
        for value in dict.fromkeys(value for _, value in others if value != found):
            roles = [role for role, own in others if own == value]
            shown = value if len(roles) == len(told) else f"{value} ({roles[0]})"
            yield Difference(name, shown, found, counts)


def _variables(facts: WorkerFacts) -> dict[str, str]:
    pairs = (text.partition("=") for text in facts.environment)
    return {name: value for name, _, value in pairs}


def _workers(sheet: Sheet) -> Iterator[tuple[str, WorkerFacts | None]]:
    """Who computed the stages, by role: first who began one, then who went on with it."""
    for role, facts in (("training", sheet.train_worker), ("final", sheet.final_worker)):
        yield role, facts
        for number, later in enumerate(facts.resumed if facts else (), start=1):
            yield f"{role}, resumed {number}", later


def _counting(sheet: Sheet) -> Collection[str]:
    """The facts that can change a byte of this final."""
    final = sheet.final_task.final
    code = {"zip": "zlib", "packed": "liblzma"}[final.code]
    names = {*_ALWAYS, *_COMPRESSORS[final.compress.kind], code}
    return names | _ON_CPU if sheet.device == "cpu" else names


def _minor(recorded: str, here: str | None) -> bool:
    """Whether two Pythons are of one minor version."""
    return recorded.split(".")[:2] == (here or "").split(".")[:2]


def check_code(sheet: Sheet, here: str) -> Iterator[Difference]:
    """Hold the counted code against what trained, finalized and scored."""
    if sheet.code_digest not in (None, here):
        yield Difference("code", sheet.code_digest[:12], here[:12])
    trained = sheet.train_worker and sheet.train_worker.code_digest
    if trained not in (None, here, sheet.code_digest):
        yield Difference("code", f"{trained[:12]} (training)", here[:12], counts=False)


def check_driver(sheet: Sheet, here: DriverFacts) -> Iterator[Difference]:
    """Notes on what the sweep was started from: packages that move no byte, commit, image."""
    recorded, found = asdict(sheet.driver), asdict(here)
    known = {field.name for field in fields(WorkerFacts)} | {"git_diff_bytes"}  # told otherwise
    for name, value in recorded.items():
        if value is not None and value != found[name] and name not in known:
            yield Difference(name, _text(value), _text(found[name]), counts=False)


def check_noise(sheet: Sheet) -> Iterator[Difference]:
    """Hold a spread over seeds that nothing but the sheet tells of against the published ones: no
    id has it, and by a large one anything would be the same."""
    told = sheet.noise.sd_bpb
    if told is not None and told > MAX_SD_BPB:
        recorded = f"sd_bpb {told:g} in the sheet"
        yield Difference("noise", recorded, f"not measured, {MAX_SD_BPB:g} is the largest known")


def missing_facts(sheet: Sheet) -> Iterator[Difference]:
    """Notes on what the sheet does not tell."""
    for role, facts in _workers(sheet):
        if facts is None:
            yield Difference(f"{role} facts", "not recorded", "not compared", counts=False)
    if sheet.code_digest is None:
        yield Difference("code", "not recorded", "not compared", counts=False)


def require_allowed(
    where: str, found: Iterable[Difference], allowed: Collection[str], paths: Collection[str] = ()
) -> None:
    """Raise UsageError, with every difference that counts, unless all of them are allowed by name;
    and for a name that no difference can have. paths: of the recipe, which may be named too."""
    found = list(found)
    names = _NAMES | {each.name for each in found if each.counts}
    known = names | (set(paths) - {SEED_PATH})
    for name in sorted(set(allowed) - known):
        raise UsageError(
            f"--allow {name}: nothing that counts, and no path of the recipe, has that name"
            f"{suggest(name, sorted(names))}"
        )
    barred = [each for each in found if each.counts and each.name not in allowed]
    if not barred:
        return
    data = [each for each in barred if each.name == "data"]
    shown = [each for each in barred if each.name != "data"] + data[:SHOWN]
    more = f" (and {len(data) - SHOWN} more of the data)" if len(data) > SHOWN else ""
    flags = " ".join(f"--allow {name}" for name in dict.fromkeys(each.name for each in barred))
    raise UsageError(
        f"{where}: not run, nothing was spent: {'; '.join(map(str, shown))}{more}; restore what "
        f"was recorded, or accept it with {flags}"
    )


def find_data(sheet: Sheet, home_data: Path) -> Path | None:
    """The folder of the sheet's dataset in a home: by its digest, else by its name."""
    named = home_data / sheet.data.name
    for manifest in sorted(home_data.glob(f"*/{MANIFEST_FILE}")):
        try:
            if read_manifest(manifest.parent).digest == sheet.data.digest:
                return manifest.parent
        except DataError:  # another dataset's fault is not this one's
            continue
    return named if named.is_dir() else None


def require_data(sheet: Sheet, home_data: Path) -> Path:
    """The same, or UsageError where there is none."""
    folder = find_data(sheet, home_data)
    if folder is None:
        raise UsageError(
            f"{home_data}: no dataset {sheet.data.name!r} with digest {sheet.data.digest}; prepare "
            "or fetch it, or name its folder with --data"
        )
    return folder


def _text(value: Any) -> str:
    """A fact in words; several GPUs or variables in a line."""
    if value is None:
        return "absent"
    if isinstance(value, tuple):
        return ", ".join(_text(dump(part)) for part in value) or "none"
    if isinstance(value, dict):
        return " ".join(f"{name}={_text(part)}" for name, part in value.items()) or "present"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)

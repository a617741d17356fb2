"""A record folder held against itself, and against what is counted and scored anew.

Everything that README.md, submission.json, the logs and requirements.txt claim follows from the
sheets and from the files' bytes (`service.record`): it is written again and compared. The sheets'
scores are held against a clean run: a weights file is decoded and scored by the folder's own
train_gpt.py, which runs only where it is, byte for byte, what the sheet's recipe is cut into.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from service.clean_room import CleanRoom, network
from service.record import (
    CODE,
    REQUIREMENTS,
    SOURCE,
    By,
    Entry,
    Record,
    claims_of,
    fault_in,
    log_name,
    requirements_of,
    sheet_name,
    val_split,
    weights_name,
)
from service.record_audit import audit_mismatches, untold
from service.record_folder import MAX_LOG_BYTES, README, SUBMISSION, Folder
from service.record_log import head_of, tail_of
from service.record_readme import readme_of, texts_of
from service.record_text import (
    Mismatch,
    claim_mismatches,
    log_mismatches,
    people_mismatches,
    readme_mismatches,
    shown,
    text_mismatches,
)
from service.record_weights import fits_weights, header_mismatches
from service.replay_checks import check_sheet
from service.sheet import MAX_SHEET_BYTES, Sheet, read_sheet
from service.singlefile.write import write_single_file
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.runtime.files import sha256_file

MAX_SEEDS = 100
MAX_SEED = 2**63
MAX_WEIGHTS_BYTES = 8 * ARTIFACT_BYTES_CAP
MAX_CODE_BYTES = 1 << 23
MAX_THREADS = 1024
# How long a score may take in the clean room: loading, and what another machine is slower by.
LEAST_ROOM_S, SLOWER = 1_800.0, 20.0
# How far two scores of one model are apart: on CPUs, whose float32 sums differ in order at most;
# and where a GPU is in it, as with a bank's parity.
SAME_BPB = {"cpu": 1e-5, "cuda": 1e-3}

FindData = Callable[[Sheet], Dataset]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found. scored: the clean runs' val_bpb by seed. network: how it was kept away."""

    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    scored: dict[int, float]
    network: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where and on what weights are scored."""

    room: CleanRoom
    dataset: Dataset


def verify(
    folder: Folder, find_data: FindData, room: CleanRoom, *, trusts: bool = False
) -> Verification:
    """Hold every claim of a record folder against its bytes and against a clean run.

    find_data: gives the dataset that a sheet names. trusts: whether a train_gpt.py runs that is not
    what the first sheet's recipe is cut into. UsageError where the folder is no record at all, or
    the data at hand is not what was scored.
    """
    claims = folder.document(SUBMISSION)
    seeds = _seeds(folder, claims)
    wrong = _missing(folder, seeds)
    sheets = _sheets(folder, seeds, wrong)
    if len(sheets) < len(seeds) or _absent(folder, seeds):
        return Verification(tuple(wrong), (), seeds, {})
    files = _contents(folder, seeds)
    record = _record(folder, claims, sheets, files)
    wrong += _paper_mismatches(folder, record, claims)
    wrong += _file_mismatches(record, files)
    notes, scored = list(untold(record)), dict[int, float]()
    odd = ({each.file for each in wrong} | _altered(folder, claims)) & set(map(sheet_name, seeds))
    # Of a model that its weights do not have nothing is cut: it could be of any size.
    is_cut = not odd and all(fits_weights(e, files[weights_name(e.seed)]) for e in record.entries)
    strange = list(_code_mismatches(record, files)) if is_cut else []
    if not is_cut:
        what = "a sheet does not hold" if odd else "a sheet's model is not its weights' own"
        notes.append(f"{CODE} was not held against its recipe: {what}")
    if trusts:
        notes += [f"{each.line()}; trusted" for each in strange]
    else:
        wrong += strange
    if trusts or (is_cut and not any(each.file == CODE for each in strange)):
        try:
            place = _place(room, find_data, sheets[0])
        except UsageError as error:
            if not wrong:
                raise
            notes.append(f"nothing was scored: {error}")
        else:
            for entry in record.entries:
                wrong += _score_mismatches(entry, files, place, scored)
    else:
        what = "it is not what its recipe makes" if is_cut else "it was not held against its recipe"
        notes.append(f"{CODE} was not run: {what}")
    wrong += _hash_mismatches(folder, claims, record, {each.file for each in wrong})
    notes += [f"{name} was not looked at: no record has it" for name in _stray(folder, record)]
    if record.left_out:
        notes.append(f"{SUBMISSION}: seeds_left_out was not checked: no sheet tells of them")
    return Verification(tuple(wrong), tuple(notes), seeds, scored, network() if scored else None)


def _place(room: CleanRoom, find_data: FindData, sheet: Sheet) -> Place:
    place = Place(room, find_data(sheet))
    check_data(place.dataset, sheet)
    return place


def _altered(folder: Folder, claims: Mapping[str, Any]) -> set[str]:
    """The sheets that are not those whose sha256 submission.json has."""
    claimed = claims.get("files")
    told: Mapping[str, Any] = claimed if isinstance(claimed, dict) else {}
    names = [name for name in folder.at_top(".json") if name in told]
    return {
        name
        for name in names
        if hashlib.sha256(folder.read(name, MAX_SHEET_BYTES)).hexdigest() != told[name]
    }


def _seeds(folder: Folder, claims: Mapping[str, Any]) -> tuple[int, ...]:
    seeds: Any = claims.get("seeds")
    fits = isinstance(seeds, list) and 0 < len(seeds) <= MAX_SEEDS
    if not fits or not all(type(seed) is int and 0 <= seed < MAX_SEED for seed in seeds):
        raise DataError(f"{folder.root / SUBMISSION}: seeds: expected a list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise DataError(f"{folder.root / SUBMISSION}: seeds: one is listed twice")
    return tuple(seeds)


def _absent(folder: Folder, seeds: tuple[int, ...]) -> list[str]:
    """What the rest of the checks cannot do without."""
    needed = [CODE, SOURCE, *map(weights_name, seeds), *map(sheet_name, seeds)]
    return [name for name in needed if name not in folder.names]


def _missing(folder: Folder, seeds: tuple[int, ...]) -> list[Mismatch]:
    needed = [README, REQUIREMENTS, *map(log_name, seeds), *_absent(folder, seeds)]
    return [
        Mismatch(name, "file", "part of the record", "missing")
        for name in needed
        if name not in folder.names
    ]


def _sheets(folder: Folder, seeds: tuple[int, ...], wrong: list[Mismatch]) -> list[Sheet]:
    """The sheets that can be read; what is wrong with the others goes to `wrong`."""
    sheets: list[Sheet] = []
    for seed in seeds:
        name = sheet_name(seed)
        if name not in folder.names:
            continue
        try:
            sheet = read_sheet(folder.path(name))
            val_split(sheet)
        except UsageError as error:
            reason = str(error).splitlines()[0].removeprefix(f"{folder.path(name)}: ")
            wrong.append(Mismatch(name, "sheet", "readable", shown(reason)))
            continue
        sheets.append(sheet)
        if sheet.seed != seed:
            wrong.append(Mismatch(name, "seed", str(sheet.seed), str(seed)))
        for each in check_sheet(sheet):
            if each.counts:
                wrong.append(Mismatch(name, each.name, shown(each.recorded), shown(each.here)))
        for field, claim, found in (
            ("data.digest", sheet.data.digest, sheets[0].data.digest),
            ("code_digest", sheet.code_digest or "nothing", sheets[0].code_digest or "what scored"),
        ):
            if claim != found:
                wrong.append(Mismatch(name, field, shown(claim), shown(found)))
        if sheet.threads > MAX_THREADS:
            wrong.append(Mismatch(name, "threads", str(sheet.threads), f"at most {MAX_THREADS}"))
    return sheets


def check_data(dataset: Dataset, sheet: Sheet) -> None:
    """Raise UsageError unless a dataset's val split and tokenizer are, byte for byte, the sheet's;
    the message names the file."""
    advice = "give the dataset that it was scored on with --data"
    if sha256_file(dataset.tokenizer_path) != sheet.data.tokenizer_sha256:
        raise UsageError(f"{dataset.tokenizer_path}: not the tokenizer of {sheet.final}; {advice}")
    named = {file.name: file for file in sheet.data.files if file.split == "val"}
    shards = dataset.manifest.splits["val"].shards
    for name in sorted(named.keys() ^ {shard.file for shard in shards}):
        raise UsageError(f"{dataset.folder / name}: not in both this and the sheet's val; {advice}")
    for shard in shards:
        if sha256_file(dataset.folder / shard.file) != named[shard.file].sha256:
            raise UsageError(
                f"{dataset.folder / shard.file}: sha256 differs from the sheet's; {advice}"
            )


def _contents(folder: Folder, seeds: tuple[int, ...]) -> dict[str, bytes]:
    """The bytes of what is counted or run; read once, so that what is run is what was looked at."""
    files = {name: folder.read(name, MAX_CODE_BYTES) for name in (CODE, SOURCE)}
    for seed in seeds:
        files[weights_name(seed)] = folder.read(weights_name(seed), MAX_WEIGHTS_BYTES)
    return files


def _record(
    folder: Folder, claims: Mapping[str, Any], sheets: list[Sheet], files: Mapping[str, bytes]
) -> Record:
    """The record as its sheets and its files' sizes tell it, in the words of its people."""

    def words(key: str) -> str:
        value = claims.get(key)
        if not isinstance(value, str):
            raise DataError(f"{folder.root / SUBMISSION}: {key}: expected a text")
        return value

    people = {key: words(key) for key in ("author", "github_id") if claims.get(key) is not None}
    by = By(
        author=people.get("author"), github_id=people.get("github_id"),
        name=words("name"), blurb=words("blurb"), date=words("date"),
    )  # fmt: skip
    if (fault := fault_in(by)) is not None:
        raise DataError(f"{folder.root / SUBMISSION}: {fault[0]}: {fault[1]}")
    entries = tuple(Entry(sheet, len(files[weights_name(sheet.seed)])) for sheet in sheets)
    left_out: Any = claims.get("seeds_left_out")
    left_out = {} if left_out is None else left_out
    if not isinstance(left_out, dict) or not all(
        seed.isdecimal() and len(seed) < 20 and (score is None or isinstance(score, Decimal))
        for seed, score in left_out.items()
    ):
        raise DataError(f"{folder.root / SUBMISSION}: seeds_left_out: expected scores by seed")
    others = {int(seed): score and float(score) for seed, score in left_out.items()}
    return Record(entries, by, len(files[CODE]), others)


def _paper_mismatches(
    folder: Folder, record: Record, claims: Mapping[str, Any]
) -> Iterator[Mismatch]:
    """What README.md, submission.json, the logs and requirements.txt claim."""
    said = {key: value for key, value in claims.items() if key != "files"}
    if said.get("seeds_left_out", ...) is None:
        said.pop("seeds_left_out")  # none were, in other words
    expected = claims_of(record, {})
    expected.pop("files")
    yield from claim_mismatches(expected, said)
    if record.bytes_total > ARTIFACT_BYTES_CAP:
        found = f"{record.bytes_total} bytes"
        yield Mismatch(CODE, "artifact", f"at most {ARTIFACT_BYTES_CAP}", found)
    known = texts_of(record.wordless())
    words = {key: word for key, word in asdict(record.by).items() if key != "date"}
    yield from people_mismatches(words, known)
    if README in folder.names:
        yield from readme_mismatches(readme_of(record), folder.text(README), known)
    if REQUIREMENTS in folder.names:
        text = folder.text(REQUIREMENTS)
        yield from text_mismatches(REQUIREMENTS, requirements_of(record), text)
    for entry in record.entries:
        name = log_name(entry.seed)
        if name in folder.names:
            text, steps = folder.text(name, MAX_LOG_BYTES), entry.sheet.result.steps
            yield from log_mismatches(name, head_of(entry), tail_of(record, entry), text, steps)


def _file_mismatches(record: Record, files: Mapping[str, bytes]) -> Iterator[Mismatch]:
    """What the sheets claim of the weights, and of themselves."""
    for entry in record.entries:
        sheet, name = entry.sheet, weights_name(entry.seed)
        result = sheet.result
        found = hashlib.sha256(files[name]).hexdigest()
        if found != result.weights_sha256:
            yield Mismatch(name, "sha256", result.weights_sha256, found)
        if len(files[name]) != result.weights_bytes:
            yield Mismatch(name, "bytes", str(result.weights_bytes), str(len(files[name])))
        total = result.weights_bytes + result.code_bytes
        if result.artifact_bytes != total:
            field = "result.artifact_bytes"
            yield Mismatch(sheet_name(entry.seed), field, str(result.artifact_bytes), str(total))
        yield from audit_mismatches(entry)
        yield from header_mismatches(entry, files[name])


def _code_mismatches(record: Record, files: Mapping[str, bytes]) -> Iterator[Mismatch]:
    """Whether the code is what the first sheet's recipe is cut into."""
    with tempfile.TemporaryDirectory(prefix="fairway-cut-") as place:
        first = record.first
        made = write_single_file(first.train_task, first.final_task, Path(place), first.world_size)
        for name, path in ((CODE, made.path), (SOURCE, made.source_path)):
            expected, found = sha256_file(path), hashlib.sha256(files[name]).hexdigest()
            if expected != found:
                yield Mismatch(name, "sha256, as cut from its recipe", found, expected)


def _score_mismatches(
    entry: Entry, files: Mapping[str, bytes], place: Place, scored: dict[int, float]
) -> Iterator[Mismatch]:
    """Decode and score a seed's weights by themselves, and hold the sheet against that."""
    name, sheet, result = weights_name(entry.seed), entry.sheet, entry.sheet.result
    if hashlib.sha256(files[name]).hexdigest() != result.weights_sha256:
        return  # another file than the claims are about
    data = str(place.dataset.folder.resolve())
    words = [CODE, "--score", name, "--data", data]
    program = {CODE: files[CODE], name: files[name]}
    limit_s = LEAST_ROOM_S + SLOWER * max(result.eval_clock_s, 0.0)
    try:
        done = place.room.run(
            program, words, threads=sheet.threads, device=sheet.device, timeout_s=limit_s
        )
    except TimeoutError as error:
        yield Mismatch(name, "clean run", "a score", str(error))
        return
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        yield Mismatch(name, "clean run", "a score", shown(f"exit {done.returncode}: {last}"))
        return
    try:
        found = json.loads(done.stdout)
        scored[entry.seed] = float(found["val_bpb"])
        counts = {"tokens": int(found["tokens"]), "bytes": int(found["bytes"])}
        loss = float(found["val_loss"])
    except (ValueError, KeyError, TypeError):
        yield Mismatch(name, "clean run", "a score", shown(done.stdout.strip()))
        return
    sheet_file = sheet_name(entry.seed)
    for field, value in counts.items():
        if value != (claimed := getattr(result, field)):
            yield Mismatch(sheet_file, f"result.{field}", str(claimed), str(value))
    within = SAME_BPB[sheet.device]
    for field, value in (("val_bpb", scored[entry.seed]), ("val_loss", loss)):
        claimed = getattr(result, field)
        if not abs(value - claimed) <= within:
            yield Mismatch(sheet_file, f"result.{field}", f"{claimed:.8f}", f"{value:.8f}")


def _hash_mismatches(
    folder: Folder, claims: Mapping[str, Any], record: Record, named: set[str]
) -> Iterator[Mismatch]:
    """Files that are not those whose sha256 submission.json has; those named already are left."""
    claimed = claims.get("files")
    if not isinstance(claimed, dict):
        yield Mismatch(SUBMISSION, "files", shown(claimed), "sha256 by file")
        return
    for name in record.hashed_names:
        if name not in folder.names or name in named:
            continue
        found = hashlib.sha256(folder.read(name, MAX_WEIGHTS_BYTES)).hexdigest()
        if claimed.get(name) != found:
            yield Mismatch(name, "sha256", shown(claimed.get(name)), found)
    for name in sorted(claimed.keys() - set(record.hashed_names)):
        yield Mismatch(SUBMISSION, f"files.{shown(name)}", "a file", "none of the record's")


def _stray(folder: Folder, record: Record) -> list[str]:
    return sorted(set(folder.names) - set(record.file_names))

"""What a record folder holds and claims, as a function of its sheets and of its files' sizes. Pure.

    README.md submission.json requirements.txt
    train_gpt.py            the counted code: trains by itself, scores a weights file
    source/train_gpt.py     the same to be read
    train_seedN.log         one for every seed of the configuration
    sheet_seedN.json        the final's run sheet
    weights_seedN.fw        its weights; with train_gpt.py they are the artifact

Export writes by these functions, verify holds a folder against them: a claim that is not here is
made by nobody. What was not recorded is left out, never computed anew.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from typing import Any

from service.facts import WorkerFacts
from service.record_folder import README, SUBMISSION
from service.sheet import Sheet
from service.sheet_data import DataSplit
from service.singlefile.packages import ATTENTION, packages_of
from trainer.errors import DataError

CODE = "train_gpt.py"
SOURCE = "source/train_gpt.py"
REQUIREMENTS = "requirements.txt"
TRACK, OTHER_TRACK = "10min_16mb", "non_record_16mb"
DIGITS = 8  # of a score, as the field prints it


def log_name(seed: int) -> str:
    """The log of a seed."""
    return f"train_seed{seed}.log"


def sheet_name(seed: int) -> str:
    """The run sheet of a seed's final."""
    return f"sheet_seed{seed}.json"


def weights_name(seed: int) -> str:
    """The weights file of a seed's final."""
    return f"weights_seed{seed}.fw"


@dataclass(frozen=True, slots=True)
class By:
    """What only people know of a record. date: of the last score, unless they say another."""

    author: str | None
    github_id: str | None
    name: str
    blurb: str
    date: str


_MAX_WORDS = {"author": 200, "github_id": 100, "name": 200, "blurb": 1_000, "date": 10}


def fault_in(by: By) -> tuple[str, str] | None:
    """The field of people's words that cannot stand in a record's texts, and why; None without."""
    for field_name, limit in _MAX_WORDS.items():
        words: str | None = getattr(by, field_name)
        if words is None:
            continue
        if not words.strip() and field_name != "blurb":
            return field_name, "is empty; say something"
        if len(words) > limit:
            return field_name, f"{len(words):,} characters; at most {limit:,} are taken"
        if not words.isprintable():
            return field_name, "one line of printable characters is needed"
    try:
        is_date = date.fromisoformat(by.date).isoformat() == by.date
    except ValueError:
        is_date = False
    return None if is_date else ("date", f"{by.date!r} is no date; write it as YYYY-MM-DD")


@dataclass(frozen=True, slots=True)
class Entry:
    """One seed: its sheet, and the bytes that its weights file has in the folder."""

    sheet: Sheet
    weights_bytes: int

    @property
    def seed(self) -> int:
        return self.sheet.seed

    @property
    def step_avg_ms(self) -> float:
        result = self.sheet.result
        return round(1000 * result.train_clock_s / max(result.steps, 1), 2)


@dataclass(frozen=True, slots=True)
class Record:
    """A record folder's content. The first entry's seed is what train_gpt.py trains unless told.

    left_out: the configuration's other seeds, where somebody asked for one seed alone, with what
    they scored, None where they did not.
    """

    entries: tuple[Entry, ...]
    by: By
    code_bytes: int
    left_out: Mapping[int, float | None] = field(default_factory=dict[int, float | None])

    @property
    def first(self) -> Sheet:
        return self.entries[0].sheet

    def wordless(self) -> "Record":
        """The same without what no sheet tells: every number of it was recorded."""
        return replace(self, by=By(None, None, "", "", ""), left_out={})

    def artifact_bytes(self, entry: Entry) -> int:
        """Code and weights, as they lie in the folder."""
        return self.code_bytes + entry.weights_bytes

    @property
    def bytes_total(self) -> int:
        """The largest artifact of any seed."""
        return max(self.artifact_bytes(entry) for entry in self.entries)

    def mean(self, of: Callable[[Sheet], float]) -> float:
        return statistics.fmean(of(entry.sheet) for entry in self.entries)

    def spread(self, of: Callable[[Sheet], float]) -> float | None:
        """Standard deviation over the seeds, None of a single one."""
        values = [of(entry.sheet) for entry in self.entries]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def file_names(self) -> list[str]:
        """Every file of the folder, in the order in which a reader wants them."""
        seeds = [entry.seed for entry in self.entries]
        return [
            README,
            SUBMISSION,
            REQUIREMENTS,
            CODE,
            SOURCE,
            *(log_name(seed) for seed in seeds),
            *(sheet_name(seed) for seed in seeds),
            *(weights_name(seed) for seed in seeds),
        ]

    @property
    def hashed_names(self) -> list[str]:
        """The files whose sha256 submission.json has: all but itself and README.md, which people
        may add words to."""
        return [name for name in self.file_names if name not in (README, SUBMISSION)]


def claims_of(record: Record, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What submission.json says: the field's keys, the results by seed, and of every file that is
    not for people to edit its sha256."""
    first = record.first
    document: dict[str, Any] = {
        **asdict(record.by),
        "track": TRACK if all(_keeps_clocks(entry.sheet) for entry in record.entries)
        else OTHER_TRACK,
        "val_loss": round(record.mean(_val_loss), DIGITS),
        "val_bpb": round(record.mean(_val_bpb), DIGITS),
        "val_loss_std": _rounded(record.spread(_val_loss)),
        "val_bpb_std": _rounded(record.spread(_val_bpb)),
        "seeds_left_out": {
            str(seed): _rounded(score) for seed, score in record.left_out.items()
        } or None,
        "seeds": [entry.seed for entry in record.entries],
        "seed_results": {str(entry.seed): _seed_claims(record, entry) for entry in record.entries},
        "bytes_total": record.bytes_total,
        "bytes_code": record.code_bytes,
        "scored_tokens": first.result.tokens,
        "scored_bytes": first.result.bytes,
        "hardware": hardware(first),
        "pytorch_version": first.train_worker and first.train_worker.torch,
        "cuda_version": first.train_worker and first.train_worker.cuda,
        "fairway": _without_nulls({
            "version": first.driver.fairway,
            "git_commit": first.driver.git_commit,
            "git_dirty": first.driver.git_dirty,
            "sweep": first.sweep,
            "data": first.data.name,
            "data_digest": first.data.digest,
            "code_digest": first.code_digest,
            "spec_version": first.spec_version,
        }),
        "files": dict(hashes),
    }  # fmt: skip
    return _without_nulls(document, keep=("author", "github_id"))


def _without_nulls(document: dict[str, Any], keep: Sequence[str] = ()) -> dict[str, Any]:
    """What was not recorded is no claim."""
    return {key: value for key, value in document.items() if value is not None or key in keep}


def _seed_claims(record: Record, entry: Entry) -> dict[str, Any]:
    result = entry.sheet.result
    return {
        "val_loss": round(result.val_loss, DIGITS),
        "val_bpb": round(result.val_bpb, DIGITS),
        "artifact_bytes": record.artifact_bytes(entry),
        "weights_bytes": entry.weights_bytes,
        "weights_sha256": result.weights_sha256,
        "steps": result.steps,
        "step_avg_ms": entry.step_avg_ms,
        "train_time_s": round(result.train_clock_s, 3),
        "eval_time_s": round(result.eval_clock_s, 3),
        "final": entry.sheet.final,
    }


def _val_bpb(sheet: Sheet) -> float:
    return sheet.result.val_bpb


def _val_loss(sheet: Sheet) -> float:
    return sheet.result.val_loss


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _keeps_clocks(sheet: Sheet) -> bool:
    """Whether the audit has found both clocks kept, on the hardware that they are defined for."""
    return any(rule.id == "clocks" and rule.verdict == "pass" for rule in sheet.result.audit)


def hardware(sheet: Sheet) -> str | None:
    """What a training ran on, such as 8x NVIDIA H100 80GB HBM3; None where it was not recorded."""
    worker = sheet.train_worker
    if worker is None:
        return None
    names = sorted({gpu.name for gpu in worker.gpus})
    kind = " + ".join(names) if names else worker.cpu or worker.device
    return f"{sheet.world_size}x {kind}"


def val_split(sheet: Sheet) -> DataSplit:
    """The totals of the text that is scored; DataError where a sheet has none."""
    for split in sheet.data.splits:
        if split.name == "val":
            return split
    raise DataError(f"sheet of final {sheet.final}: data.splits has no val")


def facts_by_name(sheets: Sequence[Sheet]) -> list[tuple[str, str]]:
    """The recorded facts as rows: one where all seeds agree, else one a seed."""
    told = [_facts(sheet) for sheet in sheets]
    rows: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for facts in told for name in facts):
        values = [facts.get(name) for facts in told]
        if len(set(values)) == 1:
            rows.append((name, str(values[0])))
            continue
        pairs = zip(sheets, values, strict=True)
        rows += [(f"{name}, seed {sheet.seed}", str(value)) for sheet, value in pairs if value]
    return rows


def _facts(sheet: Sheet) -> dict[str, str]:
    driver = {
        "Fairway": sheet.driver.fairway,
        "git commit": sheet.driver.git_commit,
        "git dirty": sheet.driver.git_dirty,
        "git diff sha256": sheet.driver.git_diff_sha256,
        f"{sheet.driver.lock_file} sha256": sheet.driver.lock_sha256,
        "image": sheet.driver.image_digest,
    }
    shown = (
        "device python torch cuda cudnn nccl driver attention fused triton flash_attn numpy "
        "sentencepiece"
    )
    trained, scored = sheet.train_worker, sheet.final_worker
    facts = {name: getattr(trained, name, None) for name in shown.split()}
    for name in ("attention", "fused", "flash_attn"):
        facts[f"{name} of evaluation"] = getattr(scored, name, None)
    facts["threads"] = sheet.threads
    for name in ("zstandard", "libzstd", "brotli", "zlib", "liblzma", "constriction"):
        facts[name] = getattr(scored, name, None)
    named = {**driver, **facts}
    return {name: str(value) for name, value in named.items() if value is not None}


def requirements_of(record: Record) -> str:
    """The packages that train_gpt.py needs, at the versions that were recorded."""
    lines = ["# What the runs were computed with; another build may sum in another order."]
    for package in packages_of(record.first.final_task.final):
        lines.append(_pin(package, _version(record.first.final_worker, package)))
    lines += _attention_packages(record.first)
    return "\n".join(lines) + "\n"


def _attention_packages(sheet: Sheet) -> list[str]:
    """The packages that the attention of training and evaluation came from, beyond torch: one pin
    each, and a comment where the one that trained had another version."""
    lines: dict[str, str] = {}
    for worker in (sheet.final_worker, sheet.train_worker):
        package = None if worker is None else ATTENTION.get(worker.attention or "")
        if worker is None or package is None:
            continue
        if package not in lines:
            lines[package] = _pin(package, worker.flash_attn)
        elif lines[package] != (other := _pin(package, worker.flash_attn)):
            lines[f"{package} of the training"] = f"# trained with {other.removeprefix('# ')}"
    return list(lines.values())


def _pin(package: str, version: str | None) -> str:
    """A line of requirements.txt; a comment for what no index has."""
    if version is None:
        return f"# {package}: not recorded"
    if package == ATTENTION["flash_attn_3"]:
        return f"# {package}=={version}: build it from its source"
    public = version.partition("+")[0]
    return f"{package}=={public}" + ("" if public == version else f"  # {version}")


def _version(worker: WorkerFacts | None, package: str) -> str | None:
    return None if worker is None else getattr(worker, package)

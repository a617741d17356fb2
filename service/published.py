"""A published record folder as a baseline: its results by seed, and where its papers disagree.

A result is what the run's log says; submission.json and README.md are held against it, digit by
digit as far as each prints them. What disagrees becomes a remark that every later verdict shows. A
gap that no rounding or noise explains is refused, because nobody could say which number counts.
The scored bytes follow from the two units of a score: bytes = tokens · val_loss / (ln 2 · val_bpb).
"""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from math import log
from typing import Any

from service.baselines import Baseline, BaselineResult
from service.published_readme import readme_remarks
from service.record_folder import MAX_LOG_BYTES, README, SUBMISSION, Folder
from service.run_logs import RunLog, agree, half_digit, read_log
from trainer.errors import DataError, UsageError
from trainer.protocol import ARTIFACT_BYTES_CAP

FATAL_BPB = Decimal("0.001")
"""Apart by so much, two claims of one run are two runs: seeds differ by about that."""
TAIL_TOKENS = 4096
"""How far a log's count may be off: it leaves out the text's tail, or has a window's twice."""
MAX_ERROR = 0.01  # of a ratio of two printed scores
_SAID = 160  # characters of somebody else's words


@dataclass
class Run:
    """What is known of one seed. `source`: the file that the score is taken from."""

    seed: int
    val_bpb: Decimal
    source: str
    val_loss: Decimal | None = None
    log: RunLog | None = None
    claim: dict[str, Any] = field(default_factory=dict[str, Any])
    """What submission.json says of the seed."""

    @property
    def artifact_bytes(self) -> int | None:
        if self.log is not None and self.log.artifact_bytes is not None:
            return self.log.artifact_bytes
        return _integer(self.claim.get("artifact_bytes"))


def read_published(folder: Folder, tokens: int | None = None) -> Baseline:
    """Read a record folder as the public repository has them; see `docs/record.md`.

    tokens: how many were scored, where no log says it. UsageError where nothing tells the results,
    or where two files disagree on one of them by more than noise.
    """
    claims = folder.document(SUBMISSION)
    logs = [read_log(name, folder.text(name, MAX_LOG_BYTES)) for name in folder.at_top(".log")]
    remarks = [f"{each.name} holds no final score" for each in logs if not each.scores]
    if below := [name for name in folder.names if "/" in name and name.endswith(".log")]:
        remarks.append(f"{len(below)} logs in subfolders were not read, such as {below[0]}")
    logs = [each for each in logs if each.scores]
    runs = _runs(folder, claims, logs, remarks)
    totals = _text(folder, runs, claims, tokens)
    remarks += _total_remarks(folder, claims, runs)
    if README in folder.names:
        remarks += readme_remarks(folder.text(README), runs, _value(claims, "val_bpb"))
    else:
        remarks.append(f"{README} is missing")
    remarks += _byte_remarks(claims, runs)
    odd = _configurations(runs)
    return Baseline(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", folder.root.resolve().name).strip("-")[:80]
        or "record",
        source=_source(folder, claims),
        tokens=totals.tokens,
        bytes=totals.bytes,
        within=totals.within,
        results=tuple(
            BaselineResult(seed=r.seed, value=float(r.val_bpb), configuration=odd.get(r.seed))
            for r in runs
        ),
        remarks=tuple(remarks),
    )


def _runs(
    folder: Folder, claims: dict[str, Any], logs: list[RunLog], remarks: list[str]
) -> list[Run]:
    """Every run that the folder tells of, one a seed; what disagrees goes to `remarks`."""
    claimed = _claimed_seeds(folder, claims)
    by_seed: dict[int, list[RunLog]] = {}
    for each in logs:
        if each.seed is None:
            raise DataError(f"{folder.root / each.name}: says no seed, in the log or in its name")
        by_seed.setdefault(each.seed, []).append(each)
    if not claimed and len(by_seed) == 1:
        claimed = {next(iter(by_seed)): claims}  # the one run is what the whole file is about
    runs: list[Run] = []
    for seed in list(dict.fromkeys([*claimed, *by_seed])):
        claim = claimed.get(seed, {})
        run = _run(folder, seed, claim, by_seed.get(seed, []), remarks)
        if seed not in claimed and claimed:
            remarks.append(f"seed {seed} has a log, {run.source}, but {SUBMISSION} leaves it out")
        runs.append(run)
    if not runs:
        raise UsageError(
            f"{folder.root}: no result by seed: no log holds a final score, and {SUBMISSION} has "
            "no seed_results"
        )
    listed = claims.get("seeds")
    for seed in listed if isinstance(listed, list) else []:
        if isinstance(seed, int) and seed not in [run.seed for run in runs]:
            remarks.append(f"seed {seed} is listed in {SUBMISSION}, but has no result")
    return runs


def _claimed_seeds(folder: Folder, claims: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What submission.json says seed by seed; empty where it does not."""
    given = claims.get("seed_results", {})
    if not isinstance(given, dict) or not all(
        key.isdecimal() and len(key) < 11 and isinstance(value, dict)
        for key, value in given.items()
    ):
        raise DataError(
            f"{folder.root / SUBMISSION}: seed_results: expected an object by seed, such as "
            '{"42": {"val_bpb": 1.12}}'
        )
    return {int(key): value for key, value in given.items()}


def _run(
    folder: Folder, seed: int, claim: dict[str, Any], logs: list[RunLog], remarks: list[str]
) -> Run:
    """One seed's result: its log's score, else what submission.json claims."""
    claimed = _value(claim, "val_bpb")
    if not logs:
        if claimed is None:
            raise UsageError(f"{folder.root}: seed {seed}: no log, and {SUBMISSION} has no val_bpb")
        remarks.append(f"seed {seed} has no log: its score is what {SUBMISSION} says")
        return Run(seed, claimed, SUBMISSION, _value(claim, "val_loss"), None, claim)
    meant = _meant(folder, seed, claimed, logs)
    score = meant.nearest(claimed)
    assert score is not None
    for other in logs:
        if other is not meant and (last := other.nearest(None)):
            remarks.append(f"seed {seed} has another log: {other.name} ends on {last.val_bpb}")
    if claimed is not None and not agree(score.val_bpb, claimed):
        where = f"seed {seed}: {SUBMISSION} says val_bpb {claimed}, {meant.name} {score.val_bpb}"
        if abs(score.val_bpb - claimed) > FATAL_BPB:
            raise UsageError(f"{folder.root}: {where}: nobody can tell which of them counts")
        remarks.append(where)
    remarks += _log_remarks(seed, claim, meant)
    return Run(seed, score.val_bpb, meant.name, score.val_loss, meant, claim)


def _meant(folder: Folder, seed: int, claimed: Decimal | None, logs: list[RunLog]) -> RunLog:
    """The log that a claim is about, among several of one seed."""
    if len(logs) == 1:
        return logs[0]
    fitting = [
        each
        for each in logs
        if claimed is not None and any(agree(score.val_bpb, claimed) for score in each.scores)
    ]
    if len(fitting) != 1:
        names = ", ".join(each.name for each in logs)
        raise UsageError(
            f"{folder.root}: seed {seed} has {len(logs)} logs, {names}, and {SUBMISSION} does not "
            "tell which counts; remove the others"
        )
    return fitting[0]


def _log_remarks(seed: int, claim: dict[str, Any], meant: RunLog) -> list[str]:
    """Where submission.json and a log disagree on a seed's counts."""
    found = {
        "artifact_bytes": meant.artifact_bytes,
        "bytes_total": meant.artifact_bytes,
        "bytes_code": meant.code_bytes,
        "code_bytes": meant.code_bytes,
        "steps": meant.steps,
    }
    return [
        f"seed {seed}: {SUBMISSION} says {key} {said}, {meant.name} {value}"
        for key, value in found.items()
        if value is not None and (said := _integer(claim.get(key))) not in (None, value)
    ]


@dataclass(frozen=True, slots=True)
class _Totals:
    tokens: int
    bytes: int
    within: float


def _text(folder: Folder, runs: list[Run], claims: dict[str, Any], given: int | None) -> _Totals:
    """Tokens and bytes of the scored text, which all runs must agree on."""
    logged = {r.log.tokens for r in runs if r.log is not None and r.log.tokens is not None}
    if given is None and len(logged) > 1:
        raise UsageError(
            f"{folder.root}: its runs were scored on different texts: "
            f"{' and '.join(f'{number:,}' for number in sorted(logged))} tokens"
        )
    exact = _integer(claims.get("scored_tokens")), _integer(claims.get("scored_bytes"))
    tokens = given or exact[0] or next(iter(logged), None)
    if not tokens:
        raise UsageError(
            f"{folder.root}: no log says how many tokens were scored; give them with --tokens"
        )
    found: list[tuple[float, float]] = []
    if len(runs) == 1 and runs[0].val_loss is None:
        runs[0].val_loss = _value(claims, "val_loss")
    for run in runs:
        if run.val_loss is not None:
            error = half_digit(run.val_loss) / run.val_loss + half_digit(run.val_bpb) / run.val_bpb
            ratio = float(run.val_loss / run.val_bpb) / log(2)
            found.append((tokens * ratio, float(error)))
    if not found:
        raise UsageError(
            f"{folder.root}: no val_loss beside a val_bpb: nothing tells how many bytes were scored"
        )
    best, error = min(found, key=lambda pair: pair[1])
    if best < 1 or error > MAX_ERROR:
        raise UsageError(
            f"{folder.root}: val_loss and val_bpb have too few digits to tell how many bytes were "
            "scored"
        )
    for other, wider in found:
        if abs(other - best) > (error + wider) * best:
            raise UsageError(
                f"{folder.root}: its runs were scored on different texts: val_loss / val_bpb "
                f"amounts to {best:,.0f} and to {other:,.0f} bytes"
            )
    if exact[0] == tokens and exact[1] and abs(exact[1] - best) <= error * best + 1:
        return _Totals(tokens, exact[1], 0.0)  # as Fairway's own records say it
    return _Totals(tokens, round(best), error + min(TAIL_TOKENS / tokens, 0.01))


def _total_remarks(folder: Folder, claims: dict[str, Any], runs: list[Run]) -> list[str]:
    """Whether the one value that submission.json puts first is the mean, a seed's, or neither."""
    said = _value(claims, "val_bpb")
    if said is None or len(runs) == 1:
        return []
    mean = sum((run.val_bpb for run in runs), Decimal(0)) / len(runs)
    if abs(mean - said) <= half_digit(said) + max(half_digit(run.val_bpb) for run in runs):
        return []
    for run in runs:
        if agree(run.val_bpb, said):
            return [
                f"{SUBMISSION}: val_bpb {said} is seed {run.seed}'s; the mean of {len(runs)} "
                f"seeds is {mean:.8f}"
            ]
    where = f"{SUBMISSION}: val_bpb {said} is neither the mean of its seeds, {mean:.8f}, nor one's"
    if min(abs(value - said) for value in (mean, *(r.val_bpb for r in runs))) > FATAL_BPB:
        raise UsageError(f"{folder.root}: {where}: nobody can tell what it is of")
    return [where]


def _byte_remarks(claims: dict[str, Any], runs: list[Run]) -> list[str]:
    """Artifacts over the cap, and a total that is no run's, nor their mean."""
    sizes = [(run.seed, size) for run in runs if (size := run.artifact_bytes) is not None]
    found = [
        f"seed {seed}: {size:,} bytes, {size - ARTIFACT_BYTES_CAP:,} over the cap"
        for seed, size in sizes
        if size > ARTIFACT_BYTES_CAP
    ]
    total = _integer(claims.get("bytes_total", claims.get("artifact_bytes")))
    known = {size for _, size in sizes}
    mean = round(sum(size for _, size in sizes) / len(sizes)) if sizes else None
    if total is not None and known and total not in known and abs(total - (mean or 0)) > 1:
        of = ", ".join(f"{size:,}" for size in sorted(known))
        found.append(f"{SUBMISSION}: {total:,} bytes are no run's and not their mean ({of})")
    return found


def _configurations(runs: list[Run]) -> dict[int, str]:
    """The seeds whose logs tell of other settings than the first run's, and which."""
    logged = [run for run in runs if run.log is not None and run.log.settings]
    odd: dict[int, str] = {}
    for run in logged[1:]:
        first, own = logged[0].log, run.log
        assert first is not None
        assert own is not None
        other = [
            f"{name}={value}"
            for name, value in own.settings.items()
            if first.settings.get(name, value) != value
        ]
        if other:
            odd[run.seed] = ", ".join(other)[:_SAID]
    return odd


def _source(folder: Folder, claims: dict[str, Any]) -> str:
    """Whose record it is, in words that are printed as they are."""
    parts = [f"record folder {folder.root.resolve().name}"]
    for key, lead in (("name", ""), ("author", "by "), ("date", "")):
        said = claims.get(key)
        if isinstance(said, str) and said.strip():
            words = "".join(char for char in said if char.isprintable())
            parts.append(f"{lead}{words[:_SAID].strip()}")
    return ", ".join(parts)


def _value(claims: dict[str, Any], key: str) -> Decimal | None:
    """A score as submission.json gives it, under the key or as a mean of that name."""
    for name in (key, f"mean_{key}"):
        value = claims.get(name)
        if isinstance(value, Decimal) and value > 0:
            return value
    return None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

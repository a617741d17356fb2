"""The audit that a record's sheet tells of, judged again as far as its specs and its other facts
say. What only an evaluation shows, a record cannot: `fairway replay` scores and audits anew."""

from collections import Counter
from collections.abc import Iterator

from service.record import Entry, Record, sheet_name, val_split
from service.record_text import Mismatch, shown
from service.sheet import Sheet, Verdict
from trainer.evaluate.profiles import REQUIRED
from trainer.evaluate.rulings import judge_spec
from trainer.finalize.code import code_digest
from trainer.protocol import CLOCK_GPUS, EVAL_CLOCK_CAP_S, TRAIN_CLOCK_CAP_S

_PROBED = ("causality", "normalisation")  # `fairway audit` alone finds them
AUDIT_IDS = tuple(name for name in REQUIRED if name not in _PROBED)
"""The rules that every scored final's audit has."""
UNSEEN_RULES = tuple(
    name
    for name in AUDIT_IDS
    if name not in ("byte-accounting", "calibration", "clocks", "ttt-kind")
)
"""Those of which only an evaluation tells the verdict."""
_BY_SPEC = {
    "ttt-kind": "nothing is trained on the scored text",
    "calibration": "rounding reads no text",
}


def audit_mismatches(entry: Entry) -> Iterator[Mismatch]:
    """Rules that failed, are missing or are told twice, and verdicts that the sheet belies."""
    name, rules = sheet_name(entry.seed), entry.sheet.result.audit
    for rule in rules:
        if rule.verdict == "fail":
            yield Mismatch(name, f"audit {shown(rule.id)}", "legal", rule.verdict)
    times = Counter(rule.id for rule in rules)
    for each in AUDIT_IDS:
        if times[each] == 0:
            yield Mismatch(name, f"audit {each}", "a whole audit", "no such rule")
    for each in sorted(again for again, count in times.items() if count > 1):
        yield Mismatch(name, f"audit {shown(each)}", "one verdict", f"{times[each]}")
    for rule in rules:
        if (found := _belied(entry.sheet, rule)) is not None:
            yield Mismatch(name, f"audit {rule.id}", shown(f"{rule.verdict}: {rule.detail}"), found)


def untold(record: Record) -> Iterator[str]:
    """Notes on what a record claims and nothing here can check."""
    yield (
        "what only `fairway replay` tells: that it ran by its recipe, that steps, clocks, facts "
        f"and curves are the run's, and the verdicts of {', '.join(UNSEEN_RULES)}"
    )
    here = code_digest()
    for entry in record.entries:
        name, told = sheet_name(entry.seed), entry.sheet.code_digest
        if told is not None and told != here:
            yield f"{name}: scored by code {told[:12]}, this Fairway's is {here[:12]}"
        if entry.sheet.fitted:
            yield f"{name}: final: the id was not checked: its clips and bits were fitted"


def _belied(sheet: Sheet, rule: Verdict) -> str | None:
    """What the rest of the sheet says instead; None where it says the same, or nothing."""
    if rule.id in _BY_SPEC:
        own = judge_spec(rule.id, sheet.final_task, _BY_SPEC[rule.id])
        said = (rule.verdict, rule.detail, rule.contested)
        return None if said == (own.verdict, own.detail, own.contested) else (
            f"{own.verdict}: {own.detail}"
        )  # fmt: skip
    if rule.verdict != "pass":
        return None
    if rule.id == "evaluation-order":
        own = judge_spec(rule.id, sheet.final_task, "")
        return None if own.verdict == "pass" else f"{own.verdict}: {own.detail}"
    result = sheet.result
    if rule.id == "byte-accounting" and result.bytes != val_split(sheet).bytes:
        return f"{result.bytes} bytes scored, data.splits has {val_split(sheet).bytes}"
    return _belied_clocks(sheet) if rule.id == "clocks" else None


def _belied_clocks(sheet: Sheet) -> str | None:
    """Why both clocks cannot have passed, on the challenge's own hardware; None where they can."""
    result, (count, kind) = sheet.result, CLOCK_GPUS
    if result.train_clock_s > TRAIN_CLOCK_CAP_S:
        return f"result.train_clock_s {result.train_clock_s:g} over {TRAIN_CLOCK_CAP_S:g}"
    if result.eval_clock_s > EVAL_CLOCK_CAP_S:
        return f"result.eval_clock_s {result.eval_clock_s:g} over {EVAL_CLOCK_CAP_S:g}"
    scored = sheet.final_worker
    names = () if scored is None else tuple(gpu.name for gpu in scored.gpus)
    is_official = sheet.device == "cuda" and any(kind in name for name in names)
    if sheet.world_size != count or not is_official:
        return f"world_size {sheet.world_size} on {', '.join(names) or sheet.device}"
    return None

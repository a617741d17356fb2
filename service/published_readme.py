"""What a published README.md says of its runs, held against their logs.

Two forms are understood: a table with a Seed column, and the first `val_bpb: 1.1233` of the text.
A number disagrees where no rounding to its digits gives one of the run's own.
"""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Protocol

from service.record_folder import README
from service.run_logs import RunLog, agree, half_digit

_HEADLINE = re.compile(r"\bval_bpb\b[`*:=\s]{1,8}(\d\.\d{2,12})")
_NUMBER = re.compile(r"~?(\d[\d,]{0,15}(?:\.\d{1,12})?) ?(MB|bytes)?")


class RunOf(Protocol):
    """What a row of a table is held against."""

    @property
    def seed(self) -> int: ...
    @property
    def val_bpb(self) -> Decimal: ...
    @property
    def val_loss(self) -> Decimal | None: ...
    @property
    def log(self) -> RunLog | None: ...
    @property
    def artifact_bytes(self) -> int | None: ...


def readme_remarks(text: str, runs: Sequence[RunOf], claimed: Decimal | None) -> list[str]:
    """Say where a README and its runs disagree; `claimed` is what submission.json puts first."""
    by_seed = {run.seed: run for run in runs}
    remarks: list[str] = []
    for row in _rows(text):
        seed = row.get("seed", "")
        if not seed.isdecimal() or len(seed) > 10:
            continue  # the mean, or the spread
        run = by_seed.get(int(seed))
        if run is None:
            remarks.append(f"{README} has a result of seed {seed}, which nothing else knows")
            continue
        remarks += _row_remarks(row, run)
    headline = _HEADLINE.search(text)
    if headline is not None:
        said = Decimal(headline[1])
        mean = sum((run.val_bpb for run in runs), Decimal(0)) / len(runs)
        # A mean is no printed number: it is held against the README's digits alone.
        known = [run.val_bpb for run in runs] + ([] if claimed is None else [claimed])
        if abs(mean - said) > half_digit(said) and not any(agree(said, each) for each in known):
            remarks.append(f"{README} begins with val_bpb {said}, its runs' mean is {mean:.8f}")
    return remarks


def _row_remarks(row: dict[str, str], run: RunOf) -> Iterator[str]:
    """Where a row disagrees with its run. A score may be any that the log has: of before TTT, of
    before quantization."""
    scores = run.log.scores if run.log is not None else ()
    known: dict[str, list[Decimal]] = {
        "bpb": [run.val_bpb, *(score.val_bpb for score in scores)],
        "val_loss": [each for each in (run.val_loss, *(s.val_loss for s in scores)) if each],
        "steps": [Decimal(run.log.steps)] if run.log is not None and run.log.steps else [],
        "artifact": [Decimal(run.artifact_bytes)] if run.artifact_bytes else [],
    }
    for column, cell in row.items():
        kind = next((kind for kind in known if _is(kind, column)), None)
        found = _NUMBER.fullmatch(cell)
        if kind is None or found is None or not known[kind]:
            continue
        if cell.startswith("~") and found[2] is None:
            continue  # said to be rough
        said = Decimal(found[1].replace(",", ""))
        unit = 1_000_000 if found[2] == "MB" else 1
        if not any(agree(said, value / unit) for value in known[kind]):
            yield f"seed {run.seed}: {README} says {column} {cell}, the log {known[kind][0]}"


def _is(kind: str, column: str) -> bool:
    """Whether a table's column is of a kind; a difference of two scores is none."""
    if re.search(r"gain|delta|Δ|[-+]|untrained", column):
        return kind == "bpb" and re.fullmatch(r"(pre|post)-\w+ (val_)?bpb", column) is not None
    return kind == "steps" and column == "steps" if kind == "steps" else kind in column


def _rows(text: str) -> Iterator[dict[str, str]]:
    """The rows of every table that has a Seed column: cells by column, without marks."""
    header: list[str] = []
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            header = []
            continue
        cells = [re.sub(r"[*`]", "", cell).strip() for cell in line.strip().strip("|").split("|")]
        if not header:
            header = [cell.lower() for cell in cells]
        elif "seed" in header and not set("".join(cells)) <= set("-: "):
            yield dict(zip(header, cells, strict=False))

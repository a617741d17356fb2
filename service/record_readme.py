"""The README of a record folder: every number of it from the sheets and the files' sizes."""

import json
from collections.abc import Sequence

from service.record import (
    CODE,
    DIGITS,
    REQUIREMENTS,
    SOURCE,
    Entry,
    Record,
    claims_of,
    facts_by_name,
    hardware,
    log_name,
    sheet_name,
    weights_name,
)
from service.record_folder import SUBMISSION
from trainer.codec import to_yaml


def readme_of(record: Record) -> str:
    """The whole text; people may add lines to it, but none of these may change."""
    parts = [
        _head(record),
        _results(record),
        _audit(record),
        _reproduction(record),
        _facts(record),
        _configuration(record),
        _files(record),
    ]
    return "\n\n".join(parts) + "\n"


def texts_of(record: Record) -> list[str]:
    """Every text that the sheets and the files' sizes make: where a number may be repeated from."""
    return [readme_of(record), json.dumps(claims_of(record, {}))]


def _head(record: Record) -> str:
    by = record.by
    count = len(record.entries)
    spread = record.spread(lambda sheet: sheet.result.val_bpb)
    of = f"mean of {count} seeds, sd {spread:.{DIGITS}f}" if spread is not None else "one seed"
    mean = record.mean(lambda sheet: sheet.result.val_bpb)
    machine = hardware(record.first)
    summary = [f"**val_bpb: {mean:.{DIGITS}f}** ({of})", f"**{record.bytes_total:,} bytes**"]
    summary += [] if machine is None else [machine]
    people = [word for word in (by.author, by.github_id and f"@{by.github_id}", by.date) if word]
    return "\n\n".join([f"# {by.name}", " | ".join(summary), ", ".join(people), by.blurb])


def _results(record: Record) -> str:
    header = ("Seed", "Steps", "ms/step", "val_loss", "val_bpb", "Weights", "Artifact")
    rows = [_row(record, entry) for entry in record.entries]
    result = record.first.result
    text = (
        f"val_loss is in nats per token. Scored: the whole val split of {record.first.data.name}, "
        f"{result.tokens:,} tokens that stand for {result.bytes:,} bytes. Artifact: {CODE}, "
        f"{record.code_bytes:,} bytes, and the seed's weights."
    )
    table = _table((*header, "Train s", "Finalize s", "Eval s"), rows)
    left = [
        f"seed {seed} ({'no result' if score is None else f'{score:.{DIGITS}f}'})"
        for seed, score in record.left_out.items()
    ]
    parts = ["## Results", table, text]
    if left:
        parts.append(f"Not in this record, of the same configuration: {', '.join(left)}.")
    return "\n\n".join(parts)


def _row(record: Record, entry: Entry) -> tuple[str, ...]:
    result = entry.sheet.result
    return (
        str(entry.seed),
        str(result.steps),
        f"{entry.step_avg_ms:.2f}",
        f"{result.val_loss:.{DIGITS}f}",
        f"{result.val_bpb:.{DIGITS}f}",
        f"{entry.weights_bytes:,}",
        f"{record.artifact_bytes(entry):,}",
        f"{result.train_clock_s:.3f}",
        f"{result.finalize_clock_s:.3f}",
        f"{result.eval_clock_s:.3f}",
    )


def _audit(record: Record) -> str:
    """Each rule's verdict by seed, and the first seed's reason."""
    verdicts = [
        {rule.id: rule.verdict for rule in entry.sheet.result.audit} for entry in record.entries
    ]
    rows = [
        (
            rule.id,
            *(each.get(rule.id, "-") for each in verdicts),
            _cell(rule.detail + (" (contested)" if rule.contested else "")),
            _cell(rule.source),
        )
        for rule in record.first.result.audit
    ]
    seeds = [f"seed {entry.seed}" for entry in record.entries]
    header = ("Rule", *seeds, f"Why, seed {record.first.seed}", "Source")
    return "\n\n".join(["## Audit", _table(header, rows)])


def _reproduction(record: Record) -> str:
    first = record.first
    run = f"torchrun --standalone --nproc_per_node={first.world_size}"
    run = f"{run} {CODE}" if first.world_size > 1 else f"python {CODE}"
    # On a CPU the number of threads is in the order of every sum.
    threads = f"OMP_NUM_THREADS={first.threads} " if first.device == "cpu" else ""
    score = f"{threads}python {CODE}"
    commands = [
        f"pip install -r {REQUIREMENTS}",
        *(f"{threads}{run} --data DATA --out out{e.seed} --seed {e.seed}" for e in record.entries),
        *(f"{score} --score {weights_name(e.seed)} --data DATA" for e in record.entries),
    ]
    lines = [
        f"DATA is the prepared dataset {first.data.name}, digest `{first.data.digest}`, tokenizer "
        f"sha256 `{first.data.tokenizer_sha256}`:",
        "```sh\n" + "\n".join(commands) + "\n```",
        "`fairway verify .` recounts all of this; `fairway replay sheet_seedN.json` runs a seed "
        "again.",
    ]
    if any(entry.sheet.final_task != first.final_task for entry in record.entries):
        lines.append(
            f"{CODE} finalizes as seed {first.seed} was finalized; the clips and bits of each seed "
            "were chosen for it and are in its sheet."
        )
    return "\n\n".join(["## Reproduction", *lines])


def _facts(record: Record) -> str:
    rows = [
        (name, _cell(value)) for name, value in facts_by_name([e.sheet for e in record.entries])
    ]
    return "\n\n".join(["## Environment", _table(("Fact", "Value"), rows)])


def _configuration(record: Record) -> str:
    recipe = to_yaml(record.first.recipe).rstrip()
    return f"## Configuration\n\nThe recipe in full:\n\n```yaml\n{recipe}\n```"


def _files(record: Record) -> str:
    lines = [
        f"- `{CODE}`: the counted code, one file; `{SOURCE}`: the same to be read",
        f"- `{SUBMISSION}`: every claim; `{REQUIREMENTS}`: the packages",
    ]
    for entry in record.entries:
        seed = entry.seed
        lines.append(f"- `{log_name(seed)}`, `{weights_name(seed)}`, `{sheet_name(seed)}`")
    return "\n\n".join(["## Files", "\n".join(lines)])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """A text that stays in its cell of a table."""
    return " ".join(text.replace("|", "/").split())

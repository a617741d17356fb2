"""The log of one seed, written from what its stages have recorded, in the field's own form.

Its head and its end follow from the run sheet. The lines between are the training's journal: a
verifier holds them against nothing but their order and the log's sha256.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from service.record import DIGITS, Entry, Record, hardware, val_split

_CURVE = re.compile(
    r"step:(?P<step>\d{1,9})/(?P<of>\d{1,9}) (?:train_loss|val_bpb):\d{1,6}\.\d{1,8}"
    r"(?: train_time:\d{1,12}ms step_avg:\d{1,9}\.\d{2}ms)?"
)


def log_text(record: Record, entry: Entry, journal: Iterable[str]) -> str:
    """A seed's whole log; `journal`: the lines of its training's metrics.jsonl."""
    of = entry.sheet.train_task.train.iterations
    points = (json.loads(line) for line in journal)
    curve = [line for point in points for line in _point(point, of)]
    return "\n".join([*head_of(entry), *curve, *tail_of(record, entry)]) + "\n"


def head_of(entry: Entry) -> list[str]:
    """What the run was, before its first step."""
    sheet, train = entry.sheet, entry.sheet.train_task.train
    test = val_split(sheet)
    shards = sum(file.split == "train" for file in sheet.data.files)
    machine = hardware(sheet)
    return [
        f"final:{sheet.final} training:{sheet.training}",
        f"train_loader:dataset:{sheet.data.name} train_shards:{shards} digest:{sheet.data.digest}",
        f"val_loader:dataset:{sheet.data.name} documents:{test.documents} bytes:{test.bytes} "
        f"tokens:{sheet.result.tokens}",
        f"model_params:{sheet.result.num_params}",
        f"world_size:{sheet.world_size} device:{sheet.device} threads:{sheet.threads}",
        *([] if machine is None else [f"hardware:{machine}"]),
        f"train_batch_tokens:{train.batch_tokens} train_seq_len:{train.seq_len} "
        f"iterations:{train.iterations}",
        f"seed:{sheet.seed}",
    ]


def tail_of(record: Record, entry: Entry) -> list[str]:
    """What came out, after the last step."""
    sheet, result = entry.sheet, entry.sheet.result
    of = sheet.train_task.train.iterations
    return [
        f"stopped: step:{result.steps}/{of} train_time:{result.train_clock_s * 1000:.0f}ms "
        f"step_avg:{entry.step_avg_ms:.2f}ms tokens:{result.train_tokens}",
        f"finalize: entry:{result.entry} time:{result.finalize_clock_s * 1000:.0f}ms",
        f"Serialized model: {entry.weights_bytes} bytes",
        f"Code size: {record.code_bytes} bytes",
        f"Total submission size: {record.artifact_bytes(entry)} bytes",
        *(f"audit {rule.id}: {rule.verdict}" for rule in result.audit),
        f"final_exact val_loss:{result.val_loss:.{DIGITS}f} val_bpb:{result.val_bpb:.{DIGITS}f} "
        f"eval_time:{result.eval_clock_s * 1000:.0f}ms",
        f"weights_sha256:{result.weights_sha256}",
    ]


def _point(point: dict[str, Any], of: int) -> Iterator[str]:
    """A journal's line as the log's: a training loss, a validation, or nothing that it shows."""
    step = point["step"]
    if "train/loss" in point:
        clock_s = point["train/clock_s"]
        yield (
            f"step:{step}/{of} train_loss:{point['train/loss']:.4f} "
            f"train_time:{clock_s * 1000:.0f}ms step_avg:{1000 * clock_s / max(step, 1):.2f}ms"
        )
    if "val/bpb" in point:
        yield f"step:{step}/{of} val_bpb:{point['val/bpb']:.{DIGITS}f}"


def without_curve(lines: list[str], steps: int) -> tuple[list[str], str | None]:
    """The lines of a log that are no training curve, and what is wrong with the curve, if so."""
    rest: list[str] = []
    last, fault = -1, None
    for line in lines:
        point = _CURVE.fullmatch(line)
        if point is None:
            rest.append(line)
            continue
        step = int(point["step"])
        if not last <= step <= steps and fault is None:
            fault = f"step {step} after step {max(last, 0)} of {steps}"
        last = step
    if fault is None and last != steps:
        fault = f"no step {steps}, the last is {last}" if last >= 0 else "no step"
    return rest, fault

"""What the bytes of an artifact are spent on, as the steps of a waterfall. Draws nothing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.ledger import SweepView
from service.report import best
from trainer.runtime.files import read_json

_LAYER = re.compile(r"blocks\.(\d+)\.")
_CLASSES = {
    "embed": "token table",
    "hash": "hash tables",
    "other": "value embedding",
    "scalar": "small tensors",
}


@dataclass(frozen=True, slots=True)
class SizeStep:
    """Some bytes of an artifact: a class of tensors in one layer, or what is no tensor."""

    label: str
    bytes: int


def best_sizes(view: SweepView, store: Path) -> list[SizeStep]:
    """The steps of a sweep's best final; empty where there is none, or its stage does not say."""
    top = best(view)
    if top is None:
        return []
    path = store / "finals" / top["final"] / "tensors.json"
    records = read_json(path) if path.is_file() else []
    if not all("bytes" in record for record in records):  # made before they were counted
        return []
    return size_steps(records, top["result"]) if records else []


def size_steps(records: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> list[SizeStep]:
    """Sum the tensors of an artifact up by layer and class, then what is left, then the code."""
    sums: dict[str, int] = {}
    for record in records:
        label = _label(record["name"], record["part"])
        sums[label] = sums.get(label, 0) + record["bytes"]
    rest = result["weights_bytes"] - sum(sums.values())
    tensors = [SizeStep(label, sums[label]) for label in sorted(sums, key=_place)]
    return [*tensors, SizeStep("header", rest), SizeStep("code", result["code_bytes"])]


def _label(name: str, part: str) -> str:
    layer = _LAYER.match(name)
    if layer is None or part in _CLASSES:
        return _CLASSES.get(part, part)
    return f"layer {layer[1]} {part}"


def _place(label: str) -> tuple[int, int, str]:
    """Tables first, then the layers from below, then the small tensors."""
    words = label.split()
    if words[0] == "layer":
        return 1, int(words[1]), words[2]
    return (2 if label == _CLASSES["scalar"] else 0), 0, label

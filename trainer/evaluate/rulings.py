"""What may be done at evaluation time: the field's rulings, as data. Pure.

Source: techniques 1.7 and 1.9, which cite issues and PRs of openai/parameter-golf; C1 to C4 are the
conditions of issue #1017.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.results import Rule
from trainer.specs.task import FinalTask

Status = Literal["legal", "contested", "illegal"]
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ruling:
    """One practice and how it stands.

    `rule` is the audit rule that applies it to a final's spec, `when` the dotted paths and values
    of a spec that asks for it (`...`: any value). Without them no spec can ask for it.
    """

    practice: str
    status: Status
    source: str
    rule: str | None = None
    when: Values = field(default_factory=dict)

    def is_asked_for(self, task: FinalTask) -> bool:
        """Whether a final's spec asks for this practice."""
        found = {path: _value(task, path) for path in self.when}
        return bool(found) and all(
            found[path] is not None if wanted is ... else found[path] == wanted
            for path, wanted in self.when.items()
        )


_KIND = "evaluate.ttt.kind"
_ORDER = "evaluate.ttt.order"
_CALIBRATION = "final.quantize.gptq.calibration"

RULINGS: tuple[Ruling, ...] = (
    Ruling(
        "train on the validation text, then score it",
        "illegal",
        "C1, C3; issues #402, #677; PRs #672, #1376, #1485, #1487-#1489, #1517, #1958, #1972",
        "ttt-kind",
        {_KIND: "oracle"},
    ),
    Ruling(
        "test-time training of several epochs that reports the last one's score",
        "illegal",
        "issue #677; PR #568",
    ),
    Ruling(
        "several epochs on chunks that are already scored",
        "legal",
        "PRs #549, #1413",
        "ttt-kind",
        {_KIND: "sgd"},
    ),
    Ruling(
        "LoRA of each document's own, a step after every scored chunk",
        "legal",
        "PR #1530",
        "ttt-kind",
        {_KIND: "lora"},
    ),
    Ruling(
        "global SGD on documents that are already scored",
        "legal",
        "PRs #1610, #1626",
        "ttt-kind",
        {"evaluate.ttt.phases": ...},
    ),
    Ruling("two passes, the second one's scores reported", "illegal", "C4; PRs #846, #991"),
    Ruling("the best of several trajectories", "illegal", "C4; PR #573"),
    Ruling("hashed n-gram caches", "illegal", "C2; issue #677; PRs #779, #886"),
    Ruling("n-gram tilt of the prefix with an exact normaliser", "legal", "PR #1514"),
    Ruling("a mixture over bytes, spread over tokens", "contested", "C2; issue #1872"),
    Ruling("SLOT: a hidden delta fitted to the scored tokens", "illegal", "C1, C3; PR #1240"),
    Ruling("causal SLOT", "contested", "issue #1336"),
    Ruling("a gate that looks at its target", "illegal", "C1; PR #1420"),
    Ruling("calibration on validation tokens", "illegal", "PRs #728, #1919"),
    Ruling(
        "calibration on text that the model generates",
        "legal",
        "PR #1019",
        "calibration",
        {_CALIBRATION: "generated"},
    ),
    Ruling(
        "calibration on training batches, on the training clock",
        "legal",
        "issue #677; PRs #535, #569, #593, #609",
        "calibration",
        {_CALIBRATION: "train"},
    ),
    Ruling("a temperature or other scalar tuned on validation scores", "illegal", "PR #991"),
    Ruling("another tokenizer, if lossless", "legal", "PR #1729; issue #1604"),
    Ruling("a lossy tokenizer, such as casefolding", "illegal", "PRs #1578, #1585, #1670"),
    Ruling(
        "documents in the order of the file",
        "legal",
        "PR #1320",
        "evaluation-order",
        {_ORDER: "file"},
    ),
    Ruling(
        "longest documents first, adapters' A kept between them",
        "contested",
        "C1, C4; PR #1855; techniques 1.9",
        "evaluation-order",
        {_ORDER: "longest", "evaluate.ttt.warm_a": True},
    ),
    Ruling(
        "longest documents first, global SGD between them",
        "contested",
        "C1, C4; PR #1855; techniques 1.9",
        "evaluation-order",
        {_ORDER: "longest", "evaluate.ttt.phases": ...},
    ),
)


def judge_spec(rule: str, task: FinalTask, otherwise: str) -> Rule:
    """Judge what a final's spec asks for by the rulings of one rule; `otherwise` says what it means
    that none applies."""
    found = [ruling for ruling in RULINGS if ruling.rule == rule and ruling.is_asked_for(task)]
    statuses = {ruling.status for ruling in found}
    return Rule(
        id=rule,
        verdict="fail" if "illegal" in statuses else "pass",
        detail="; ".join(f"{r.practice}: {r.status}" for r in found) or otherwise,
        source="; ".join(dict.fromkeys(r.source for r in found)) or "techniques 1.9",
        contested="contested" in statuses,
    )


def _value(spec: Any, path: str) -> Any:
    """Follow a dotted path into a spec; None where a part on the way is absent or has no such
    field."""
    for name in path.split("."):
        spec = getattr(spec, name, None)
    return spec

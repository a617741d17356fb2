"""An evaluator run on texts and settings that are altered in one place: what may move, and what
may not."""

from dataclasses import replace
from typing import Any

import numpy as np

from trainer.evaluate.audit import rule_of
from trainer.evaluate.probes.subject import MAX_GAP, Subject
from trainer.evaluate.probes.text import Text
from trainer.evaluate.sliding import slide
from trainer.evaluate.tape import Tape
from trainer.results import Rule
from trainer.specs.ttt import LoraTtt

MAX_OFF = 1e-6  # of nats per token
CUTS = (0.0, 0.2, 0.45, 0.7, 0.95)  # shares of the text after which the rest is altered


def causality(subject: Subject, text: Text) -> Rule:
    """C1: other tokens later on leave every earlier loss as it is; on a CPU to the last bit.

    Earlier by the file, or, which is contested, by the order in which the evaluator scores.
    """
    base = subject.score(text)
    by_file = np.arange(len(text))
    fault = _leak(subject, text, base, by_file)
    if fault is None:
        return rule_of("causality", True, "later tokens move no earlier loss", "issue #1017 C1")
    order = np.where(base.order < 0, len(base.events), base.order)
    by_score = np.empty_like(by_file)
    by_score[np.lexsort((by_file, order))] = by_file
    if _leak(subject, text, base, by_score) is not None:
        return rule_of("causality", False, fault, "issue #1017 C1")
    detail = f"tokens that are scored later move no earlier loss, but by the file: {fault}"
    source = "issue #1017 C1; PR #1855"
    return replace(rule_of("causality", True, detail, source), contested=True)


def _leak(subject: Subject, text: Text, base: Tape, rank: np.ndarray) -> str | None:
    """Say which loss moves with a token that comes after it, `rank` [N] being the order; None where
    none does."""
    for share in CUTS:
        cut = int(share * (len(text) - 1)) + 1
        is_earlier = (rank < cut) & (base.times > 0)
        gap = _gaps(base, subject.score(text.changed(_targets(rank >= cut))))
        if gap[is_earlier].max(initial=0.0) > subject.tolerance:
            worst = int(np.argmax(np.where(is_earlier, gap, -1.0)))
            return f"a token after the first {cut} moved the loss of prediction {worst}"
        if not gap[rank >= cut].max() > 0.0:
            return f"no token after the first {cut} moved a loss: the losses are not of this text"
    return None


def previous_document(subject: Subject, text: Text) -> Rule:
    """Another text of one document leaves the losses of all others as they are.

    Only where an evaluation promises it: documents on their own, and no state from one to another.
    """
    name, source, ttt = "previous-document", "techniques 1.6", subject.spec.ttt
    if subject.spec.documents is None:
        return rule_of(name, None, "context crosses documents by design", source)
    if isinstance(ttt, LoraTtt) and (ttt.warm_a or ttt.phases is not None):
        return rule_of(name, None, "what a document taught is kept by design", source)
    base = subject.score(text)
    edges = np.append(text.starts(), len(text))
    moved = list[str]()
    for number in (0, len(edges) // 2 - 1):
        is_inside = np.zeros(len(text), dtype=bool)
        is_inside[edges[number] : edges[number + 1]] = True
        gap = _gaps(base, subject.score(text.changed(_targets(is_inside))))
        if gap[~is_inside].max() > subject.tolerance:
            moved.append(f"document {number} moved the loss of another one")
    shown = "; ".join(moved) or f"none of {len(edges) - 1} documents moved another one's loss"
    return rule_of(name, not moved, shown, source)


def plain_score(subject: Subject, text: Text) -> Rule:
    """What nothing was learned for is scored as without learning: the first chunk, and with a
    learning rate of zero all."""
    spec = subject.spec
    plain = replace(subject, evaluator=slide, spec=replace(spec, ttt=None)).score(text)
    base = subject.score(text)
    is_first = base.order == base.order[base.order >= 0].min(initial=len(base.events))
    found = {"the first chunk": _off(base, plain, is_first)}
    if spec.ttt is not None:
        still = replace(subject, spec=replace(spec, ttt=_still(spec.ttt))).score(text)
        found["all at a learning rate of 0"] = _off(still, plain, still.order >= 0)
    shown = "; ".join(f"{what}: {gap:.1g} off the plain score" for what, gap in found.items())
    return rule_of("plain-score", max(found.values()) <= MAX_OFF, shown, "techniques 8")


def _off(one: Tape, plain: Tape, where: np.ndarray) -> float:
    """Return how far the mean loss of some predictions is off the plain one, as a share of it;
    infinity where one of them is."""
    if not where.any() or _gaps(one, plain)[where].max() > MAX_GAP:
        return np.inf
    nats, expected = (float(tape.losses[where].mean(dtype=np.float64)) for tape in (one, plain))
    return abs(nats - expected) / max(expected, 1.0)


def _still(part: Any) -> Any:
    """Set every learning rate of an adaptation to zero."""
    phases = getattr(part, "phases", None)
    return replace(part, lr=0.0, **({"phases": _still(phases)} if phases else {}))


def _targets(predictions: np.ndarray) -> np.ndarray:
    """Mark the tokens [N + 1] that some predictions [N] are of."""
    return np.append(False, predictions)


def _gaps(one: Tape, other: Tape) -> np.ndarray:
    """Return how far apart each loss of two tapes is, [N] in nats; infinity where one is none."""
    return np.nan_to_num(np.abs(one.losses.astype(np.float64) - other.losses), nan=np.inf)

"""C2: before a token is seen, every token has a probability, and these sum to 1.

The evaluator is run again for one token after the other in the place of the one that comes, so it
can know no more than it is told. Of a large alphabet it is run for some: where their probabilities
are those of the softmax that the model drew up on the way, it is trusted for the others.
"""

import numpy as np
import torch

from trainer.evaluate.audit import rule_of
from trainer.evaluate.probes.record import record
from trainer.evaluate.probes.subject import MAX_GAP, Subject
from trainer.evaluate.probes.text import Text
from trainer.results import Rule

MAX_EXCESS = 1e-4  # how far probabilities may sum away from 1
PREDICTIONS = (2, 17)  # one of the first window, and one after an adapting evaluator's first step
SMALL_VOCAB = 64  # all of it is run
NUM_LIKELY, NUM_RANDOM = 8, 16  # what is run of a larger one


def normalisation(subject: Subject, text: Text) -> Rule:
    """Judge the distributions at two predictions."""
    found = [_sum(subject, text.head(prediction + 2)) for prediction in PREDICTIONS]
    holds = all(abs(total - 1.0) <= MAX_EXCESS and is_softmax for total, is_softmax in found)
    shown = ", ".join(
        f"{total:.6f}{'' if is_softmax else ' and are not its softmax'}"
        for total, is_softmax in found
    )
    detail = f"the model's probabilities of all {text.vocab_size} tokens sum to {shown}"
    return rule_of("normalisation", holds, detail, "issue #1017 C2")


def _sum(subject: Subject, text: Text) -> tuple[float, bool]:
    """Sum the probabilities of what could be the last token; and whether those that were run say
    enough of the others."""
    if text.vocab_size <= SMALL_VOCAB:
        tokens = range(text.vocab_size)
        return sum(float(np.exp(_log(subject, text, token))) for token in tokens), True
    softmax = _log_softmax(subject, text)
    if softmax is None:
        return np.nan, False
    tokens = _some(softmax)
    logs = np.array([_log(subject, text, token) for token in tokens])
    total = 1.0 + float((np.exp(logs) - np.exp(softmax[tokens])).sum())
    return total, bool(np.abs(logs - softmax[tokens]).max() <= MAX_GAP)


def _log(subject: Subject, text: Text, token: int) -> float:
    """Return the log probability of the last prediction if `token` is what comes."""
    return -float(subject.score(text.head(len(text) + 1, token)).losses[-1])


def _log_softmax(subject: Subject, text: Text) -> np.ndarray | None:
    """Return the model's own log probabilities at the last prediction, float64 [V]; None where the
    score came from no forward of it."""
    seen, last = record(subject, text), len(text) - 1
    source = int(seen.sources()[last])
    if source < 0:
        return None
    call = seen.calls[source]
    assert call.logits is not None  # a call that gave a loss had some
    rows, columns = np.nonzero(call.reads(text) == last)
    at = int(columns[0]) - call.inputs.shape[1] + call.logits.shape[1]
    return torch.log_softmax(call.logits[int(rows[0]), at].double(), dim=0).cpu().numpy()


def _some(log_softmax: np.ndarray) -> list[int]:
    """Choose tokens: the likeliest, and some others."""
    order = np.argsort(-log_softmax)
    others = np.random.default_rng(0).permutation(order[NUM_LIKELY:])
    return [*order[:NUM_LIKELY].tolist(), *others[:NUM_RANDOM].tolist()]

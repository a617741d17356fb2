"""All probes of an evaluator. Of those that fail, the first is the one to name."""

from collections.abc import Mapping

from torch import Tensor

from trainer.evaluate import audit
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.probes.altered import causality, plain_score, previous_document
from trainer.evaluate.probes.normalisation import normalisation
from trainer.evaluate.probes.record import (
    record,
    score_before_update,
    single_pass,
    warmup_hygiene,
)
from trainer.evaluate.probes.subject import Subject, make_subject
from trainer.evaluate.probes.text import make_text
from trainer.results import Rule
from trainer.runtime.distributed import current
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import ModelSpec


def check_final(
    model: ModelSpec, state: Mapping[str, Tensor], spec: EvaluateSpec, num_tokens: int
) -> tuple[Rule, ...]:
    """Probe how a final is evaluated, with its artifact's model and float32 state."""
    return check_evaluator(make_subject(evaluate, model, state, spec, current()), num_tokens)


def check_evaluator(subject: Subject, num_tokens: int) -> tuple[Rule, ...]:
    """Run every probe on a random text of so many tokens.

    Rules that share an id with one of `trainer.evaluate.audit` see the same thing from outside.
    """
    documents = subject.spec.documents
    bos = {} if documents is None else {"bos": documents.bos}
    text = make_text(subject.model.plan.spec.vocab_size, num_tokens, **bos)
    seen = record(subject, text)
    return (
        audit.covered(seen.tape.times),
        score_before_update(subject, seen),
        warmup_hygiene(seen),
        single_pass(seen),
        causality(subject, text),
        normalisation(subject, text),
        plain_score(subject, text),
        previous_document(subject, text),
    )

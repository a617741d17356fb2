"""What a score must keep to: causality, whole distributions, every prediction once."""

from dataclasses import replace

import torch
from torch import Tensor

from trainer.evaluate import audit
from trainer.evaluate.windows import plan_windows
from trainer.liveness.probe import awake, random_tokens, rule, text
from trainer.results import Rule
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import ModelSpec

MAX_EXCESS = 1e-4  # how far probabilities may sum away from 1
CONTEXT = 2  # tokens before the one whose distribution is summed
MAX_ROWS = 1_024


@torch.no_grad()
def causality(spec: ModelSpec) -> Rule:
    """C1: other tokens later on leave every earlier loss as it is, to the last bit.

    Inputs and targets are changed apart from each other: a model that reads its own target as
    the next input would otherwise not show.
    """
    model, tokens = awake(spec), text(spec)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    before = model(inputs, targets)
    num_targets = targets.shape[1]
    faults: list[str] = []
    for first in (1, num_targets // 4, num_targets // 2, num_targets - 1):
        after = model(_changed(inputs, first, spec), _changed(targets, first, spec))
        if not torch.equal(before[:, :first], after[:, :first]):
            faults.append(f"tokens from {first} on changed a loss before it")
        if torch.equal(before[:, first:], after[:, first:]):
            faults.append(f"tokens from {first} on changed no loss at all")
    return _cited(rule("causality", faults, "later tokens change no earlier loss"), "C1")


def _changed(tokens: Tensor, first: int, spec: ModelSpec) -> Tensor:
    """Return tokens [B, T] of which everything from `first` on is another token."""
    steps = 1 + random_tokens(spec.vocab_size - 1, *tokens[:, first:].shape)
    return torch.cat((tokens[:, :first], (tokens[:, first:] + steps) % spec.vocab_size), dim=1)


@torch.no_grad()
def normalisation(spec: ModelSpec) -> Rule:
    """C2: the probabilities that a model gives to all tokens sum to 1."""
    model = awake(spec)
    context = random_tokens(spec.vocab_size, 1, CONTEXT)
    total = 0.0
    for some in torch.arange(spec.vocab_size).unsqueeze(1).split(MAX_ROWS):
        loss = model(context.expand(len(some), -1), some)
        total += float(loss.double().neg().exp().sum())
    shown = f"the probabilities of all tokens sum to {total:.6f}"
    is_one = abs(total - 1.0) <= MAX_EXCESS
    return _cited(rule("normalisation", [] if is_one else [shown], shown), "C2")


def coverage(spec: EvaluateSpec) -> Rule:
    """C4: the windows of a short text score every prediction once."""
    num_predictions = 3 * spec.window + spec.stride // 2 + 1
    return audit.coverage(plan_windows(num_predictions, spec), num_predictions)


def _cited(found: Rule, condition: str) -> Rule:
    return replace(found, source=f"issue #1017 {condition}")

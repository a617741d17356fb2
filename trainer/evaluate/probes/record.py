"""What reaches a model while it scores a tape, written down at its door, and what that shows.

A cheat may hold the raw text and never ask the tape for it. It still needs the model, and no token
enters that unseen, a copy's included.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.evaluate.audit import rule_of
from trainer.evaluate.probes.subject import MAX_GAP, Subject
from trainer.evaluate.probes.text import Text
from trainer.evaluate.tape import Tape
from trainer.model.gpt import GPT
from trainer.results import Rule

EQUAL = 1e-6  # nats: a reported loss is the one that a forward gave


@dataclass(slots=True, eq=False)
class Call:
    """One forward: inputs [B, T] and what was sealed before it; targets and losses [B, S], logits
    [B, S, V] and what else was given, unless it ended at the hidden states."""

    inputs: Tensor
    losses_before: np.ndarray
    is_sealed: np.ndarray
    logits: Tensor | None = None
    targets: Tensor | None = None
    losses: Tensor | None = None
    others: tuple[Any, ...] = ()

    def reads(self, text: Text) -> np.ndarray:
        """Return which prediction each input's successor is, int64 [B, T]; -1 for other tokens."""
        inputs = self.inputs.cpu().numpy()
        following = np.full_like(inputs, -1)
        following[:, :-1] = inputs[:, 1:]
        if self.targets is not None:
            targets = self.targets.cpu().numpy()
            following[:, -targets.shape[1] :] = targets
        return text.find(inputs, following)


@dataclass(slots=True, eq=False)
class Record:
    """The calls of one evaluation, in order, and the tape that it left."""

    text: Text
    tape: Tape
    calls: list[Call] = field(default_factory=list)

    def is_score(self, number: int) -> bool:
        """Whether something was sealed between a call and the next."""
        later = self.calls[number + 1 :]
        after = later[0].is_sealed if later else self.tape.order >= 0
        return bool((after & ~self.calls[number].is_sealed).any())

    def presented(self) -> list[dict[int, float]]:
        """Return, for each prediction, the calls that were given its target before its score was
        sealed, and the loss that each of them gave."""
        found: list[dict[int, float]] = [{} for _ in range(len(self.text))]
        for number, call in enumerate(self.calls):
            if call.losses is None:
                continue
            losses = call.losses.double().cpu().numpy()
            reads = call.reads(self.text)[:, -losses.shape[1] :]
            for prediction, loss in zip(reads[reads >= 0], losses[reads >= 0], strict=True):
                if not call.is_sealed[prediction]:
                    found[prediction][number] = float(loss)
        return found

    def sources(self) -> np.ndarray:
        """Return the call that each reported loss came from, int64 [N], -1 if from none.

        Of the calls that were given its target it is the last one with just that loss, else the
        last one.
        """
        sources = np.full(len(self.text), -1)
        for prediction, losses in enumerate(self.presented()):
            equal = [call for call, loss in losses.items() if self._is_reported(prediction, loss)]
            sources[prediction] = max(equal or losses, default=-1)
        return sources

    def num_again(self) -> int:
        """Count the predictions whose target was presented more than once before their score.

        A row may reach back over targets that others score, as long as it scores its own, and
        nothing is taken from it but these.
        """
        again = 0
        for prediction, losses in enumerate(self.presented()):
            *earlier, last = sorted(losses) or [-1]
            is_taken = bool(earlier) and not self._is_reported(prediction, losses[last])
            again += is_taken or not all(self.is_score(call) for call in earlier)
        return again

    def num_changed(self) -> int:
        """Count the losses that are no longer what they were when a later forward began."""
        changed = np.zeros(len(self.text), dtype=bool)
        for call in self.calls:
            changed |= call.is_sealed & (call.losses_before != self.tape.losses)
        return int(changed.sum())

    def _is_reported(self, prediction: int, loss: float) -> bool:
        return abs(loss - float(self.tape.losses[prediction])) <= EQUAL


def record(subject: Subject, text: Text) -> Record:
    """Run an evaluator on a text and write down what reaches its model."""
    seen = Record(text, subject.tape(text))
    model = subject.fresh()
    _watch(model, seen)
    subject.evaluator(model, seen.tape, subject.spec, subject.ranks)
    return seen


def _watch(model: GPT, seen: Record) -> None:
    """Hook into a model. The hooks are plain functions: a copy of the model keeps them."""

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].detach().clone()
        seen.calls.append(Call(inputs, seen.tape.losses.copy(), seen.tape.order >= 0))

    def see_logits(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        seen.calls[-1].logits = logits.detach().clone()

    def leave(
        module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], losses: Tensor
    ) -> None:
        targets, *others = (*args[1:], *named.values())
        seen.calls[-1].targets = targets.detach().clone()
        seen.calls[-1].losses = losses.detach().clone()
        seen.calls[-1].others = tuple(others)

    model.embedding.register_forward_pre_hook(enter)
    model.softcap.register_forward_hook(see_logits)
    model.register_forward_hook(leave, with_kwargs=True)


def score_before_update(subject: Subject, seen: Record) -> Rule:
    """C3: what gave the first scores is the artifact's own model."""
    used = sorted({int(source) for source in seen.sources() if source >= 0})
    first = [seen.calls[number] for number in used if not seen.calls[number].is_sealed.any()]
    gap = max((_largest_gap(subject.fresh(), call) for call in first), default=np.inf)
    shown = f"what gave the first scores is {gap:.3g} nats off the artifact's model"
    return rule_of("score-before-update", gap <= MAX_GAP, shown, "issue #1017 C3")


def warmup_hygiene(seen: Record) -> Rule:
    """Before the first forward that scores, none of the text reaches the model."""
    sources = seen.sources()
    first = int(sources[sources >= 0].min(initial=len(seen.calls)))
    reads = [call.reads(seen.text).ravel() for call in seen.calls[:first]]
    met = np.unique(np.concatenate([[-1], *reads])).size - 1
    shown = f"{first} forwards before the first that scores met {met} tokens of the text"
    return rule_of("warmup-hygiene", met == 0, shown, "techniques 1.7; PR #1530")


def single_pass(seen: Record) -> Rule:
    """C4: until its score is sealed, a target is presented to the model once, and then the score
    stays."""
    again, changed = seen.num_again(), seen.num_changed()
    never = sum(not calls for calls in seen.presented())
    return rule_of(
        "single-pass",
        again == never == changed == 0,
        f"{len(seen.text)} targets, {again} presented again before their score was sealed, "
        f"{never} never; {changed} scores changed later",
        "issue #1017 C4; PRs #573, #846, #991",
    )


@torch.no_grad()
def _largest_gap(model: GPT, call: Call) -> float:
    """Return how far a call's losses are from those that a model gives, in nats."""
    if call.targets is None or call.losses is None:
        return 0.0
    gap = (model(call.inputs, call.targets, *call.others) - call.losses).abs()
    return float(gap.nan_to_num(torch.inf).max())

"""Evaluators that break a rule, one each, with the signature of an honest one.

They hold the raw text, which a cheat always could, and score through the tape or around it. Each
is named in CHEATS by the audit rule that must catch it first.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate.probes.subject import Evaluator
from trainer.evaluate.sliding import slide
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import Windows, plan_windows
from trainer.model.gpt import GPT
from trainer.model.loss import token_loss
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec

LR = 0.05


def train_then_score(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Learn the whole text before the first score."""
    for _ in range(2):
        for first in range(0, len(tape) - spec.window, spec.window):
            _step(model, _raw(tape)[first : first + spec.window + 1], ranks)
    slide(model, tape, spec, ranks)


def peek(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Show the model, before each window, the token that comes after it."""
    for window in _windows(tape, spec):
        after = int(window.stop[0]) + 1
        seen = [torch.tensor([[token]]) for token in _raw(tape)[after : after + 1]]

        def forward(x: Tensor, y: Tensor, *_: int, seen: list[Tensor] = seen) -> Tensor:
            return model(torch.cat([*seen, x], dim=1), y)

        with torch.no_grad():
            tape.score(forward, window, ranks.device, spec.window)


def flatter(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Report nine tenths of every loss: what is no probability any more."""
    with torch.no_grad():
        for window in _windows(tape, spec):
            tape.score(lambda *given: 0.9 * model(*given), window, ranks.device, spec.window)


def rescore(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Score the text twice, in other contexts, and seal the better score of each token."""
    plan = _windows(tape, spec)
    kept: list[Tensor] = []
    for lead in (0, 1):
        for number, window in enumerate(plan):
            scored = int(window.scored[0])
            row = _raw(tape)[window.start[0] : window.stop[0] + 1].astype(np.int64)
            tokens = torch.from_numpy(np.append(np.full(lead, row[0]), row))[None]
            with torch.no_grad():
                losses = model(tokens[:, :-1], tokens[:, -scored:])
            if lead == 0:
                kept.append(losses)
            else:
                kept[number] = torch.minimum(kept[number], losses)
    for window, losses in zip(plan, kept, strict=True):
        tape.score(lambda *_, losses=losses: losses, window, ranks.device, spec.window)


def skip(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Leave every third window out."""
    with torch.no_grad():
        for number, window in enumerate(_windows(tape, spec)):
            if number % 3 != 2:
                tape.score(model, window, ranks.device, spec.window)


def warm_up(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Warm up on the text itself, even if the weights are put back after that."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        _step(model, _raw(tape)[: spec.window + 1], ranks)
    model.load_state_dict(before)
    slide(model, tape, spec, ranks)


def know_the_target(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Double the odds of the token that is known to come. Asked for any other target it would
    answer with what sums to 1."""
    for window in _windows(tape, spec):
        scored = slice(window.stop[0] - window.scored[0] + 1, window.stop[0] + 1)
        truth = torch.from_numpy(_raw(tape)[scored].astype(np.int64))[None]

        def forward(x: Tensor, y: Tensor, *_: int, truth: Tensor = truth) -> Tensor:
            logits = model.logits(model.hidden(x)[:, -y.shape[1] :])
            logits = logits.scatter_add(2, truth[..., None], torch.full_like(logits, np.log(2.0)))
            return token_loss(logits, y)

        with torch.no_grad():
            tape.score(forward, window, ranks.device, spec.window)


def train_on_each_chunk_first(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Learn what a window is to score just before it is scored, every time but the first."""
    for number, window in enumerate(_windows(tape, spec)):
        if number:
            _step(model, _raw(tape)[window.start[0] : window.stop[0] + 1], ranks)
        with torch.no_grad():
            tape.score(model, window, ranks.device, spec.window)


def keep_the_better_run(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Score the whole text in two ways and hand in the one that came out lower."""
    runs = [Tape(_raw(tape)) for _ in range(2)]
    slide(model, runs[0], spec, ranks)
    slide(model, runs[1], replace(spec, stride=spec.window), ranks)
    better = min(runs, key=lambda run: float(run.losses.sum()))
    tape.losses[:], tape.times[:], tape.order[:] = better.losses, better.times, 0
    tape.events[:] = better.events


def overwrite(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Score honestly, then learn the text and write better losses over the sealed ones."""
    slide(model, tape, spec, ranks)
    for _ in range(3):
        _step(model, _raw(tape)[: spec.window + 1], ranks)
    again = Tape(_raw(tape))
    slide(model, again, spec, ranks)
    tape.losses[:] = again.losses


CHEATS: dict[str, Evaluator] = {
    "score-before-update": train_then_score,
    "causality": peek,
    "normalisation": flatter,
    "single-pass": rescore,
    "coverage": skip,
    "warmup-hygiene": warm_up,
}
SUBTLER: dict[Evaluator, set[str]] = {
    know_the_target: {"normalisation"},
    train_on_each_chunk_first: {"single-pass", "causality"},
    keep_the_better_run: {"single-pass"},
    overwrite: {"single-pass"},
}
"""Cheats that more than one rule meets, and some that must."""


def _raw(tape: Tape) -> np.ndarray:
    return tape._tokens


def _windows(tape: Tape, spec: EvaluateSpec) -> list[Windows]:
    plan = plan_windows(len(tape), spec)
    return [plan.part(number, len(plan)) for number in range(len(plan))]


def _step(model: GPT, row: np.ndarray, ranks: Ranks) -> None:
    tokens = torch.from_numpy(row.astype(np.int64))[None].to(ranks.device)
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad

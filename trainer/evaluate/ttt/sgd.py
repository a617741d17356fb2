"""Score-first SGD: a chunk of the stream is scored, then trained on, then comes the next.

Source: parameter-golf PRs #549 and #610 (techniques 2.29).
"""

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.errors import UsageError
from trainer.evaluate.sliding import plan_of, score_windows
from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt.steps import GangStep, batches, cosine, cut, training
from trainer.evaluate.windows import Windows
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.ttt import SgdTtt


def adapt(model: GPT, tape: Tape, spec: EvaluateSpec, ttt: SgdTtt, ranks: Ranks) -> None:
    """Score a whole tape with sliding windows while the model trains on its past.

    A window belongs to the chunk that holds its first scored prediction, so that a chunk is wholly
    scored before it is lent; its tokens beyond the last full sequence are not trained on. Momentum
    goes on from chunk to chunk, at a rate that falls as a cosine over them.
    """
    if ttt.chunk_tokens < spec.window:
        raise UsageError(
            f"evaluate.ttt.chunk_tokens={ttt.chunk_tokens} holds no sequence of evaluate.window="
            f"{spec.window} to train on; set chunk_tokens to a multiple of the window"
        )
    parameters = unfrozen(model, ttt)
    optimizer = torch.optim.SGD(parameters, lr=ttt.lr, momentum=ttt.momentum)
    step = GangStep(model, optimizer, spec.window, ttt.clip_norm, ranks)
    chunks = plan_chunks(plan_of(tape, spec), len(tape), ttt.chunk_tokens)
    tape.resume(ranks)
    state = tape.journal.state if tape.journal is not None else None
    done = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["chunks"]
        tape.gather(ranks, 0, sum(int(windows.scored.sum()) for windows in chunks[:done]))
    with training(model, parameters):
        for index, windows in enumerate(chunks[done:-1], start=done):
            score_windows(model, tape, windows, spec, ranks)
            optimizer.param_groups[0]["lr"] = ttt.lr * cosine(index / (len(chunks) - 1))
            _train(step, tape, index * ttt.chunk_tokens, spec.window, ttt)
            tape.save(partial(_state, model, optimizer, index + 1))
    score_windows(model, tape, chunks[-1], spec, ranks)


def plan_chunks(plan: Windows, num_predictions: int, chunk_tokens: int) -> list[Windows]:
    """Group the windows of a stream by the chunk that holds their first scored prediction."""
    edges = np.arange(0, num_predictions + chunk_tokens, chunk_tokens)
    firsts = np.searchsorted(plan.stop - plan.scored, edges)
    return [plan.take(slice(a, b)) for a, b in pairwise(firsts)]


def unfrozen(model: GPT, ttt: SgdTtt) -> list[nn.Parameter]:
    """Return the parameters that are left to train; UsageError if a freeze cannot be as told."""
    if ttt.freeze_layers > len(model.blocks):
        raise UsageError(
            f"evaluate.ttt.freeze_layers={ttt.freeze_layers}: the model has {len(model.blocks)} "
            "layers; freeze as many or fewer"
        )
    frozen: list[nn.Module] = list(model.blocks[: ttt.freeze_layers])
    if ttt.freeze_tables:
        frozen += [model.embedding, model.bigram, model.trigram, model.value_embedding]
    held = {id(parameter) for module in frozen for parameter in module.parameters()}
    free = [parameter for parameter in model.parameters() if id(parameter) not in held]
    if not free:
        raise UsageError("evaluate.ttt: every parameter is frozen; lower freeze_layers")
    return free


def _train(step: GangStep, tape: Tape, first: int, window: int, ttt: SgdTtt) -> None:
    tokens = tape.lend(first, first + ttt.chunk_tokens // window * window)
    for _ in range(ttt.epochs):
        for mine, num_predictions in batches(cut(tokens, window), ttt.batch_sequences, step.ranks):
            step.take([mine], num_predictions)
            tape.note_update()


def _state(model: GPT, optimizer: torch.optim.Optimizer, chunks: int) -> dict[str, Any]:
    """What the scores after so many chunks follow from."""
    return {"chunks": chunks, "model": model.state_dict(), "optimizer": optimizer.state_dict()}

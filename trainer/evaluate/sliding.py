"""A stream scored with sliding windows, summed into totals."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import nn

from trainer.data.bytecount import ByteTable
from trainer.errors import DataError
from trainer.evaluate.compiled import Compiled
from trainer.evaluate.tape import Flight, Tape
from trainer.evaluate.windows import Windows, batches, plan_windows
from trainer.model.gpt import GPT
from trainer.results import Totals
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec


def score_stream(
    model: GPT, tokens: np.ndarray, table: ByteTable, spec: EvaluateSpec, ranks: Ranks
) -> Totals:
    """Score a token stream [N+1] with sliding windows; every rank returns the gang's totals.

    DataError if there is nothing to predict.
    """
    if len(tokens) < 2:
        raise DataError(f"a stream of {len(tokens)} tokens has nothing to predict")
    tape = Tape(tokens, again=spec.variant == "A")
    slide(model, tape, spec, ranks)
    return tape.totals(table)


def plan_of(tape: Tape, spec: EvaluateSpec) -> Windows:
    """Lay a spec's windows over a tape."""
    documents = spec.documents
    starts = None if documents is None else tape.document_starts(documents.bos)
    return plan_windows(len(tape), spec, starts)


@torch.no_grad()
def slide(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Score a whole tape with sliding windows, the ranks sharing them; what the tape's journal
    holds is not scored again.

    A batch is launched before the scores of the one before it are waited for, so that the device
    always has work.
    """
    done = tape.resume(ranks)
    known = set(zip(done.start.tolist(), done.stop.tolist(), strict=True))
    plan = plan_of(tape, spec).joined()
    compiled = Compiled(model, plan, spec.batch_windows) if spec.compile else None
    flights: deque[Flight] = deque()
    with evaluating(model):
        for batch in share(plan, spec, ranks):
            if (int(batch.start[0]), int(batch.stop[0])) in known:
                continue
            forward, shape = compiled.forward_for(batch) if compiled else (model, None)
            flights.append(tape.launch(forward, batch, ranks.device, spec.window, shape))
            if len(flights) > 1:
                _land(tape, flights)
        while flights:
            _land(tape, flights)
    tape.journal = None  # all is scored: what the others did is not worth writing down
    tape.gather(ranks)


def _land(tape: Tape, flights: deque[Flight]) -> None:
    tape.land(flights.popleft())
    tape.save()


@torch.no_grad()
def score_windows(
    model: GPT, tape: Tape, windows: Windows, spec: EvaluateSpec, ranks: Ranks
) -> None:
    """Score a stretch of a tape's windows, the ranks sharing them, so that all hold its scores."""
    if not len(windows):
        return
    with evaluating(model):
        for batch in share(windows, spec, ranks):
            tape.score(model, batch, ranks.device, spec.window)
    tape.gather(ranks, int(windows.stop[0] - windows.scored[0]), int(windows.stop[-1]))


def share(windows: Windows, spec: EvaluateSpec, ranks: Ranks) -> Iterator[Windows]:
    """Yield this rank's batches. The batches are the same however many share them, and so, up to
    the hardware, are the scores."""
    return islice(batches(windows, spec.batch_windows), ranks.rank, None, ranks.world_size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and back into its own after that."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

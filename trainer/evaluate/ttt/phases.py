"""Global SGD between documents: the base weights train on what all ranks have scored.

Source: parameter-golf PRs #1610, #1626, #1855 (techniques 4.3-19).
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt.steps import GangStep, Sequences, cosine, cut, share, training
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.ttt import Phases

Spans = list[tuple[int, int]]
"""First prediction and stop of each of some documents."""


def stretches(sizes: list[int], phases: Phases | None) -> list[tuple[slice, int]]:
    """Cut a queue of batches, of so many documents each, where a phase comes between two of them.

    Returns each stretch of batches, and how many documents, counted from the head of the queue, are
    trained on after it: 0 after the last. A phase waits for the end of the batch in which its count
    is reached; where two come in one batch, they are one.
    """
    scored = np.cumsum(sizes)
    ends: dict[int, int] = {}
    if phases is not None:
        for part in range(1, phases.count + 1):
            num_documents = phases.documents * part // phases.count
            ends[int(np.searchsorted(scored, num_documents)) + 1] = num_documents
    inner = {end: num for end, num in ends.items() if end < len(sizes)} | {len(sizes): 0}
    firsts = [0, *inner]
    return [(slice(a, b), inner[b]) for a, b in pairwise(firsts)]


def train(model: GPT, tape: Tape, spans: Spans, window: int, phases: Phases, ranks: Ranks) -> None:
    """Take one pass of SGD over scored documents, in the order given; all ranks step alike.

    The scripts cut one long text into sequences and mask attention between documents. Here each
    document is cut by itself, so that a sequence never crosses documents; a step's loss is the mean
    over about `chunk_tokens` predictions either way.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=phases.lr, momentum=phases.momentum)
    step = GangStep(model, optimizer, window, phases.clip_norm, ranks)
    rows = [row for first, stop in spans for row in cut(tape.lend(first, stop), window)]
    chunks = list(_chunks(rows, phases.chunk_tokens))
    at_once = max(1, phases.chunk_tokens // window)
    with training(model, parameters):
        for index, chunk in enumerate(chunks):
            optimizer.param_groups[0]["lr"] = phases.lr * cosine(index / max(len(chunks) - 1, 1))
            mine = share(chunk, ranks)
            micros = [mine[i : i + at_once] for i in range(0, len(mine), at_once)]
            for _ in range(phases.epochs):
                step.take(micros, sum(len(row) - 1 for row in chunk))
                tape.note_update()


def _chunks(rows: Sequences, num_predictions: int) -> Iterator[Sequences]:
    """Yield runs of whole sequences of up to so many predictions, or of one sequence."""
    first, held = 0, 0
    for i, row in enumerate(rows):
        if i > first and held + len(row) - 1 > num_predictions:
            yield rows[first:i]
            first, held = i, 0
        held += len(row) - 1
    yield rows[first:]

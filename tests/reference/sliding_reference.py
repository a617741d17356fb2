"""Slow plain twins of every evaluation plan and of its score: one window, one prediction at a time.

A window is filled up to its full width and goes through the whole forward: no batch, nothing left
out, and positions turn as in the public scripts, which fill every window.
"""

import torch

from trainer.data.bytecount import ByteTable
from trainer.model.gpt import GPT

Pairs = list[tuple[int, int]]
"""The start of the window that scores a prediction, and the prediction; in order."""


def plan(num_predictions: int, window: int, stride: int) -> Pairs:
    """The first window scores all that it reads, a later one what the one before did not reach."""
    pairs, start, done = [], 0, 0
    while done < num_predictions:
        stop = min(start + window, num_predictions)
        pairs += [(start, prediction) for prediction in range(done, stop)]
        done, start = stop, start + stride
    return pairs


def plan_again(num_predictions: int, window: int, stride: int) -> Pairs:
    """Variant A: windows go on to the very end, each scoring its last `stride` predictions."""
    pairs = []
    for start in range(0, num_predictions, stride):
        stop = min(start + window, num_predictions)
        first = start if start == 0 else max(start, stop - stride)
        pairs += [(start, prediction) for prediction in range(first, stop)]
    return pairs


def plan_documents(tokens: list[int], bos: int, window: int, chunk: int) -> Pairs:
    """Chunks of each document, whose BOS is the last target of the one before it."""
    pairs, opened = [], 0
    for prediction in range(len(tokens) - 1):
        if tokens[prediction] == bos:
            opened = prediction
        closes = prediction + 1
        while closes < len(tokens) - 1 and tokens[closes] != bos:
            closes += 1
        chunk_stop = opened + ((prediction - opened) // chunk + 1) * chunk
        pairs.append((max(opened, min(chunk_stop, closes) - window), prediction))
    return pairs


@torch.no_grad()
def score(
    model: GPT, tokens: list[int], table: ByteTable, pairs: Pairs, window: int
) -> tuple[float, int, int]:
    """Sum nats, tokens and bytes; every prediction has its own forward."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for start, prediction in pairs:
        read = tokens[start : prediction + 1]
        filled = torch.tensor([read + [0] * (window - len(read))])
        logits = model.logits(model.hidden(filled))[0, len(read) - 1].double()
        target, previous = tokens[prediction + 1], tokens[prediction]
        nats -= float(torch.log_softmax(logits, dim=-1)[target])
        num_tokens += 1
        num_bytes += int(table.lut[target])
        num_bytes += int(table.has_leading_space[target] and not table.is_boundary[previous])
    return nats, num_tokens, num_bytes

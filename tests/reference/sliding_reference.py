"""Slow plain twin of the sliding-window score: one window and one prediction at a time."""

import torch

from trainer.data.bytecount import ByteTable
from trainer.model.gpt import GPT


def plan(num_predictions: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Assign each prediction the window that scores it: (start, prediction), in order.

    The first window scores all that it reads, a later one what the one before did not reach.
    """
    pairs, start, done = [], 0, 0
    while done < num_predictions:
        stop = min(start + window, num_predictions)
        pairs += [(start, prediction) for prediction in range(done, stop)]
        done, start = stop, start + stride
    return pairs


@torch.no_grad()
def score(
    model: GPT, tokens: list[int], table: ByteTable, window: int, stride: int
) -> tuple[float, int, int]:
    """Sum nats, tokens and bytes; every prediction has its own forward."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for start, prediction in plan(len(tokens) - 1, window, stride):
        read = torch.tensor([tokens[start : prediction + 1]])
        logits = model.logits(model.hidden(read))[0, -1].double()
        target, previous = tokens[prediction + 1], tokens[prediction]
        nats -= float(torch.log_softmax(logits, dim=-1)[target])
        num_tokens += 1
        num_bytes += int(table.lut[target])
        num_bytes += int(table.has_leading_space[target] and not table.is_boundary[previous])
    return nats, num_tokens, num_bytes

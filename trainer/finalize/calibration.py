"""The text that Hessians are collected on: training text, or the model's own. Never validation
text: weights that were fitted to what they are scored on make no legal score (techniques 2.24).
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trainer.data.shards import Dataset, TokenStream
from trainer.errors import DataError, UsageError
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.final import Gptq

BATCH_TOKENS: Final = 16_384


def calibration_batches(model: GPT, gptq: Gptq, dataset: Dataset, ranks: Ranks) -> Iterator[Tensor]:
    """Yield this rank's share of the text that the spec names: batches of tokens int64 [B, T].

    DataError if the dataset's tokenizer is not the model's.
    """
    if gptq.calibration == "generated":
        return generated_batches(model, gptq, ranks)
    vocab_size = model.plan.spec.vocab_size
    if dataset.vocab_size > vocab_size:
        raise DataError(
            f"{dataset.folder}: {dataset.vocab_size} tokens, but the model's vocab_size is "
            f"{vocab_size}; calibrate on the text that it was trained on"
        )
    return training_batches(dataset.stream("train"), gptq, ranks)


def training_batches(stream: TokenStream, gptq: Gptq, ranks: Ranks) -> Iterator[Tensor]:
    """Yield sequences from all over a stream, evenly spaced; UsageError if it is too short."""
    wanted = gptq.sequences * gptq.seq_len
    if len(stream) < wanted:
        raise UsageError(
            f"final.quantize.gptq: {gptq.sequences} sequences of {gptq.seq_len} need {wanted:,} "
            f"tokens, the training text has {len(stream):,}; ask for fewer or shorter ones"
        )
    for numbers in _batches(gptq, ranks):
        starts = (len(stream) * number // gptq.sequences for number in numbers)
        rows = [stream.read(start, start + gptq.seq_len) for start in starts]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def generated_batches(model: GPT, gptq: Gptq, ranks: Ranks) -> Iterator[Tensor]:
    """Yield text that the model draws at a temperature, from a first token that is uniform.

    A sequence follows from the seed and its number. The one forward keeps no state, so that each
    token costs a forward of all before it: sequences · seq_len² / 2 tokens. A full-size pr414 took
    456 s for 64 of 2,048 on an H200; a CPU would take a day.

    Source: parameter-golf PR #1019.
    """
    vocab_size = model.plan.spec.vocab_size
    for numbers in _batches(gptq, ranks):
        seeds = [np.random.SeedSequence([gptq.seed, number]) for number in numbers]
        drawn = np.stack([np.random.default_rng(seed).random(gptq.seq_len) for seed in seeds])
        uniform = torch.from_numpy(drawn).to(ranks.device)
        tokens = torch.zeros(uniform.shape, dtype=torch.int64, device=ranks.device)
        tokens[:, 0] = (uniform[:, 0] * vocab_size).long()
        for place in range(1, gptq.seq_len):
            # As the beginning of a whole sequence: positions may turn by its length.
            hidden = model.hidden(tokens[:, :place], width=gptq.seq_len, last=1)
            chances = (model.logits(hidden)[:, 0].double() / gptq.temperature).softmax(-1)
            rising = chances.cumsum(-1)
            aim = uniform[:, place, None] * rising[:, -1:]
            drawn_token = torch.searchsorted(rising, aim, right=True)
            tokens[:, place] = drawn_token[:, 0].clamp(max=vocab_size - 1)
        yield tokens


def _batches(gptq: Gptq, ranks: Ranks) -> Iterator[range]:
    """Cut this rank's contiguous share of the sequences into batches of their numbers."""
    first, stop = (
        gptq.sequences * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1)
    )
    size = max(BATCH_TOKENS // gptq.seq_len, 1)
    for start in range(first, stop, size):
        yield range(start, min(start + size, stop))

"""Causal attention of each document on its own, for a training (techniques 4.3, 14).

A document begins where the `bos` token stands and where a row does, and ends before the next.
From a batch's tokens the boundaries are found once; every layer then attends within them.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from trainer.kernels.attention import Attend, attend_masked

Within = Callable[[Tensor], Attend]
"""Maps tokens [B, T] to an attention inside their documents."""


def attend_within(tokens: Tensor, bos: int) -> Attend:
    """Plain and slow: reads and writes every pair of positions of a row, and masks most of them."""
    return partial(attend_masked, document_mask(tokens, bos))


def document_mask(tokens: Tensor, bos: int) -> Tensor:
    """Map tokens [B, T] to bool [B, 1, T, T]: which position (row) sees which (column)."""
    documents = (tokens == bos).cumsum(dim=1)
    return (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)


SPARE = 257
"""Empty documents that the list of starts has room for beyond its tokens."""


def document_starts(tokens: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """Return where the documents of tokens [B, T], laid end to end, begin: int32 [B·T + SPARE],
    ascending, B·T after the last; and how many there are, int64 [1] on the CPU.

    The shapes hang on those of the tokens alone, so no batch makes `torch.compile` start again,
    and none holds too many documents. The price is that the CPU waits for the count, once a batch.
    """
    opens = tokens == bos
    opens[:, 0] = True
    starts = opens.flatten().nonzero().flatten()
    size = tokens.numel()
    padded = torch.full((size + SPARE,), size, dtype=torch.int32, device=tokens.device)
    padded[: len(starts)] = starts
    return padded, torch.tensor([len(starts)])


@cache
def starts_operator() -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Register `document_starts` with torch, once a process, for `torch.compile` to take whole."""

    @torch.library.custom_op("fairway::document_starts", mutates_args=())
    def find(tokens: Tensor, bos: int) -> tuple[Tensor, Tensor]:
        return document_starts(tokens, bos)

    @find.register_fake
    def _(tokens: Tensor, bos: int) -> tuple[Tensor, Tensor]:
        starts = tokens.new_empty((tokens.numel() + SPARE,), dtype=torch.int32)
        return starts, torch.empty(1, dtype=torch.int64, device="cpu")

    return find

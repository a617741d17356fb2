"""Magnitude pruning of one tensor, before quantization. Which tensors is the pipeline's choice.

Source: Han et al. 2015 (arXiv 1506.02626); parameter-golf PRs #348, #361 (techniques 2.25).
"""

import math

import torch
from torch import Tensor


def num_pruned(numel: int, ratio: float) -> int:
    """Return how many of `numel` entries a ratio zeroes: floor(ratio * numel)."""
    return math.floor(ratio * numel)


def prune(weight: Tensor, ratio: float) -> Tensor:
    """Return a copy in which the `num_pruned` entries least in magnitude are zero.

    Equal magnitudes go by position, first ones first, so that the count is exact everywhere.
    """
    pruned = weight.detach().clone(memory_format=torch.contiguous_format)
    count = num_pruned(pruned.numel(), ratio)
    if count == 0:
        return pruned
    flat = pruned.view(-1)
    magnitude = flat.abs()
    # torch.quantile refuses more than 2**24 elements and would not give an exact count.
    threshold = magnitude.kthvalue(count).values
    below = magnitude < threshold
    ties = (magnitude == threshold).nonzero().view(-1)
    flat[below] = 0.0
    flat[ties[: count - int(below.sum())]] = 0.0
    return pruned

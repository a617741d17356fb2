import math

import pytest
import torch

from trainer.finalize.prune import num_pruned, prune


def distinct(numel, seed=0):
    magnitudes = torch.randperm(numel, generator=torch.Generator().manual_seed(seed)) + 1.0
    signs = torch.where(torch.arange(numel) % 3 == 0, -1.0, 1.0)
    return (magnitudes * signs).view(-1, 5)


@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.1, 0.5, 0.999])
def test_exactly_the_smallest_are_zeroed(ratio):
    weight = distinct(1000)

    pruned = prune(weight, ratio)

    count = math.floor(ratio * 1000)
    assert num_pruned(1000, ratio) == count
    assert torch.equal(pruned == 0, weight.abs() <= count)
    assert torch.equal(pruned[pruned != 0], weight[weight.abs() > count])


def test_ties_are_zeroed_first_come_first():
    weight = torch.tensor([[2.0, -1.0, 1.0], [1.0, 3.0, -1.0]])

    pruned = prune(weight, 0.5)

    assert pruned.tolist() == [[2.0, 0.0, 0.0], [0.0, 3.0, -1.0]]


def test_ratio_zero_changes_nothing():
    weight = distinct(20)

    assert torch.equal(prune(weight, 0.0), weight)


def test_the_given_tensor_is_left_alone_even_transposed():
    weight = distinct(20)
    before = weight.clone()

    pruned = prune(weight.T, 0.5)

    assert torch.equal(weight, before)
    assert int((pruned == 0).sum()) == 10

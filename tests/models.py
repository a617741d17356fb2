"""Models and banks for tests that compare what comes out of them."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainer.runtime.tensors import load_tensors, saved_names

Bank = dict[str, dict[str, Tensor]]
M = TypeVar("M", bound=nn.Module)


def off_its_start(model: M, seed: int = 0, scale: float = 0.2) -> M:
    """Move every parameter of a model away from its start, where much is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def bank_of(training: Path) -> Bank:
    """Every entry of a training's bank."""
    bank = training / "bank"
    return {name: load_tensors(bank, name) for name in saved_names(bank)}


def assert_same_bits(one: Bank, other: Bank) -> None:
    """Hold two banks against each other, to the last bit."""
    assert list(one) == list(other)
    for entry, tensors in one.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[entry][name]), f"{entry} {name}"


def assert_same_banks(one: Path, other: Path) -> None:
    """Hold the banks of two trainings against each other, to the last bit."""
    assert_same_bits(bank_of(one), bank_of(other))

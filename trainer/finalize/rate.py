"""What tensors cost in bits and in error at every step of their grids.

All of it follows from the deviations of the rows: trained rows are close to normal, and what a
normal draw on a grid costs is `trainer.sizes.gaussian_code`. It has to get near, and to have the
right slopes: real bytes are measured by whoever writes files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.quant import levels
from trainer.rows import row_deviations
from trainer.sizes import SCALE_BITS, TensorSize, gaussian_code

Family = Literal["sd", "floor", "int8"]
"""How the steps of a unit go over its rows. sd: each row a share of its own deviation. floor: one
step for all rows, by the scale floor. int8: one step for all, by the floor of the rule for 8."""
FINEST, COARSEST = 2.0**-5.5, 4.0  # steps in deviations; at the coarsest nearly all is zero
POINTS: Final = 20  # of a curve per octave
TOLERATED: Final = 5e-3  # of the rounding error: so much may be lost to too narrow a range


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Integer tensors whose steps move together: those of one class or more.

    Of each row its deviation, largest magnitude and length, float64 [rows].
    """

    classes: tuple[str, ...]
    family: Family
    most_bits: int
    tensors: tuple[TensorSize, ...]
    deviation: np.ndarray
    largest: np.ndarray
    length: np.ndarray

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    def step(self, relative: float) -> float:
        """The common step of the rows, at a step relative to their typical deviation."""
        typical = np.exp((self.length * np.log(self.deviation)).sum() / self.length.sum())
        return float(np.float16(relative * typical))

    def steps(self, relative: float) -> np.ndarray:
        """The step of each row."""
        if self.family == "sd":
            return relative * self.deviation
        return np.full_like(self.deviation, self.step(relative))

    def fewest_bits(self, relative: float) -> int | None:
        """The fewest bits whose range holds the rows at these steps; None where none does."""
        steps = self.steps(relative)
        squares = float((self.length * steps**2).sum())
        for bits in range(8 if self.family == "int8" else 2, self.most_bits + 1):
            if self.family == "sd":
                clipped = np.maximum(self.largest - (levels(bits) + 0.5) * steps, 0.0)
                lost = 12 * float((clipped**2).sum())
            else:  # nothing is clipped: a row that is too wide takes a wider step
                widened = np.maximum(self.largest / levels(bits), steps)
                lost = float((self.length * widened**2).sum()) - squares
            if lost <= TOLERATED * squares:
                return bits
        return None


def unit(
    state: Mapping[str, Tensor],
    tensors: Sequence[TensorSize],
    family: Family = "sd",
    most_bits: int = 8,
) -> Unit:
    """Measure the rows of tensors that are to share a family of steps."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for tensor in tensors:
        weight = state[tensor.name].float()
        lengths = torch.full(weight.shape[:1], float(weight.shape[1]))
        rows.append((row_deviations(weight), weight.abs().amax(dim=1), lengths))
    deviation, largest, length = (
        torch.cat(kind).double().numpy() for kind in zip(*rows, strict=True)
    )
    classes = tuple(dict.fromkeys(tensor.part for tensor in tensors))
    return Unit(
        classes, family, most_bits, tuple(tensors), np.maximum(deviation, 1e-9), largest, length
    )


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A unit's bits and squared error by the logarithm of its relative step, rising; `limits` are
    the finest and the coarsest step that it may take."""

    unit: Unit
    places: np.ndarray
    bits: np.ndarray
    error: np.ndarray
    limits: tuple[float, float]

    def bits_at(self, relative: float) -> float:
        return float(np.interp(math.log2(relative), self.places, self.bits))

    def error_at(self, relative: float) -> float:
        return float(np.interp(math.log2(relative), self.places, self.error))


def curve(unit: Unit) -> Curve:
    """Work out a unit's curve from the normal law of its rows."""
    table = np.array([gaussian_code(2.0**place, levels(8)) for place in _ROWS])
    places = np.arange(math.log2(FINEST), math.log2(COARSEST) + 1e-9, 1 / POINTS)
    bits, error = np.zeros(len(places)), np.zeros(len(places))
    for index, place in enumerate(places):
        rows = np.log2(unit.steps(2.0**place) / unit.deviation)
        bits[index] = (unit.length * np.interp(rows, _ROWS, table[:, 0])).sum()
        squares = np.interp(rows, _ROWS, table[:, 1])
        error[index] = (unit.length * unit.deviation**2 * squares).sum()
    held = [place for place in places if unit.fewest_bits(2.0**place) is not None]
    finest = 2.0 ** float(held[0] if held else places[-1])
    return Curve(unit, places, bits + SCALE_BITS * len(rows), error, (finest, COARSEST))


# Rows may be wider or narrower than the typical one of their unit.
_ROWS: Final = np.arange(math.log2(FINEST) - 6, math.log2(COARSEST) + 6, 1 / POINTS)

"""The model of a matrix as the coder writes it, and what it says of every integer."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Final

import numpy as np

from trainer.finalize.coder_tables import NUM_CLASSES, PER_OCTAVE, octaves, roots

MAX_CODE: Final = 63  # codes are -63..63
CODE_SHAPE: Final = 2  # of their distribution: scales have wider tails than a Gaussian
NUM_SPREADS: Final = 64
SLOPES: Final = 16
MAX_RANK: Final = 8
EXPONENTS: Final = 16
EIGHTHS: Final = 8
MAX_MEAN: Final = 127  # in eighths of σ
SHIFT: Final = 16  # classes to the standard error of one integer's: PER_OCTAVE / (ln 2 · √2)

Earlier = dict[int, list[np.ndarray]]  # sizes of rows and columns of the matrices before, by length


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Whole numbers of one distribution.

    spread: 0 where all are zero, else 1 + half the class of their deviation; values int32.
    """

    spread: int
    values: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """Scales in classes: codes times `step_of`, added to what a reference predicts.

    reference: 1 + the number of the earlier axis of this length that these scales follow, or 0;
    slope: how steeply, in eighths, 1..16.
    """

    reference: int
    slope: int
    codes: Codes


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """One product of a column and a row: 12 · rows · cols / 2 ** exponent, in its own unit.

    Where 2 ** exponent is the singular value, a step of the codes is as fine as pays.
    """

    exponent: int
    rows: Codes
    cols: Codes


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The model of a matrix: the class of its mean scale, the shape of its tails, its scales, the
    components of what rows and columns only together add to these, and those of its means."""

    base: int
    shape: int
    rows: Axis
    cols: Axis
    shifts: tuple[Component, ...] = ()
    means: tuple[Component, ...] = ()

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.rows.codes.values), len(self.cols.codes.values)


def step_of(count: int) -> int:
    """Return the step, in classes, in which the scale of `count` integers is written.

    A scale off by δ nats costs count · δ² nats and a step s costs -ln s, so s² = 6 / count.
    """
    return max(1, isqrt(3196 // count))  # 6 · (16 / ln 2)² = 3196.9


def own_sizes(scale: np.ndarray, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what the float16 scales say of the sizes of rows and columns, in classes, mean 0."""
    return _centre(octaves(scale)), np.zeros(cols, np.int64)


def predict(slope: int, reference: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return what a reference makes of scales, int64 [length]: its sizes times the slope, less
    what the float16 scales hold of them already."""
    return (slope * reference >> 3) - own


def restore(axis: Axis, step: int, references: Sequence[np.ndarray], own: np.ndarray) -> np.ndarray:
    """Return the scales of an axis in classes, int64 [length]."""
    scales = axis.codes.values.astype(np.int64) * step
    if axis.reference:
        scales += predict(axis.slope, references[axis.reference - 1], own)
    return np.clip(scales, -NUM_CLASSES, NUM_CLASSES)  # or references could grow without end


def scales_of(plan: Plan, scale: np.ndarray, earlier: Earlier) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales of rows, base included, and columns in classes; int64."""
    num_rows, num_cols = plan.lengths
    own = own_sizes(scale, num_cols)
    rows = restore(plan.rows, step_of(num_cols), earlier.get(num_rows, ()), own[0])
    cols = restore(plan.cols, step_of(num_rows), earlier.get(num_cols, ()), own[1])
    return plan.base + rows, cols


def remember(plan: Plan, scale: np.ndarray, earlier: Earlier) -> None:
    """Add the sizes of a matrix's rows and columns to the earlier ones."""
    rows, cols = scales_of(plan, scale, earlier)
    for sizes in (rows + own_sizes(scale, len(cols))[0], cols):
        earlier.setdefault(len(sizes), []).append(_centre(sizes))


def classes_of(plan: Plan, rows: np.ndarray, cols: np.ndarray, part: slice) -> np.ndarray:
    """Return the class of every integer in some rows, uint16 [rows, cols]."""
    classes = rows[part, None] + cols
    if plan.shifts:
        classes += _shifts(plan, part)
    return np.clip(classes, 0, NUM_CLASSES - 1).astype(np.uint16)


def means_of(plan: Plan, part: slice) -> np.ndarray:
    """Return the mean of every integer in some rows in eighths of its σ, int64 [rows, cols].

    Components of means are in units of the scales of row and column alone, in which they are few.
    """
    means = add(plan.means, EIGHTHS << 8, part).clip(-(1 << 22), 1 << 22)
    if plan.means and plan.shifts:
        shifts = _shifts(plan, part)
        means = means * roots()[shifts % PER_OCTAVE] >> 40 + shifts // PER_OCTAVE
    return np.clip(means >> 8, -MAX_MEAN, MAX_MEAN)


def add(components: Sequence[Component], unit: int, part: slice) -> np.ndarray:
    """Return the sum of components in some rows times a unit, rounded down, int64 [rows, cols]."""
    total: np.ndarray | int = 0
    for one in components:
        rows, cols = (codes.values.astype(np.int64) for codes in (one.rows, one.cols))
        total += np.multiply.outer(12 * unit * rows[part], cols) << EXPONENTS - one.exponent
    return np.asarray(total >> EXPONENTS)


def _shifts(plan: Plan, part: slice) -> np.ndarray:
    return add(plan.shifts, SHIFT, part).clip(-NUM_CLASSES, NUM_CLASSES)


def _centre(values: np.ndarray) -> np.ndarray:
    return values - values.sum() // len(values)

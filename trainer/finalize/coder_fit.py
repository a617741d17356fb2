"""What the encoder chooses: the scale of every row and column, by maximum likelihood, and means.

Only the encoder runs this, so it may compute in floating point; what it chooses is written.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np

from trainer.finalize.coder_plan import (
    CODE_SHAPE,
    EIGHTHS,
    EXPONENTS,
    MAX_CODE,
    MAX_RANK,
    NUM_SPREADS,
    SHIFT,
    SLOPES,
    Axis,
    Codes,
    Component,
    Earlier,
    Plan,
    add,
    own_sizes,
    predict,
    restore,
    scales_of,
    step_of,
)
from trainer.finalize.coder_tables import NUM_CLASSES, NUM_SHAPES, PER_OCTAVE, PRECISION, weights

_ALL: Final = slice(None)
_GRID: Final = np.arange(NUM_CLASSES)
_CODES: Final = np.arange(-MAX_CODE, MAX_CODE + 1, dtype=np.int32)
_POWER_STEPS: Final = 6
_MEAN_STEPS: Final = 2
_SHIFT_STEPS: Final = 4


def plans(q: np.ndarray, scale: np.ndarray, earlier: Earlier) -> Iterator[Plan]:
    """Yield models for a matrix of at least two different integers: a plain one, and where
    components of its means show, some with those; which is the shortest, only writing tells."""
    plan = _choose(q, scale, earlier)
    yield plan
    for _ in range(_MEAN_STEPS):
        deviations = _deviations(plan, scale, earlier)
        means = _components(q / deviations)
        if not means:
            return
        middle = np.rint(add(means, EIGHTHS, _ALL) / EIGHTHS * deviations)
        # Scales around the means, then the means in terms of those scales.
        rest = np.clip(q - middle, -255, 255).astype(np.int32)
        plan = _choose(rest, scale, earlier)
        yield replace(plan, means=_components(q / _deviations(plan, scale, earlier)))


def _deviations(plan: Plan, scale: np.ndarray, earlier: Earlier) -> np.ndarray:
    """Return the σ that row and column give to every integer, float32 [rows, cols]."""
    rows, cols = scales_of(plan, scale, earlier)
    return np.exp2((rows[:, None] + cols) / PER_OCTAVE - 3).astype(np.float32)


def _choose(rest: np.ndarray, scale: np.ndarray, earlier: Earlier) -> Plan:
    """Return the model for integers around 0."""
    own = own_sizes(scale, rest.shape[1])
    fit = Likelihood(rest)
    rows, cols = fit.start()
    rows += fit.step(rows, cols, 1)[0]
    cols += fit.step(rows, cols, 0)[0]
    shifts = fit.find_shifts(rows, cols)
    rows, cols = rows + cols.mean(), cols - cols.mean()
    by, curvature = fit.step(rows, cols, 1)
    rows += by
    base = int(np.clip(np.rint(rows.mean()), 0, NUM_CLASSES - 1))
    row_axis = _choose_axis(rows - base, curvature, rest.shape[1], earlier, own[0])
    rows = base + restore(row_axis, step_of(rest.shape[1]), earlier.get(len(rows), ()), own[0])
    by, curvature = fit.step(rows, cols, 0)
    col_axis = _choose_axis(cols + by, curvature, rest.shape[0], earlier, own[1])
    cols = restore(col_axis, step_of(rest.shape[0]), earlier.get(len(cols), ()), own[1])
    shape, by = fit.choose_shape(rows, cols)
    base = int(np.clip(base + by, 0, NUM_CLASSES - 1))
    return Plan(base, shape, row_axis, col_axis, shifts)


class Likelihood:
    """Integers around 0, and how their code length answers to their classes."""

    def __init__(self, rest: np.ndarray) -> None:
        self.low, self.high = int(rest.min()), int(rest.max())
        self.symbols = rest.astype(np.int32) - self.low
        cost = nats_of(0, self.low, self.high)
        chance = np.exp(-cost)
        self.slope: np.ndarray = np.gradient(cost, axis=0).astype(np.float32)
        self.information = ((chance * self.slope**2).sum(1) + 1e-6).astype(np.float32)
        squares = np.square(np.arange(self.low, self.high + 1, dtype=np.float32))
        self.moments = chance @ squares
        self.squares = squares[self.symbols]
        self.shift: np.ndarray | int = 0

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and columns in classes, from second moments alone."""
        rows, cols, both = (
            np.interp(self.squares.mean(axis, dtype=np.float64), self.moments, _GRID)
            for axis in (1, 0, None)
        )
        return rows, cols - both

    def classes(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Return the nearest class of every integer, int32 [rows, cols]."""
        return np.rint(rows[:, None] + cols + self.shift).clip(0, NUM_CLASSES - 1).astype(np.int32)

    def step(self, rows: np.ndarray, cols: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one scoring step for the rows (axis 1) or columns (axis 0), and the curvature."""
        places = self.classes(rows, cols)
        curvature = self.information[places].sum(axis, dtype=np.float64)
        places *= self.slope.shape[1]
        places += self.symbols
        gradient = self.slope.reshape(-1)[places].sum(axis, dtype=np.float64)
        return np.clip(-gradient / curvature, -8.0, 8.0), curvature

    def find_shifts(self, rows: np.ndarray, cols: np.ndarray) -> tuple[Component, ...]:
        """Find, and from now on include, what rows and columns only together say of the scales."""
        shifts: tuple[Component, ...] = ()
        for _ in range(_SHIFT_STEPS):
            places = self.classes(rows, cols)
            score = -(self.information[places] ** -0.5)
            places *= self.slope.shape[1]
            places += self.symbols
            score *= self.slope.reshape(-1)[places]
            shifts = _components(score.clip(-3.0, 3.0) + np.float32(1 / SHIFT) * self.shift)
            if not shifts:
                break
            self.shift = add(shifts, SHIFT, _ALL).astype(np.float32)
        return shifts

    def choose_shape(self, rows: np.ndarray, cols: np.ndarray) -> tuple[int, int]:
        """Return the shape of the least nats, and by how much all classes move with it."""
        width = self.slope.shape[1]
        places = self.classes(rows, cols) * width + self.symbols
        counts = np.bincount(places.reshape(-1), minlength=NUM_CLASSES * width)
        counts = counts.reshape(NUM_CLASSES, width)
        used = np.flatnonzero(counts.any(1))
        options: list[tuple[float, int, int]] = []
        for shape in range(NUM_SHAPES):
            nats = nats_of(shape, self.low, self.high)
            for by in range(-shape - 1, 2):
                moved = np.clip(used + by, 0, NUM_CLASSES - 1)
                options.append((float((counts[used] * nats[moved]).sum()), shape, by))
        return min(options)[1:]


def _choose_axis(
    wanted: np.ndarray, curvature: np.ndarray, count: int, earlier: Earlier, own: np.ndarray
) -> Axis:
    """Return the scales that, written and with the integers that they misfit, cost the least.

    wanted: the likeliest scales in classes; curvature: of the code length there, in nats.
    """
    step = step_of(count)
    nats, codes = _choose_codes(wanted / step, curvature * step**2)
    options = [(nats, Axis(0, 0, codes))]
    best: tuple[float, int, int] | None = None
    for number, reference in enumerate(earlier.get(len(wanted), ())):
        weighted = curvature * reference
        steepness = weighted @ (wanted + own) / max(weighted @ reference, 1e-9)
        slope = int(np.clip(np.rint(8 * steepness), 1, SLOPES))
        misfit = float(curvature @ np.square(wanted - predict(slope, reference, own)))
        if best is None or misfit < best[0]:
            best = (misfit, number, slope)
    if best is not None:
        _, number, slope = best
        rest = wanted - predict(slope, earlier[len(wanted)][number], own)
        nats, codes = _choose_codes(rest / step, curvature * step**2)
        options.append((nats, Axis(number + 1, slope, codes)))
    return min(options, key=lambda option: option[0])[1]


def _choose_codes(wanted: np.ndarray, curvature: np.ndarray) -> tuple[float, Codes]:
    """Return the codes for real numbers, and their nats and those of what they misfit."""
    misfit = 0.5 * curvature[:, None] * np.square(wanted[:, None] - _CODES)
    best = float(misfit[:, MAX_CODE].sum()), Codes(0, np.zeros(len(wanted), np.int32))
    deviation = max(float(np.sqrt(np.square(wanted).mean())), 1e-3)
    middle = int(1 + PER_OCTAVE * (np.log2(deviation) + 3) / 2)
    for spread in range(max(middle - 6, 1), min(middle + 4, NUM_SPREADS)):
        cost = misfit + _spread_nats(spread)
        at = cost.argmin(1)
        nats = float(np.take_along_axis(cost, at[:, None], 1).sum())
        if nats < best[0]:
            best = nats, Codes(spread, _CODES[at])
    return best


def _components(standard: np.ndarray) -> tuple[Component, ...]:
    """Return the components of numbers, of deviation 1 but for these, that are worth their codes.

    The singular value of noise is at most √rows + √cols; a component takes about two nats for
    each row and column and saves half the square of its singular value.
    """
    rows, cols = standard.shape
    basis = np.random.default_rng(0).standard_normal((cols, MAX_RANK), np.float32)
    for _ in range(_POWER_STEPS):
        basis = np.linalg.qr(standard.T @ (standard @ basis))[0]
    left, sizes, right = np.linalg.svd(standard @ basis, full_matrices=False)
    worth = sizes**2 > 5 * (rows + cols)
    right = right @ basis.T
    return tuple(_component(left[:, i], float(sizes[i]), right[i]) for i in np.flatnonzero(worth))


def _component(left: np.ndarray, size: float, right: np.ndarray) -> Component:
    exponent = int(np.clip(np.rint(np.log2(size)), 0, EXPONENTS - 1))
    # Rows in steps of √(12 / cols) where columns have size 1, and the other way round.
    by = (size * 2.0**exponent / 12) ** 0.5
    sharpness = np.full(len(left), 12 * 2.0**exponent / size), np.full(len(right), 12.0)
    rows, cols = (
        _choose_codes(by * side, curvature)[1]
        for side, curvature in zip((left, right), sharpness, strict=True)
    )
    return Component(exponent, rows, cols)


def _spread_nats(spread: int) -> np.ndarray:
    return nats_of(CODE_SHAPE, -MAX_CODE, MAX_CODE)[2 * (spread - 1)]


@lru_cache(64)
def nats_of(shape: int, low: int, high: int) -> np.ndarray:
    """Return the code length of every symbol in every class, [classes, symbols]."""
    return np.log(2.0) * PRECISION - np.log(weights(_GRID, 0 * _GRID, shape, low, high) + 1.0)

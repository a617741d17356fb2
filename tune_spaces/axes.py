"""One axis of a search space: the values a knob may take, or a range to draw from. Pure."""

import math
from typing import Literal

import numpy as np

from trainer.specs.base import require, spec

Value = int | float | bool | str
PHASES = ("train", "bank", "final", "eval")


@spec
class Axis:
    """`values`, or `min` and `max` with a scale; `num` is how many points a grid takes of a range.

    phase: train (costs a training), bank (which average), final (artifact), eval (score). It
    follows from the path; where it is written it must agree.
    """

    phase: Literal["train", "bank", "final", "eval"] | None = None
    values: tuple[Value, ...] | None = None
    min: float | None = None
    max: float | None = None
    scale: Literal["linear", "log"] = "linear"
    num: int | None = None
    when: str | None = None
    """An expression over the recipe's paths; where it does not hold, a point has no such knob."""

    def __post_init__(self) -> None:
        is_range = self.min is not None or self.max is not None
        require(
            (self.values is None) == is_range,
            "give either values: [...] or both min and max",
        )
        if self.values is not None:
            require(len(self.values) > 0, "values is empty")
            require(len(set(self.values)) == len(self.values), "values has a repeat")
            require(self.num is None, "num goes with min and max")
            return
        require(self.min is not None and self.max is not None, "a range needs both min and max")
        assert self.min is not None
        assert self.max is not None
        require(self.min < self.max, f"min={self.min} is not below max={self.max}")
        require(self.scale == "linear" or self.min > 0, f"a log scale needs min={self.min} above 0")
        require(self.num is None or self.num >= 2, f"num={self.num} must be at least 2")

    def extremes(self, *, is_integer: bool = False) -> tuple[Value, ...]:
        """The values that a spec must accept for all of the axis to be acceptable."""
        return self.values if self.values is not None else self.ends(is_integer=is_integer)

    def ends(self, *, is_integer: bool = False) -> tuple[Value, Value]:
        """The least and the greatest value of a range, whole ones for an integer knob."""
        assert self.min is not None
        assert self.max is not None
        return (math.ceil(self.min), math.floor(self.max)) if is_integer else (self.min, self.max)

    def grid(self, *, is_integer: bool = False) -> tuple[Value, ...]:
        """The points of a grid; ValueError for a range without `num`."""
        if self.values is not None:
            return self.values
        if self.num is None:
            raise ValueError("a grid over a range needs num, or list values")
        points = np.linspace(*self._span(0.0), self.num)
        values = (self._back(float(point), is_integer=is_integer) for point in points)
        return tuple(dict.fromkeys(values))

    def draw(self, generator: np.random.Generator, *, is_integer: bool = False) -> Value:
        """One random value: uniform over values, or over the range on its scale."""
        if self.values is not None:
            return self.values[int(generator.integers(len(self.values)))]
        # Half a step beyond each end, or the ends would come half as often as the rest.
        low, high = self._span(0.5 if is_integer else 0.0)
        return self._back(float(generator.uniform(low, high)), is_integer=is_integer)

    def num_values(self, *, is_integer: bool = False) -> int | None:
        """How many values there are; None for a range that has no end of them."""
        if self.values is not None:
            return len(self.values)
        low, high = self.ends(is_integer=is_integer)
        return int(high) - int(low) + 1 if is_integer else None

    def _span(self, beyond: float) -> tuple[float, float]:
        """The range on its scale, `beyond` wider on each side."""
        low, high = self.ends(is_integer=beyond > 0.0)
        low, high = float(low) - beyond, float(high) + beyond
        return (math.log(low), math.log(high)) if self.scale == "log" else (low, high)

    def _back(self, point: float, *, is_integer: bool) -> Value:
        low, high = self.ends(is_integer=is_integer)
        value = math.exp(point) if self.scale == "log" else point
        if is_integer:
            return min(max(round(value), int(low)), int(high))
        # Six significant digits read well in tables and names, and lose nothing that matters.
        return min(max(float(f"{value:.6g}"), float(low)), float(high))

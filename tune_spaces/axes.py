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

    def extremes(self) -> tuple[Value, ...]:
        """The values that a spec must accept for all of the axis to be acceptable."""
        if self.values is not None:
            return self.values
        assert self.min is not None
        assert self.max is not None
        return (self.min, self.max)

    def grid(self) -> tuple[Value, ...]:
        """The points of a grid; ValueError for a range without `num`."""
        if self.values is not None:
            return self.values
        if self.num is None:
            raise ValueError("a grid over a range needs num, or list values")
        low, high = self._ends()
        points = np.linspace(low, high, self.num)
        return tuple(self._back(float(point)) for point in points)

    def draw(self, generator: np.random.Generator) -> Value:
        """One random value: uniform over values, or over the range on its scale."""
        if self.values is not None:
            return self.values[int(generator.integers(len(self.values)))]
        low, high = self._ends()
        return self._back(float(generator.uniform(low, high)))

    def num_values(self) -> int | None:
        """How many values there are; None for a range, which has no end of them."""
        return None if self.values is None else len(self.values)

    def _ends(self) -> tuple[float, float]:
        assert self.min is not None
        assert self.max is not None
        if self.scale == "log":
            return math.log(self.min), math.log(self.max)
        return self.min, self.max

    def _back(self, point: float) -> float:
        assert self.min is not None
        assert self.max is not None
        value = math.exp(point) if self.scale == "log" else point
        # Six significant digits read well in tables and names, and lose nothing that matters.
        return min(max(float(f"{value:.6g}"), self.min), self.max)

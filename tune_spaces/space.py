"""A search space over the knobs of a recipe: which phase a knob acts in, which points there are.

Pure. A point is a plain dict from dotted path to value.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from trainer.codec import check_path, parse, with_values
from trainer.errors import UsageError
from trainer.specs.recipe import Recipe
from tune_spaces.axes import PHASES, Axis, Value

Point = dict[str, Value]
Axes = Mapping[str, Axis]

_PHASE_OF_PREFIX = {"model": "train", "train": "train", "final": "final", "evaluate": "eval"}
# These choose among what a training leaves in its bank, so they cost no training.
_BANK_PATHS = frozenset({"train.averages.ema_decay", "final.average"})
# Values keep six significant digits, so a narrow range has few: drawing on would never end.
_MAX_DRAWS_PER_POINT = 1_000
_NOT_AXES = {
    "train.seed": "list seeds under seeds.search",
    "train.averages.ema_bank": "sweep train.averages.ema_decay; its values are all banked",
}


def phase_of(path: str) -> str | None:
    """Return the phase a knob acts in, None if it is no knob of a search."""
    if path in _BANK_PATHS:
        return "bank"
    return _PHASE_OF_PREFIX.get(path.partition(".")[0])


def check_space(axes: Axes, recipe: Mapping[str, Any], where: str, recipe_where: str) -> None:
    """Raise UsageError, a line a fault, unless every axis has a knob, its phase and fit values.

    Values are tried within the recipe, so that an axis is held to the field's own rules and a
    recipe that only the space completes (a decay, a shorter warmdown) is accepted.
    """
    _raise_all(
        _fault(_check_knob, path, axis, f"{where}: space.{path}") for path, axis in axes.items()
    )
    first = with_values(recipe, [(path, axis.extremes()[0]) for path, axis in axes.items()])
    base, base_fault = first, _fault(parse, Recipe, first, recipe_where)
    if base_fault is not None:
        parse(Recipe, recipe, recipe_where)
        base = dict(recipe)
    _raise_all(
        _fault(parse, Recipe, with_values(base, [(path, value)]), f"{where}: space.{path}={value}")
        for path, axis in axes.items()
        for value in axis.extremes()
    )
    _raise_all([base_fault])


def _fault(check: Callable[..., object], *arguments: Any) -> str | None:
    try:
        check(*arguments)
    except UsageError as error:
        return str(error)
    return None


def _raise_all(faults: Iterable[str | None]) -> None:
    lines = [fault for fault in faults if fault is not None]
    if lines:
        raise UsageError("\n".join(lines))


def _check_knob(path: str, axis: Axis, at: str) -> None:
    check_path(Recipe, path, at)
    if path in _NOT_AXES:
        raise UsageError(f"{at}: not an axis; {_NOT_AXES[path]}")
    phase = phase_of(path)
    if phase is None:
        raise UsageError(f"{at}: not a knob of a search; set it under overrides")
    if axis.phase not in (None, phase):
        raise UsageError(f"{at}: phase {axis.phase} is wrong; this knob acts in phase {phase}")


def of_phase(axes: Axes, *phases: str) -> dict[str, Axis]:
    """The axes that act in the given phases, in the order they were written."""
    return {path: axis for path, axis in axes.items() if phase_of(path) in phases}


def num_points(axes: Axes) -> int | None:
    """How many points a space of listed values has; None if it has a range."""
    counts = [axis.num_values() for axis in axes.values()]
    return None if None in counts else math.prod(count for count in counts if count is not None)


def grid(axes: Axes, where: str) -> list[Point]:
    """Every combination, the last axis fastest."""
    columns: list[Iterable[Value]] = []
    for path, axis in axes.items():
        try:
            columns.append(axis.grid())
        except ValueError as error:
            raise UsageError(f"{where}: space.{path}: {error}") from error
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*columns)]


def sample(axes: Axes, num: int, seed: int, where: str) -> list[Point]:
    """Draw `num` different points; the same seed draws the same. UsageError for too many."""
    available = num_points(axes)
    if available is not None and num > available:
        raise UsageError(
            f"{where}: {num} points are asked for, but the space has {available}; ask for fewer "
            "or use method: grid"
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    points: dict[tuple[Value, ...], Point] = {}
    for _ in range(_MAX_DRAWS_PER_POINT * num):
        point = {path: axis.draw(generator) for path, axis in axes.items()}
        points.setdefault(tuple(point.values()), point)
        if len(points) == num:
            return list(points.values())
    raise UsageError(
        f"{where}: {num} points are asked for, but the ranges gave only {len(points)} different "
        "ones; ask for fewer or widen a range"
    )


assert set(_PHASE_OF_PREFIX.values()) | {"bank"} == set(PHASES)

"""A search space over the knobs of a recipe: which phase a knob acts in, which points there are.

Pure. A point is a plain dict from dotted path to value. It lacks the axes whose `when` does not
hold, so axes are settled one after another, each after those that its `when` reads.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np

from trainer.codec import check_path, field_type, members_of, parse, with_values
from trainer.errors import UsageError
from trainer.specs.recipe import Recipe
from tune_spaces.axes import PHASES, Axis, Value
from tune_spaces.expressions import Expression, knobs_read, parse_expression

Point = dict[str, Value]
Axes = Mapping[str, Axis]
Ask = Callable[[str, Axis, bool], Value]
"""Choose a value of the axis at a path, a whole number where the flag says so."""
Lay = Callable[[Point], dict[str, Any] | None]
"""Lay a point over its recipe, with all that follows from it; None where it is dropped."""

_PHASE_OF_PREFIX = {"model": "train", "train": "train", "final": "final", "evaluate": "eval"}
# These choose among what a training leaves in its bank, so they cost no training.
_BANK_PATHS = frozenset({"train.averages.ema_decay", "final.average"})
# Values keep six significant digits, so a narrow range has few: drawing on would never end.
_MAX_DRAWS_PER_POINT = 1_000
# Combinations of the axes above one that are tried until its `when` holds.
_MAX_TRIED = 10_000
_NOT_AXES = {
    "train.seed": "list seeds under seeds.search",
    "train.averages.ema_bank": "sweep train.averages.ema_decay; its values are all banked",
}


def phase_of(path: str) -> str | None:
    """Return the phase a knob acts in, None if it is no knob of a search."""
    if path in _BANK_PATHS:
        return "bank"
    return _PHASE_OF_PREFIX.get(path.partition(".")[0])


def is_integer(path: str) -> bool:
    """Whether a knob takes whole numbers."""
    annotation: Any = Recipe
    for key in path.split("."):
        annotation = field_type(annotation, key)
    members = members_of(annotation)
    return int in members and float not in members


def check_space(
    axes: Axes, recipe: Mapping[str, Any], where: str, recipe_where: str, lay: Lay | None = None
) -> None:
    """Raise UsageError, a line a fault, unless every axis has a knob, its phase and fit values.

    Values are tried within the recipe, so that an axis is held to the field's own rules and a
    recipe that only the space completes (a decay, a shorter warmdown) is accepted.
    """
    _raise_all(
        _fault(_check_knob, path, axis, f"{where}: space.{path}") for path, axis in axes.items()
    )
    axes = in_order(axes, where)
    lay = lay or (lambda point: with_values(recipe, point.items()))
    first = suggest(axes, recipe, _first_value, where)
    base, base_fault = lay(first), _fault(_check_point, lay, first, recipe_where)
    if base_fault is not None:
        parse(Recipe, recipe, recipe_where)

    def faults() -> Iterator[str | None]:
        for path, axis in axes.items():
            for value in axis.extremes(is_integer=is_integer(path)):
                point = _with_value(path, value, axes, recipe, where)
                if base is not None and base_fault is None:
                    point = suggest(axes, recipe, _asked(point), where)
                yield _fault(_check_point, lay, point, f"{where}: space.{path}={value}")

    _raise_all(faults())
    _raise_all([base_fault])


def _check_point(lay: Lay, point: Point, at: str) -> None:
    laid = lay(point)
    if laid is not None:
        parse(Recipe, laid, at)


def _with_value(
    path: str, value: Value, axes: Axes, recipe: Mapping[str, Any], where: str
) -> Point:
    """A point that has this value and what it takes for its axis to be there."""
    above = _above(path, axes, where)
    columns = [axes[each].extremes(is_integer=is_integer(each)) for each in above]
    needed = {each: axes[each] for each in (*above, path)}
    for values in itertools.islice(itertools.product(*columns), _MAX_TRIED):
        chosen = {**dict(zip(above, values, strict=True)), path: value}
        point = suggest(needed, recipe, _asked(chosen), where)
        if path in point:
            return point
    raise UsageError(f"{where}: space.{path}.when: {axes[path].when!r} never holds in this space")


def _above(path: str, axes: Axes, where: str) -> list[str]:
    """The axes that decide whether an axis is there, in the order of `axes`."""
    found: set[str] = set()
    open_ = [path]
    while open_:
        fresh = _decided_by(open_.pop(), axes, where) - found
        found |= fresh
        open_ += fresh
    return [each for each in axes if each in found]


def _asked(chosen: Mapping[str, Value]) -> Ask:
    """Answer with what is chosen, and otherwise with an axis's first value."""
    return lambda path, axis, whole: chosen.get(path, _first_value(path, axis, whole))


def _first_value(path: str, axis: Axis, whole: bool) -> Value:
    return axis.extremes(is_integer=whole)[0]


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
    for name, end in (("min", axis.min), ("max", axis.max)):
        if end is not None and is_integer(path) and not end.is_integer():
            raise UsageError(f"{at}: {name}={end}: this knob takes whole numbers")


def of_phase(axes: Axes, *phases: str) -> dict[str, Axis]:
    """The axes that act in the given phases, in the order they were written."""
    return {path: axis for path, axis in axes.items() if phase_of(path) in phases}


def when_of(path: str, axis: Axis, where: str) -> Expression | None:
    """The expression that says whether an axis is there, None where it always is."""
    if axis.when is None:
        return None
    return parse_expression(axis.when, f"{where}: space.{path}.when")


def _decided_by(path: str, axes: Axes, where: str) -> set[str]:
    """The axes that an axis's `when` reads."""
    when = when_of(path, axes[path], where)
    return set() if when is None else knobs_read(when.paths) & axes.keys()


def in_order(axes: Axes, where: str) -> dict[str, Axis]:
    """The axes as they were written, but each after those that its `when` reads; UsageError for
    a circle."""
    waits = {path: _decided_by(path, axes, where) for path in axes}
    ordered = order_by_need(waits, lambda path: f"{where}: space.{path}.when")
    return {path: axes[path] for path in ordered}


def order_by_need(waits: Mapping[str, Set[str]], name: Callable[[str], str]) -> list[str]:
    """The keys in their order, but each after those that it waits for; UsageError for a circle,
    in which `name` says what a key is to the user."""
    placed: list[str] = []
    while len(placed) < len(waits):
        left = [path for path in waits if path not in placed]
        ready = next((path for path in left if waits[path] <= set(placed)), None)
        if ready is None:
            on = ", ".join(sorted(waits[left[0]] - set(placed)))
            raise UsageError(f"{name(left[0])}: waits in a circle for {on}")
        placed.append(ready)
    return placed


def _is_there(path: str, axis: Axis, recipe: Mapping[str, Any], point: Point, where: str) -> bool:
    when = when_of(path, axis, where)
    return when is None or when.holds(with_values(recipe, point.items()))


def suggest(axes: Axes, recipe: Mapping[str, Any], ask: Ask, where: str = "the sweep") -> Point:
    """Build a point by asking for each of its values in turn. Axes that `when` reads but that are
    not among `axes` must lie in the recipe."""
    point: Point = {}
    for path, axis in in_order(axes, where).items():
        if _is_there(path, axis, recipe, point, where):
            point[path] = ask(path, axis, is_integer(path))
    return point


def num_points(axes: Axes) -> int | None:
    """How many points a space has at most; None if it has a range without end of values."""
    counts = [axis.num_values(is_integer=is_integer(path)) for path, axis in axes.items()]
    return None if None in counts else math.prod(count for count in counts if count is not None)


def grid(axes: Axes, recipe: Mapping[str, Any], where: str) -> list[Point]:
    """Every combination, the last axis fastest."""
    points: list[Point] = [{}]
    for path, axis in in_order(axes, where).items():
        try:
            values = axis.grid(is_integer=is_integer(path))
        except ValueError as error:
            raise UsageError(f"{where}: space.{path}: {error}") from error
        points = [
            longer
            for point in points
            for longer in (
                [{**point, path: value} for value in values]
                if _is_there(path, axis, recipe, point, where)
                else [point]
            )
        ]
    return points


def sample(
    axes: Axes,
    recipe: Mapping[str, Any],
    num: int,
    seed: int,
    where: str,
    accepts: Callable[[Point], bool] = lambda point: True,
) -> list[Point]:
    """Draw `num` different accepted points; the same seed draws the same. UsageError for too
    many."""
    available = num_points(axes)
    if available is not None and num > available:
        raise UsageError(
            f"{where}: {num} points are asked for, but the space has {available}; ask for fewer "
            "or use method: grid"
        )
    generator = np.random.Generator(np.random.PCG64(seed))

    def draw(path: str, axis: Axis, whole: bool) -> Value:
        return axis.draw(generator, is_integer=whole)

    points: dict[tuple[tuple[str, Value], ...], Point] = {}
    for _ in range(_MAX_DRAWS_PER_POINT * num):
        point = suggest(axes, recipe, draw, where)
        key = tuple(point.items())
        if key not in points and accepts(point):
            points[key] = point
        if len(points) == num:
            return list(points.values())
    raise UsageError(
        f"{where}: {num} points are asked for, but the space gave only {len(points)} different "
        "ones; ask for fewer, widen a range or drop less by where"
    )


assert set(_PHASE_OF_PREFIX.values()) | {"bank"} == set(PHASES)

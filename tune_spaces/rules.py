"""What follows from a point: knobs that are derived from others, and points that are dropped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.codec import check_path, with_values
from trainer.errors import UsageError
from trainer.specs.recipe import Recipe
from tune_spaces.expressions import Expression, knobs_read, parse_expression
from tune_spaces.space import Axes, Point, is_integer, order_by_need, phase_of, when_of


@dataclass(frozen=True, slots=True)
class Rules:
    """A sweep's `derived` and `where`, read and checked.

    derived: knobs in an order in which each comes after those that it reads.
    """

    axes: Axes
    derived: dict[str, Expression]
    where: tuple[Expression, ...]
    file: str

    def lay(self, recipe: Mapping[str, Any], values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Set a point's values in a recipe as plain data, and all knobs that follow from them."""
        laid = with_values(recipe, values)
        for path, expression in self.derived.items():
            value = expression.value(laid)
            if is_integer(path) and isinstance(value, float):
                value = round(value)
            laid = with_values(laid, [(path, value)])
        return laid

    def accepts(self, recipe: Mapping[str, Any], point: Point) -> bool:
        """Whether a point satisfies every `where` that it can be judged by: one that reads an
        axis which the point has yet to settle is left for later."""
        if not self.where:
            return True
        laid = self.lay(recipe, point.items())
        return all(
            expression.holds(laid)
            for expression in self.where
            if all(self._is_settled(axis, laid, point) for axis in self._axes_of(expression))
        )

    def _axes_of(self, expression: Expression) -> set[str]:
        """The axes that an expression reads, itself or through what is derived."""
        knobs = knobs_read(expression.paths)
        for path in reversed(self.derived):
            if path in knobs:
                knobs |= knobs_read(self.derived[path].paths)
        return knobs & self.axes.keys()

    def _is_settled(self, path: str, laid: Mapping[str, Any], point: Point) -> bool:
        """Whether an axis has its value in a point, or is known to be absent."""
        if path in point:
            return True
        when = when_of(path, self.axes[path], self.file)
        if when is None:
            return False
        above = self._axes_of(when)
        return all(self._is_settled(each, laid, point) for each in above) and not when.holds(laid)

    def check(self, overrides: Mapping[str, Any]) -> None:
        """Raise UsageError where a rule contradicts the rest of the sweep file."""
        for path, expression in self.derived.items():
            at = f"{self.file}: derived.{path}"
            check_path(Recipe, path, at)
            if path in self.axes:
                raise UsageError(f"{at}: also an axis of the space; remove one of the two")
            if path in overrides:
                raise UsageError(f"{at}: also an override; remove one of the two")
            if path == "train.seed":
                raise UsageError(f"{at}: list seeds under seeds.search")
            if phase_of(path) is None and not path.startswith("observe."):
                raise UsageError(f"{at}: not a knob; set it under overrides")
            if phase_of(path) not in ("final", "eval"):
                self._check_early(expression, at)
        for path, axis in self.axes.items():
            when = when_of(path, axis, self.file)
            if when is None:
                continue
            if late := sorted(knobs_read(when.paths) & self.derived.keys()):
                raise UsageError(f"{when.where}: {late[0]} is derived; write its expression here")
            if phase_of(path) == "train":
                self._check_early(when, when.where)

    def _check_early(self, expression: Expression, at: str) -> None:
        """What a training reads must be known before any final's knob is."""
        for axis in sorted(self._axes_of(expression)):
            if phase_of(axis) != "train":
                raise UsageError(
                    f"{at}: reads {axis}, which acts after training: a training cannot depend on it"
                )


def read_rules(axes: Axes, derived: Mapping[str, str], where: Iterable[str], file: str) -> Rules:
    """Read a sweep's rules; UsageError names the file and the field of what is none."""
    read = {
        path: parse_expression(text, f"{file}: derived.{path}") for path, text in derived.items()
    }
    return Rules(
        axes=axes,
        derived=_in_order(read),
        where=tuple(parse_expression(text, f"{file}: where[{i}]") for i, text in enumerate(where)),
        file=file,
    )


def _in_order(derived: Mapping[str, Expression]) -> dict[str, Expression]:
    waits = {
        path: knobs_read(expression.paths) & derived.keys() for path, expression in derived.items()
    }
    return {path: derived[path] for path in order_by_need(waits, lambda p: derived[p].where)}

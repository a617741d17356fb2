"""A sweep file, read and checked against the recipe's own types.

Everything that can be decided without a GPU is decided in `load_sweep`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.clocks import ClockPolicy, load_policy
from service.specs import Overrides, SweepSpec
from trainer.codec import (
    dump,
    merge,
    names_of,
    parse,
    parse_assignment,
    read_mapping,
    with_values,
)
from trainer.errors import UsageError
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.specs.recipe import DataSpec, Recipe
from tune_spaces.catalogue import load_recipe
from tune_spaces.rules import Rules, read_rules
from tune_spaces.space import Point, check_space

_LIMITED = ("artifact_bytes", "train_clock_s", "eval_clock_s", "val_bpb")
_CONSTRAINT = re.compile(r"\s*(\w+)\s*(<=|==)\s*(.+?)\s*")
_NUMBER = re.compile(r"\d[\d_]*(\.\d+)?([eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Constraint:
    """`subject <= limit`, or the audit's verdict when limit is None."""

    subject: str
    limit: float | None

    def __str__(self) -> str:
        return "audit == pass" if self.limit is None else f"{self.subject} <= {self.limit:,.10g}"


def parse_constraint(text: str, where: str) -> Constraint:
    """Read one constraint; bytes are whole and decimal, so a unit such as MiB is refused."""
    match = _CONSTRAINT.fullmatch(text)
    forms = f"write {' | '.join(_LIMITED)} <= NUMBER, or audit == pass"
    if match is None:
        raise UsageError(f"{where}: {text!r} is not a constraint; {forms}")
    subject, relation, value = match.groups()
    if (subject, relation, value) == ("audit", "==", "pass"):
        return Constraint("audit", None)
    if subject not in _LIMITED or relation != "<=":
        raise UsageError(f"{where}: {text!r} is not a constraint; {forms}")
    if not _NUMBER.fullmatch(value):
        unit = (
            "; a cap is a plain number of bytes, decimal: 16 MB is "
            f"{ARTIFACT_BYTES_CAP}, and MiB is not a unit of the challenge"
            if subject == "artifact_bytes"
            else ""
        )
        raise UsageError(f"{where}: {value!r} is not a number{unit}")
    return Constraint(subject, float(value.replace("_", "")))


@dataclass(frozen=True, slots=True)
class Sweep:
    """A checked sweep: the spec, its recipe as plain data, its parsed constraints and rules, and
    the clock policy that it names or the shipped one."""

    spec: SweepSpec
    recipe: dict[str, Any]
    constraints: tuple[Constraint, ...]
    data: DataSpec
    rules: Rules
    clocks: ClockPolicy

    @property
    def cap_bytes(self) -> int | None:
        """The byte cap, if the sweep has one."""
        for constraint in self.constraints:
            if constraint.subject == "artifact_bytes" and constraint.limit is not None:
                return int(constraint.limit)
        return None

    def recipe_at(self, point: Mapping[str, Any], seed: int, where: str) -> Recipe:
        """The complete recipe of one point."""
        values = [*point.items(), ("train.seed", seed)]
        return parse(Recipe, self.rules.lay(self.recipe, values), where)

    def accepts(self, point: Point) -> bool:
        """Whether a point satisfies `where`, as far as the axes that it has can tell."""
        return self.rules.accepts(self.recipe, point)


def load_sweep(path: Path, assignments: Sequence[str] = ()) -> Sweep:
    """Read a sweep file with `-S path=value` laid over it; UsageError names file and field."""
    data = _assign(read_mapping(path), assignments)
    where = str(path)
    spec_ = parse(SweepSpec, {"overrides": {}, "space": {}, "derived": {}, **data}, where)
    constraints = tuple(
        parse_constraint(text, f"{where}: constraints[{i}]")
        for i, text in enumerate(spec_.constraints)
    )
    recipe = load_recipe(spec_.recipe, f"{where}: recipe")
    recipe = with_values(recipe, spec_.overrides.items())
    if spec_.data is not None:
        recipe = merge(recipe, {"data": dump(spec_.data)})
    at_recipe = f"{where}: recipe {spec_.recipe}"
    rules = read_rules(spec_.space, spec_.derived, spec_.where, where)

    def lay(point: Point) -> dict[str, Any] | None:
        return rules.lay(recipe, point.items()) if rules.accepts(recipe, point) else None

    rules.check(spec_.overrides)
    check_space(spec_.space, recipe, where, at_recipe, lay)
    data_spec = parse(DataSpec, recipe.get("data"), f"{at_recipe}: data")
    return Sweep(
        spec=spec_,
        recipe=recipe,
        constraints=constraints,
        data=data_spec,
        rules=rules,
        clocks=load_policy(spec_.clocks),
    )


def _assign(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Lay -S values over the sweep file: its own fields by name, everything else on the recipe."""
    own = set(names_of(SweepSpec)) - (set() if data.get("data") else {"data"})
    for text in assignments:
        path, value = parse_assignment(text)
        if path.partition(".")[0] in own:
            data = with_values(data, [(path, value)])
            continue
        if path in (data.get("space") or {}):
            raise UsageError(f"-S {path}: also an axis of the space; remove one of the two")
        overrides: Overrides = {**(data.get("overrides") or {}), path: value}
        data = {**data, "overrides": overrides}
    return data

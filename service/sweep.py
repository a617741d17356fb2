"""The sweep a user writes: recipe, overrides, space, constraints, seeds, resources.

`load_sweep` reads and checks all of it against the recipe's own types, so that everything that
can be decided without a GPU is decided here. `space` and `overrides` are mappings by nature,
which is why SweepSpec is the one spec that holds dictionaries.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from trainer.specs.base import require, require_positive, spec
from trainer.specs.recipe import DataSpec, Recipe
from tune_spaces.axes import Axis
from tune_spaces.catalogue import load_recipe
from tune_spaces.space import check_space

Overrides = dict[str, Any]


@spec
class TrainSearch:
    """How the train axes are searched. `num` is how many points `random` draws."""

    method: Literal["grid", "random"] = "grid"
    num: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(num=self.num)
        require((self.method == "grid") == (self.num is None), "num goes with method: random")
        require(self.seed >= 0, f"seed={self.seed} is below 0")


@spec
class FinalSearch:
    """How the bank, final and eval axes are searched; `per_bank` points for each training."""

    method: Literal["grid", "random"] = "grid"
    per_bank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(per_bank=self.per_bank)
        require(
            (self.method == "grid") == (self.per_bank is None),
            "per_bank goes with method: random",
        )
        require(self.seed >= 0, f"seed={self.seed} is below 0")


@spec
class Search:
    """Both searches."""

    train: TrainSearch = TrainSearch()
    final: FinalSearch = FinalSearch()


@spec
class Objective:
    """What `best` means."""

    metric: Literal["val_bpb"] = "val_bpb"
    goal: Literal["minimize"] = "minimize"


@spec
class Seeds:
    """Every train point is trained once for each of `search`."""

    search: tuple[int, ...] = (1337,)

    def __post_init__(self) -> None:
        require(len(self.search) > 0, "search is empty")
        require(len(set(self.search)) == len(self.search), "search has a repeat")
        require(min(self.search) >= 0, f"search has a seed below 0: {min(self.search)}")


@spec
class Resources:
    """One training's gang, and how long it may wait for its place."""

    workers: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        require_positive(
            workers=self.workers,
            cpus_per_worker=self.cpus_per_worker,
            start_timeout_s=self.start_timeout_s,
        )
        require(self.gpus_per_worker in (0, 1), f"gpus_per_worker={self.gpus_per_worker}: 0 or 1")

    def worker(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        gpu = {"GPU": float(self.gpus_per_worker)} if self.gpus_per_worker else {}
        return {"CPU": float(self.cpus_per_worker), **gpu}


@spec
class Limits:
    """How much runs at once, and how often a lost worker is forgiven."""

    max_concurrent: int | None = None
    infra_retries: int = 2

    def __post_init__(self) -> None:
        require_positive(max_concurrent=self.max_concurrent)
        require(self.infra_retries >= 0, f"infra_retries={self.infra_retries} is below 0")


@spec
class SweepSpec:
    """A sweep file."""

    name: str
    recipe: str
    version: Literal[1] = 1
    overrides: Overrides = None  # type: ignore[assignment]  # a mapping; {} when absent
    space: dict[str, Axis] = None  # type: ignore[assignment]
    search: Search = Search()
    objective: Objective = Objective()
    constraints: tuple[str, ...] = (f"artifact_bytes <= {ARTIFACT_BYTES_CAP}", "audit == pass")
    seeds: Seeds = Seeds()
    resources: Resources = Resources()
    limits: Limits = Limits()
    data: DataSpec | None = None

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", self.name) is not None,
            f"name={self.name!r} must be lower-case letters, digits and dashes, at most 63",
        )


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
    """A checked sweep: the spec, its recipe as plain data, and its parsed constraints."""

    spec: SweepSpec
    recipe: dict[str, Any]
    constraints: tuple[Constraint, ...]
    data: DataSpec

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
        return parse(Recipe, with_values(self.recipe, values), where)


def load_sweep(path: Path, assignments: Sequence[str] = ()) -> Sweep:
    """Read a sweep file with `-S path=value` laid over it; UsageError names file and field."""
    data = _assign(read_mapping(path), assignments)
    where = str(path)
    spec_ = parse(SweepSpec, {"overrides": {}, "space": {}, **data}, where)
    constraints = tuple(
        parse_constraint(text, f"{where}: constraints[{i}]")
        for i, text in enumerate(spec_.constraints)
    )
    recipe = load_recipe(spec_.recipe, f"{where}: recipe")
    recipe = with_values(recipe, spec_.overrides.items())
    if spec_.data is not None:
        recipe = merge(recipe, {"data": dump(spec_.data)})
    at_recipe = f"{where}: recipe {spec_.recipe}"
    check_space(spec_.space, recipe, where, at_recipe)
    data_spec = parse(DataSpec, recipe.get("data"), f"{at_recipe}: data")
    return Sweep(spec=spec_, recipe=recipe, constraints=constraints, data=data_spec)


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

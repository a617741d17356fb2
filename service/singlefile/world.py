"""What is known while the single file is cut: specs that exist, classes that are made, names used.

It only ever grows. A walk over the live code adds what it meets, and is repeated until it adds
nothing; what was decided before that, by less, is decided again.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final

from service.singlefile.program import Definition, External, Meaning, meaning_of, read_module
from service.singlefile.values import ANYTHING, NONE, Const, Value, truths
from trainer.blueprint import blueprint
from trainer.specs.model import ModelSpec
from trainer.specs.task import FinalTask, TrainTask

# Their objects are all known before anything runs: the recipe is data, and what computes a
# blueprint from it is pure.
_KNOWN_MODULES: Final = ("trainer.specs.", "trainer.blueprint")
COMPUTED: Final = "trainer.blueprint"
# A name of an attention comes from a recipe, or is that of torch's choice.
BACKEND: Final = "trainer.specs.kernels:Backend"


@dataclass(eq=False)
class World:
    """Facts, by qualified name of a definition."""

    train: TrainTask
    final: FinalTask
    known: dict[str, set[Const]] = field(default_factory=dict)
    """Every object of a spec's class."""
    open_classes: set[str] = field(default_factory=set)
    open_fields: set[tuple[str, str]] = field(default_factory=set)
    """What running code may set to anything."""
    made: dict[str, set[str]] = field(default_factory=dict)
    """Classes that live code makes objects of or hands on, by each that they derive from."""
    stored: set[str] = field(default_factory=set)
    """Attributes that live code sets from outside of their class."""
    live: dict[str, Definition] = field(default_factory=dict)
    externals: set[External] = field(default_factory=set)
    handed_on: set[str] = field(default_factory=set)
    """Tables of classes that are used other than by asking them for an object's."""
    names: set[str] = field(default_factory=set)
    """Attributes that live code reads, and strings that may name one."""
    wanted_defaults: set[tuple[str, str]] = field(default_factory=set)
    is_patient: bool = True
    """Whether code waits that works on what nobody has made yet."""

    def __post_init__(self) -> None:
        self.learn([self.train, self.final])

    def learn(self, objects: Iterable[Any]) -> None:
        """Take objects and all that they hold into what is known."""
        for value in objects:
            if isinstance(value, tuple):
                self.learn(value)
            if not is_dataclass(value) or isinstance(value, type):
                continue
            owner = qualname_of(type(value))
            if Const(value) in self.known.setdefault(owner, set()):
                continue
            self.known[owner].add(Const(value))
            self.make(definition_of(owner))
            self.learn(getattr(value, each.name) for each in fields(value))
            if isinstance(value, ModelSpec):
                self.learn([value.exported(), blueprint(value)])

    def measure(self) -> int:
        """Return a number that grows with all that is known."""
        parts = (self.open_classes, self.open_fields, self.stored, self.live, self.externals,
                 self.handed_on, self.names, self.wanted_defaults)  # fmt: skip
        groups = (*self.known.values(), *self.made.values())
        return sum(map(len, parts)) + sum(map(len, groups))

    def make(self, definition: Definition) -> None:
        """Note that there are objects of a class of ours."""
        for each in line_of(definition):
            self.made.setdefault(each.qualname, set()).add(definition.qualname)

    def kind_of_weights(self) -> str:
        """The only kind of weights file that the single file reads."""
        return self.final.final.compress.kind

    def backends(self) -> set[str]:
        """The attention back ends that the recipe names, and torch's choice."""
        kernels = (self.train.train.attention, self.final.evaluate.attention)
        named = {name for each in kernels if each for name in (each.name, each.substitute)}
        return {"torch"} | {name for name in named if name is not None}

    def kernel(self, field: str) -> Value:
        """What a model may be built to compute with; a training's kernels or those of a score."""
        train, evaluate = self.train.train, self.final.evaluate
        uses = {"fused": train.fused, "scores": evaluate.fused}
        uses["mlp"] = train.fused or evaluate.fused
        if not uses.get(field, True):
            return truths([False])
        if field == "within" and train.documents is None:
            return NONE
        return ANYTHING


def qualname_of(cls: type[Any]) -> str:
    """Return a class's qualified name, module:name."""
    return f"{cls.__module__}:{cls.__qualname__}"


def is_known_class(definition: Meaning) -> bool:
    """Whether a name stands for a class whose objects are all known."""
    return (
        isinstance(definition, Definition)
        and isinstance(definition.node, ast.ClassDef)
        and definition.module.name.startswith(_KNOWN_MODULES)
    )


def is_class(definition: Meaning) -> bool:
    """Whether a name stands for a class of ours."""
    return isinstance(definition, Definition) and isinstance(definition.node, ast.ClassDef)


def definition_of(qualname: str) -> Definition:
    """Return what a qualified name stands for."""
    module, _, name = qualname.partition(":")
    return read_module(module).definitions[name]


def bases_of(definition: Definition) -> list[Meaning]:
    """What a class derives from."""
    assert isinstance(definition.node, ast.ClassDef)
    found: list[Meaning] = []
    for base in definition.node.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(inner, ast.Name):
            found.append(meaning_of(definition.module, inner.id))
        else:
            found.append(External("", ast.unparse(inner), ""))
    return found


def is_protocol(definition: Definition) -> bool:
    """Whether a class only says what others look like."""
    names = [base.name for base in bases_of(definition) if isinstance(base, External)]
    return "Protocol" in names


def line_of(definition: Definition) -> list[Definition]:
    """A class of ours and those of ours that it derives from."""
    above = [base for base in bases_of(definition) if isinstance(base, Definition)]
    return [definition, *(each for base in above for each in line_of(base))]

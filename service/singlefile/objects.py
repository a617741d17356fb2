"""What can be told of values without looking at code: instances, parts, and specs that are made."""

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from itertools import product
from typing import Any, Final

from service.singlefile.program import Definition, External, Meaning
from service.singlefile.values import (
    ANYTHING,
    BOTH,
    Atom,
    Const,
    Instance,
    Value,
)
from service.singlefile.world import definition_of, is_class, is_protocol, line_of, qualname_of

OPEN: Final = "*"


def is_spec(value: Any) -> bool:
    """Whether a constant is an object of a class of ours."""
    return is_dataclass(value) and not isinstance(value, type)


def owner_of(atom: Atom) -> str | None:
    """Return the class of ours that a value is an object of, by its qualified name."""
    if isinstance(atom, Instance):
        return atom.owner
    return qualname_of(type(atom.value)) if is_spec(atom.value) else None


def is_one(atom: Atom, kinds: Sequence[Definition | External | str]) -> frozenset[bool]:
    """Return whether an atom is an object of one of these classes."""
    unsure = False
    for kind in kinds:
        match atom, kind:
            case ((Const() | Instance()), Definition()):
                owner = owner_of(atom)
                if owner is not None and kind in line_of(definition_of(owner)):
                    return frozenset([True])
                unsure |= not is_class(kind) or is_protocol(kind)
            case Const(value=value), str() if hasattr(builtins, kind):
                if isinstance(value, getattr(builtins, kind)):
                    return frozenset([True])
            case Const(value=value), External() if is_spec(value):
                continue
            case _:
                unsure = True
    return BOTH if unsure else frozenset([False])


def widened(value: Value) -> Value:
    """Return a value as an attribute is bound to it: others may set another plain one, and of
    those only truths are looked after."""
    if value is None:
        return ANYTHING
    plain = [
        a
        for a in value
        if isinstance(a, Const)
        and isinstance(a.value, str | float | int)
        and not isinstance(a.value, bool)
    ]
    return ANYTHING if plain else value


def constants(value: Value) -> list[Any] | None:
    """Return the objects that a value may be, None where it may be others."""
    if not value or not all(isinstance(atom, Const) for atom in value):
        return None
    return [atom.value for atom in value if isinstance(atom, Const)]


def replaced(base: Value, given: Mapping[str, Value]) -> tuple[list[Any], set[str]]:
    """Return the specs that `replace` makes, and the fields of which nothing is known; OPEN for
    all of them."""
    starts = constants(base)
    if starts is None or not all(map(is_spec, starts)) or OPEN in given:
        return [], {OPEN}
    known = {name: found for name, value in given.items() if (found := constants(value))}
    made = [
        replace(start, **dict(zip(known, values, strict=True)))
        for start in starts
        for values in product(*known.values())
    ]
    return made, set(given) - set(known)


def is_replace(meaning: Meaning) -> bool:
    """Whether a name stands for the function that copies a dataclass with other fields."""
    of = ("dataclasses", "replace")
    return isinstance(meaning, External) and (meaning.module, meaning.name) == of

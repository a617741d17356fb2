"""What can be told of values without looking at code: instances, parts, and specs that are made."""

import builtins
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Any, Final

from service.singlefile.program import Definition, External, Meaning
from service.singlefile.values import (
    ANYTHING,
    BOTH,
    Atom,
    Const,
    Instance,
    Many,
    Value,
    constant,
    item_of,
    join,
)
from service.singlefile.world import definition_of, line_of, qualname_of

OPEN: Final = "*"


def is_spec(value: Any) -> bool:
    """Whether a constant is an object of a class of ours."""
    return is_dataclass(value) and not isinstance(value, type)


def is_one(atom: Atom, kinds: Sequence[Definition | External | str]) -> frozenset[bool]:
    """Return whether an atom is an object of one of these classes."""
    unsure = False
    for kind in kinds:
        match atom, kind:
            case Const(value=value), Definition():
                if is_spec(value) and qualname_of(type(value)) == kind.qualname:
                    return frozenset([True])
            case Const(value=value), str() if hasattr(builtins, kind):
                if isinstance(value, getattr(builtins, kind)):
                    return frozenset([True])
            case Instance(owner=owner), Definition():
                if kind in line_of(definition_of(owner)):
                    return frozenset([True])
                # An object of a class that derives from its own may be of the asked one.
                unsure |= any(each.qualname == owner for each in line_of(kind))
            case Const(value=value), External() if is_spec(value):
                continue
            case _:
                unsure = True
    return BOTH if unsure else frozenset([False])


def items(base: Value) -> Value:
    """Return what taking some part of a value gives."""
    if base is None:
        return ANYTHING
    if is_mapping(base):
        return join(atom.item for atom in base if isinstance(atom, Many))
    return item_of(base)


def is_mapping(base: Value) -> bool:
    """Whether a value is a mapping, whichever of its atoms it is."""
    return bool(base) and all(isinstance(atom, Many) and atom.is_mapping for atom in base or ())


def loosened(value: Value) -> Value:
    """Return a value as a name is bound to it: what it holds may be changed from then on."""
    if value is None:
        return ANYTHING
    return frozenset(
        Many(ANYTHING, atom.is_mapping) if isinstance(atom, Many) else atom for atom in value
    )


def widened(value: Value) -> Value:
    """Return a value as an attribute is bound to it: others may set another plain one."""
    loose = loosened(value)
    if loose is None:
        return ANYTHING
    plain = [a for a in loose if isinstance(a, Const) and isinstance(a.value, str | float | int)]
    return ANYTHING if plain else loose


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


def built(definition: Definition, given: Mapping[str, Value]) -> list[Any] | None:
    """Return the specs that a constructor makes, None where it may make others."""
    cls: Any = getattr(importlib.import_module(definition.module.name), definition.name)
    known = {name: constants(value) for name, value in given.items()}
    names = {each.name for each in fields(cls)}
    if any(name not in names or found is None for name, found in known.items()):
        return None
    columns = [found for found in known.values() if found is not None]
    return [cls(**dict(zip(known, values, strict=True))) for values in product(*columns)]


def made_value(objects: Sequence[Any]) -> Value:
    """Return the value that may be any of these objects."""
    return join(constant(each) for each in objects)


def is_replace(meaning: Meaning) -> bool:
    """Whether a name stands for the function that copies a dataclass with other fields."""
    return isinstance(meaning, External) and (meaning.module, meaning.name) == (
        "dataclasses",
        "replace",
    )

"""What an expression may be, as far as a recipe decides it.

A value is a set of atoms, or ANYTHING where nothing is known. Every claim is of the form "one of
these", so what is not understood only makes the single file larger.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass
from itertools import product
from typing import Any, Final

MAX_ATOMS: Final = 200


@dataclass(frozen=True, slots=True, eq=False)
class Const:
    """One Python object: a plain value, a spec, or a tuple of such."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[type, Any]:
        return type(self.value), self.value  # 1, 1.0 and True are equal


@dataclass(frozen=True, slots=True)
class Instance:
    """Some object of a class of ours, by its qualified name."""

    owner: str


Atom = Const | Instance
Value = frozenset[Atom] | None  # None: anything
ANYTHING: Final[Value] = None
NONE: Final[Value] = frozenset([Const(None)])
BOTH: Final = frozenset([True, False])


def constant(value: Any) -> Value:
    """Return the value that is this one object."""
    return frozenset([Const(value)])


def truths(values: Iterable[bool]) -> Value:
    """Return the value that may be any of these truths."""
    return frozenset(Const(value) for value in values)


def join(values: Iterable[Value]) -> Value:
    """Return what is one of these or one of those."""
    atoms: set[Atom] = set()
    for value in values:
        if value is None:
            return ANYTHING
        atoms |= value
    return frozenset(atoms) if len(atoms) <= MAX_ATOMS else ANYTHING


def truth(value: Value, has_length: Callable[[str], bool]) -> frozenset[bool]:
    """Return what a value's truth may be; of what nothing is known to become, nothing."""
    if value is None:
        return BOTH
    found: set[bool] = set()
    for atom in value:
        match atom:
            case Const(value=object_):
                found.add(True if is_dataclass(object_) else bool(object_))
            case Instance(owner=owner) if not has_length(owner):
                found.add(True)
            case _:
                return BOTH
    return frozenset(found)


def compare(left: Value, right: Value, test: str) -> frozenset[bool]:
    """Return what a comparison (`is`, `==`, `<`, `in`, or the negation of one) may give."""
    if left is None or right is None or len(left) * len(right) > MAX_ATOMS**2:
        return BOTH
    found: set[bool] = set()
    for a, b in product(left, right):
        found |= _compare(a, b, test)
    return frozenset(found)


def _compare(a: Atom, b: Atom, test: str) -> frozenset[bool]:
    if isinstance(a, Const) and isinstance(b, Const):
        try:
            return frozenset([_TESTS[test](a.value, b.value)])
        except (KeyError, TypeError):
            return BOTH
    nones = [isinstance(atom, Const) and atom.value is None for atom in (a, b)]
    if any(nones) and test in ("is", "is not"):  # the other one is no constant, so not None
        return frozenset([test == "is not"])
    return BOTH


def _is(a: Any, b: Any) -> bool:
    if a is None or b is None or isinstance(a, bool) or isinstance(b, bool):
        return a is b
    raise TypeError  # the identity of other values is no fact of the recipe


def _equal(a: Any, b: Any) -> bool:
    if is_dataclass(a) or is_dataclass(b):
        raise TypeError  # a field may be set to anything
    return a == b


_TESTS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "is": _is,
    "is not": lambda a, b: not _is(a, b),
    "==": lambda a, b: _equal(a, b),
    "!=": lambda a, b: not _equal(a, b),
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}

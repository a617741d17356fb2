"""Expressions over a recipe's knobs, such as `evaluate.ttt is sgd`. Pure.

A small part of Python's grammar, read with `ast` and evaluated here: numbers, strings, true,
false, none, dotted paths, arithmetic, comparisons, and/or/not, and five functions. Nothing is
called or looked up but what is listed below, and sizes are bounded.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, cast

from trainer.codec import dump, field_type, members_of, names_of, suggest
from trainer.errors import UsageError
from trainer.specs.recipe import Recipe
from tune_spaces.axes import Value

MAX_CHARS = 300
_MAX_NODES = 250  # so that walking one never runs out of stack
_MAX_NUMBER = 2**63
_MAX_EXPONENT = 64
_MAX_DIGITS = 20  # that round keeps or clears: it works out 10 to this power
_WORDS: dict[str, Value | None] = {"true": True, "false": False, "none": None}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "round": round,
    "int": int,
    "abs": abs,
}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FORMS = (
    "use numbers, paths such as train.iterations, + - * / // % **, comparisons, is, in [..], "
    "and/or/not, and min, max, round, int, abs"
)


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression, checked against the recipe's fields. `where` is its file and field."""

    text: str
    where: str
    paths: tuple[str, ...]
    """The knobs and parts that it reads."""
    _root: ast.expr

    def value(self, recipe: Mapping[str, Any]) -> Value | None:
        """Evaluate over a recipe as plain data; a part counts as its kind, or as true."""
        try:
            return _plain(self._eval(self._root, recipe))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise UsageError(f"{self.where}: {self.text!r}: {error}") from error

    def holds(self, recipe: Mapping[str, Any]) -> bool:
        """Whether it is true over a recipe; UsageError if it is neither true nor false."""
        value = self.value(recipe)
        if not isinstance(value, bool):
            raise UsageError(f"{self.where}: {self.text!r} is {value!r}, neither true nor false")
        return value

    def _eval(self, node: ast.expr, recipe: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Attribute() | ast.Name():
                return _word_or_path(node, recipe)
            case ast.UnaryOp(op=ast.Not()):
                return not _truth(self._eval(node.operand, recipe))
            case ast.UnaryOp():
                value = _number(self._eval(node.operand, recipe))
                return -value if isinstance(node.op, ast.USub) else value
            case ast.BinOp():
                left, right = self._eval(node.left, recipe), self._eval(node.right, recipe)
                return _calculate(node.op, _number(left), _number(right))
            case ast.BoolOp():
                wanted = isinstance(node.op, ast.Or)
                parts = (_truth(self._eval(part, recipe)) for part in node.values)
                return wanted if any(part is wanted for part in parts) else not wanted
            case ast.Compare():
                return self._compare(node, recipe)
            case ast.Call():
                given = [_number(self._eval(item, recipe)) for item in node.args]
                return _call(ast.unparse(node.func), given)
            case _:  # refused when it was read
                raise TypeError(f"cannot evaluate {ast.unparse(node)}")

    def _compare(self, node: ast.Compare, recipe: Mapping[str, Any]) -> bool:
        left = self._eval(node.left, recipe)
        for relation, item in zip(node.ops, node.comparators, strict=True):
            right = _named(item) if isinstance(relation, _NAMING) else self._eval(item, recipe)
            if not _relates(relation, left, right):
                return False
            left = right
        return True


_NAMING = (ast.Is, ast.IsNot, ast.In, ast.NotIn)


@cache
def parse_expression(text: str, where: str) -> Expression:
    """Read an expression; UsageError names `where` unless it is one and its paths exist."""
    at = f"{where}: {text if len(text) <= 80 else text[:77] + '...'!r}"
    if len(text) > MAX_CHARS:
        raise UsageError(f"{at}: longer than {MAX_CHARS} characters")
    if "\\" in text or "\0" in text or "\n" in text:
        raise UsageError(f"{at}: write it in one line without backslashes")
    try:
        root = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{at}: not an expression; {_FORMS}") from error
    if sum(1 for _ in ast.walk(root)) > _MAX_NODES:
        raise UsageError(f"{at}: has more than {_MAX_NODES} parts")
    try:
        paths = tuple(dict.fromkeys(_check(root)))
    except UsageError as error:
        raise UsageError(f"{at}: {error}") from error
    return Expression(text, where, paths, root)


def knobs_read(paths: Iterable[str]) -> set[str]:
    """The knobs that a look at these paths depends on: themselves, and the kinds on the way."""
    knobs = set(paths)
    for path in paths:
        parts = path.split(".")
        knobs |= {".".join([*parts[:depth], "kind"]) for depth in range(1, len(parts) + 1)}
    return knobs


def _check(node: ast.expr) -> Iterator[str]:
    """Refuse what is no part of the language; give every path that is read."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            if isinstance(node.value, int | float) and abs(node.value) > _MAX_NUMBER:
                raise UsageError("a number is too large")
        case ast.Name(id=word) if word in _WORDS:
            pass
        case ast.Name() | ast.Attribute():
            path = _dotted(node)
            _check_knob(path)
            yield path
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd()):
            yield from _check(node.operand)
        case ast.BinOp(op=operation) if isinstance(operation, _ARITHMETIC):
            yield from _check(node.left)
            yield from _check(node.right)
        case ast.BoolOp():
            for part in node.values:
                yield from _check(part)
        case ast.Compare():
            yield from _check(node.left)
            for relation, item in zip(node.ops, node.comparators, strict=True):
                if isinstance(relation, _NAMING):
                    _check_named(relation, item)
                else:
                    yield from _check(item)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            for item in node.args:
                yield from _check(item)
        case _:
            raise UsageError(f"{ast.unparse(node)!r} is not allowed; {_FORMS}")


def _check_named(relation: ast.cmpop, item: ast.expr) -> None:
    is_list = isinstance(item, ast.List)
    if is_list != isinstance(relation, ast.In | ast.NotIn):
        raise UsageError("write `is WORD` or `in [WORD, ...]`")
    for word in item.elts if isinstance(item, ast.List) else [item]:
        match word:
            case ast.Name() | ast.Constant(value=None | bool() | int() | float() | str()):
                pass
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
                pass
            case _:
                raise UsageError(f"{ast.unparse(word)!r} is not a word or a number")


def _named(node: ast.expr) -> Any:
    """What stands right of `is` or `in`, where a bare name is a word."""
    match node:
        case ast.List():
            return [_named(item) for item in node.elts]
        case ast.Name():
            return _WORDS.get(node.id, node.id)
        case _:
            return ast.literal_eval(node)


def _dotted(node: ast.expr) -> str:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise UsageError(f"{ast.unparse(node)!r} is not a path")
    return ".".join([node.id, *reversed(names)])


def _check_knob(path: str) -> None:
    if path == "train.seed":
        raise UsageError("train.seed is listed under seeds, and no point has one")
    current: Any = Recipe
    for key in path.split("."):
        if key not in names_of(current):
            quotes = "" if "." in path else f", or write {path!r} for a word"
            raise UsageError(f"no knob {path!r}{suggest(key, names_of(current))}{quotes}")
        current = field_type(current, key)


def _word_or_path(node: ast.expr, recipe: Mapping[str, Any]) -> Any:
    path = _dotted(node)
    return _WORDS[path] if path in _WORDS else look_up(path, recipe)


def look_up(path: str, recipe: Mapping[str, Any]) -> Any:
    """The value at a path of a recipe as plain data: what is written there or else the field's
    default; None where the path leads through a part that is absent."""
    value: Any = dict(recipe)
    annotation: Any = Recipe
    for key in path.split("."):
        if not isinstance(value, dict):
            return None
        part = cast("dict[str, Any]", value)
        owner = _owner(annotation, part)
        value = part[key] if key in part else _default(owner, key)
        annotation = field_type(owner, key)
    return value


def _owner(annotation: Any, value: Mapping[str, Any]) -> Any:
    """The spec class that a mapping stands for; of several the one of its kind."""
    classes = [member for member in members_of(annotation) if is_dataclass(member)]
    for cls in classes:
        if "kind" in value and _default(cls, "kind") == value["kind"]:
            return cls
    return classes[0]


@cache
def _default(cls: Any, name: str) -> Any:
    for field in fields(cls):
        if field.name == name and field.default is not MISSING:
            return dump(field.default)
    return None


def _plain(value: Any) -> Value | None:
    if isinstance(value, dict):
        part = cast("dict[str, Any]", value)
        return part.get("kind", True)
    if isinstance(value, list):
        raise TypeError("a list is not a value")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_plain(value)!r} is not a number")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{_plain(value)!r} is neither true nor false")
    return value


def _calculate(operation: ast.operator, left: int | float, right: int | float) -> int | float:
    if isinstance(operation, ast.Pow):
        if abs(right) > _MAX_EXPONENT:
            raise ValueError("a power is too large")
        if left < 0 and not float(right).is_integer():
            raise ValueError("a root of a number below 0")
    return _bounded(_combine(operation, left, right))


def _call(name: str, given: list[int | float]) -> int | float:
    if name == "round" and len(given) > 1 and abs(given[1]) > _MAX_DIGITS:
        raise ValueError(f"round takes at most {_MAX_DIGITS} digits")
    return _bounded(_FUNCTIONS[name](*given))


def _bounded(result: int | float) -> int | float:
    if not math.isfinite(result) or abs(result) > _MAX_NUMBER:
        raise ValueError("a number is too large")
    return result


def _combine(operation: ast.operator, left: int | float, right: int | float) -> int | float:
    match operation:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return left // right
        case ast.Mod():
            return left % right
        case _:
            return left**right


def _relates(relation: ast.cmpop, left: Any, right: Any) -> bool:
    left = _plain(left)
    if isinstance(relation, ast.In | ast.NotIn):
        found = any(_is_same(left, item) for item in right)
        return found == isinstance(relation, ast.In)
    right = _plain(right)
    match relation:
        case ast.Is() | ast.Eq():
            return _is_same(left, right)
        case ast.IsNot() | ast.NotEq():
            return not _is_same(left, right)
        case _:
            return _ORDER[type(relation)](_number(left), _number(right))


def _is_same(left: Any, right: Any) -> bool:
    """Equal, where true is not 1. `none` is what is absent, and the choice of that name."""
    left, right = (None if value == "none" else value for value in (left, right))
    return left == right and isinstance(left, bool) == isinstance(right, bool)

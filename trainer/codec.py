"""YAML, JSON and overrides to specs and back, and the identity of a spec.

The one place that imports pydantic and yaml. Dictionaries are merged plainly (recipe, then
overrides, then axis values, then -S), parsed once, and frozen from then on.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from trainer.errors import UsageError

T = TypeVar("T")
MAX_YAML_BYTES = 256 * 1024
MAX_DEPTH = 32
_PLAIN = (str, int, float, bool)
MAX_SHOWN = 80  # characters of a refused value in a message


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2 core: `1e-3` is a number, `no` and `1:30` are strings; no alias, tag or repeat."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not accepted", problem_mark=self.peek_event().start_mark
            )
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="tags are not accepted", problem_mark=self.peek_event().start_mark
            )
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels",
                problem_mark=self.peek_event().start_mark,
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="keys must be plain words", problem_mark=key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first, ""]
    )


def _construct_int(loader: _CoreLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).lower()
    base = 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10
    try:
        return int(text, base)
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise yaml.MarkedYAMLError(
            problem="the number is too long", problem_mark=node.start_mark
        ) from error


def _construct_float(loader: _CoreLoader, node: yaml.ScalarNode) -> float:
    return float(
        str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan")
    )


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(text: str, where: str) -> Any:
    """Read one YAML document of at most 256 KiB; UsageError names `where` and the line."""
    if len(text.encode(errors="surrogatepass")) > MAX_YAML_BYTES:
        raise UsageError(f"{where}: larger than {MAX_YAML_BYTES} bytes; a spec is a short text")
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UsageError(f"{where}: {line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{where}: not YAML: {str(error).splitlines()[0]}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected `key: value` lines at the top level")
    return data


def read_recipe(path: Path, *, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file as a plain dict, laid over what it `extends`: a recipe or a list, a
    later one over those before it. Their paths start at the recipe's folder, `.yaml` left out."""
    if again := [seen for seen in _seen if seen.samefile(path)]:
        raise UsageError(f"{again[0]}: extends itself through {' -> '.join(p.name for p in _seen)}")
    data = read_mapping(path)
    below: dict[str, Any] = {}
    for parent in _parents(path, data.pop("extends", None)):
        below = merge(below, read_recipe(parent, _seen=(*_seen, path)))
    return merge(below, data)


def _parents(path: Path, extends: Any) -> list[Path]:
    """The files that a recipe names under `extends`, in its order."""
    if extends is None:
        return []
    names = extends if isinstance(extends, list) else [extends]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(
            f"{path}: extends must name a recipe in the same folder, or list several, such as "
            "[pr414, scales/tiny]"
        )
    parents = [path.parent / (name if name.endswith(".yaml") else f"{name}.yaml") for name in names]
    for name, parent in zip(names, parents, strict=True):
        if not parent.is_file():
            raise UsageError(f"{path}: extends {name!r}, but {parent} does not exist")
    return parents


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `top` over `base`, mapping by mapping. A null removes what the base has; a mapping of
    another `kind` replaces the base's instead of mixing with it."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        same_kind = (
            isinstance(below, Mapping)
            and isinstance(value, Mapping)
            and ("kind" not in value or value["kind"] == below.get("kind", value["kind"]))
        )
        merged[key] = merge(below, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read one `-S path=value`; the value is YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"-S {text!r}: expected path=value, such as -S train.iterations=200")
    return path.strip(), read_yaml(value, f"-S {path.strip()}")


def with_values(data: Mapping[str, Any], values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Set dotted paths in a plain dict, making the parts on the way where they are absent.

    Kinds are chosen before anything is set inside them, in whatever order they are written: a
    mapping of another kind replaces the one below it.
    """
    pairs = list(values)
    kinds = [(path, value) for path, value in pairs if path.endswith(".kind")]
    for path, value in kinds + pairs:
        nested: Any = value
        for key in reversed(path.split(".")):
            nested = {key: nested}
        data = merge(data, nested)
    return dict(data)


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def parse(cls: type[T], data: Any, where: str) -> T:
    """Check plain data strictly against a spec class; one line of UsageError per fault."""
    try:
        text = json.dumps(data, allow_nan=True)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error
    try:
        return _adapter(cls).validate_json(text, strict=True)
    except OverflowError as error:
        raise UsageError(f"{where}: a number is too large to work with") from error
    except ValidationError as error:
        lines = _explain(cls, error)
        raise UsageError("\n".join(f"{where}: {line}" for line in lines)) from error


def _explain(cls: type[Any], error: ValidationError) -> list[str]:
    faults = error.errors(include_url=False)
    # A choice reports every member's complaints: keep those of the member whose `kind` was given,
    # without one those of the first member that has all the keys.
    foreign = {f["loc"][:-1] for f in faults if f["loc"] and f["loc"][-1] == "kind"}
    known = {tuple(f["loc"][:-1]) for f in faults} - foreign
    owners = [owner for f in faults if (owner := _member(f["loc"])) and owner not in foreign]
    strange = {_member(f["loc"]) for f in faults if f["type"] == "unexpected_keyword_argument"}
    fitting: dict[Any, Any] = {}
    for owner in sorted(owners, key=lambda owner: owner in strange):
        fitting.setdefault(owner[:-1], owner)
    foreign |= set(owners) - set(fitting.values())
    lines: list[str] = []
    for fault in faults:
        loc = tuple(fault["loc"])
        if any(loc[: len(f)] == f for f in foreign) and known:
            continue
        owner, path = _locate(cls, loc)
        given = fault.get("input")
        match fault["type"]:
            case "unexpected_keyword_argument" | "extra_forbidden":
                lines.append(f"{path}: unknown key{suggest(str(loc[-1]), names_of(owner))}")
            case "missing" | "missing_keyword_only_argument" | "missing_argument":
                lines.append(f"{path}: missing")
            case "value_error":
                reason = str(fault["msg"]).removeprefix("Value error, ")
                lines.append(f"{path}: {reason}" if path else reason)
            case _:
                shown = json.dumps(given) if not isinstance(given, dict) else "a mapping"
                shown = shown if len(shown) <= MAX_SHOWN else f"{shown[: MAX_SHOWN - 3]}..."
                rule = f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
                lines.append(f"{path}: got {shown}; {rule}" if path else f"got {shown}; {rule}")
    return list(dict.fromkeys(lines)) or [str(error).splitlines()[0]]


def _member(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of an error's location that leads to a member of a choice; empty without one."""
    at = [i for i, key in enumerate(loc) if str(key)[:1].isupper()]
    return tuple(loc[: at[-1] + 1]) if at else ()


def _locate(cls: Any, loc: tuple[Any, ...]) -> tuple[Any, str]:
    """Follow an error's location; return the class that owns its last key, and the dotted path."""
    owner, path = cls, []
    current: Any = cls
    for key in loc:
        members = members_of(current)
        by_name = {m.__name__: m for m in members if is_dataclass(m)}  # type: ignore[attr-defined]
        if key in by_name and key not in names_of(current):
            current = by_name[key]  # a step into a union, not a key of the file
            continue
        if str(key).startswith(("function-", "lax-or-strict", "json-or-python", "nullable")):
            continue
        owner = current
        path.append(f"[{key}]" if isinstance(key, int) else str(key))
        current = field_type(current, str(key))
    return owner, ".".join(path).replace(".[", "[")


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a declared type lets choose from: a union's members, or itself."""
    return get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def names_of(annotation: Any) -> list[str]:
    """Field names of a spec class, or of all members of a union of them."""
    specs = [m for m in members_of(annotation) if is_dataclass(m)]
    return list(dict.fromkeys(f.name for cls in specs for f in fields(cls)))


def field_type(annotation: Any, name: str) -> Any:
    """The declared type of a field, None where there is no such field."""
    for member in members_of(annotation):
        if is_dataclass(member) and name in _hints(member):
            return _hints(member)[name]
        if get_origin(member) in (tuple, dict):
            return get_args(member)[-2 if get_origin(member) is tuple else -1]
    return None


def check_path(cls: Any, path: str, where: str) -> None:
    """Raise UsageError unless `path` leads through existing fields of the spec class to a value."""
    current = cls
    for key in path.split("."):
        if key not in names_of(current):
            raise UsageError(f"{where}: no knob {path!r}{suggest(key, names_of(current))}")
        current = field_type(current, key)
    if any(is_dataclass(m) for m in members_of(current)):
        example = names_of(current)[:1]
        hint = f"; sweep one of its values, such as {path}.{example[0]}" if example else ""
        raise UsageError(f"{where}: {path!r} is a part, not a value{hint}")


def suggest(got: str, known: Iterable[str]) -> str:
    """`; did you mean x?` for a near miss, the list of what exists otherwise."""
    names = list(known)
    near = get_close_matches(got, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(names)}" if names else ""


def dump(value: Any) -> Any:
    """Turn a spec into plain data, without its absent parts."""
    if isinstance(value, _PLAIN):  # most of what there is, and cheap to know
        return value
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: dump(part) for name, part in pairs if part is not None}
    if isinstance(value, (tuple, list)):
        return [dump(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items() if item is not None}
    return value


def to_yaml(value: Any) -> str:
    """Write a spec (or plain data) as YAML that `read_yaml` reads back to the same."""
    return yaml.dump(dump(value), Dumper=_CoreDumper, sort_keys=False, width=100)


class _CoreDumper(yaml.SafeDumper):
    """Quotes what the core schema would read as another type."""


_CoreDumper.yaml_implicit_resolvers = _CoreLoader.yaml_implicit_resolvers


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted, compact, 1 and 1.0 alike, no absent parts."""
    return json.dumps(
        _plain_numbers(dump(value)), sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path to leaf value, absent parts left out; a part without fields gives True."""
    plain = dump(value)
    if not isinstance(plain, dict):
        return {prefix: plain}
    if not plain and prefix:
        return {prefix: True}
    flat: dict[str, Any] = {}
    for key, item in plain.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a spec class."""
    return _adapter(cls).json_schema()

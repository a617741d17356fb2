"""What every spec keeps to, and what every module class in trainer.model declares."""

import ast
import importlib
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from trainer.codec import dump, parse
from trainer.model.roles import ROLES

ROOT = Path(__file__).resolve().parents[2]

# Where configuration is declared. Results and manifests are records: they may hold mappings.
CONFIGURATION = ("trainer/specs", "tune_spaces", "service")
# The sweep file's own mappings: their keys are dotted paths, so no class can list them.
MAPPINGS = {"SweepSpec.space", "SweepSpec.overrides", "SweepSpec.derived"}
# One value that suits every required field of a type; 2048 is even, and no warmdown exceeds it.
REQUIRED: dict[Any, Any] = {int: 2048, float: 0.5, str: "sp1024"}
# What a spec's own invariant asks for beyond its required fields.
INVARIANTS: dict[str, dict[str, Any]] = {
    "Axis": {"values": (2, 0.5, "none", True)},
    "Baseline": {"mean": 1.0},
    "Budget": {"gpu_hours": 0.5},
    "Departure": {"step": 5},
    "Late": {"progress": 0.5},
    "Qat": {"mlp_bits": 6},
}


def _spec_classes() -> list[type]:
    """Every class of configuration under @spec."""
    found: list[type] = []
    for path in (path for part in CONFIGURATION for path in _python(part)):
        names = [node.name for node in _classes(path) if "spec" in _decorators(node)]
        if names:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found += [getattr(importlib.import_module(name), cls) for cls in names]
    return found


def _python(root: str) -> list[Path]:
    return sorted((ROOT / root).rglob("*.py"))


def _classes(path: Path) -> list[ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def _decorators(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(item) for item in node.decorator_list]


SPECS = _spec_classes()
each_spec = pytest.mark.parametrize("cls", SPECS, ids=lambda cls: cls.__qualname__)


def test_configuration_has_one_flavour_of_dataclass() -> None:
    other = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in _python("trainer/specs")
        for node in _classes(path)
        if _decorators(node) != ["spec"]
    ]

    assert not other, "write @spec over these, and nothing else:\n" + "\n".join(other)


@each_spec
def test_a_spec_is_frozen_slotted_and_keyword_only(cls: type) -> None:
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]

    assert parameters.frozen, f"{cls.__name__}: use @spec, which freezes"
    assert "__slots__" in vars(cls), f"{cls.__name__}: use @spec, which gives slots"
    assert all(f.kw_only for f in fields(cls)), f"{cls.__name__}: use @spec, keywords only"


@each_spec
def test_a_spec_is_documented(cls: type) -> None:
    # A dataclass without a docstring is given its signature as one.
    written = (cls.__doc__ or "").partition("(")[0].strip()

    assert written not in ("", cls.__name__), f"{cls.__name__}: say in a docstring what it sets"


@each_spec
def test_a_field_that_may_be_none_is_none_by_default(cls: type) -> None:
    hints = _hints(cls)

    optional = [f for f in fields(cls) if NoneType in get_args(hints[f.name])]
    other = [f.name for f in optional if f.default is not None]

    assert not other, f"{cls.__name__}: dump leaves absent parts out; default {other} to None"


@each_spec
def test_the_fields_of_a_spec_are_plain_values_or_other_specs(cls: type) -> None:
    rich = [
        f"{cls.__name__}.{name}: {hint}"
        for name, hint in _hints(cls).items()
        if f"{cls.__name__}.{name}" not in MAPPINGS and not _is_plain(hint)
    ]

    assert not rich, "use int, float, bool, str, Literal, a tuple or a spec:\n" + "\n".join(rich)


@each_spec
def test_a_spec_survives_being_dumped_and_parsed(cls: type) -> None:
    written = _example(cls)

    read = parse(cls, dump(written), "round trip")

    assert read == written


def test_every_parameter_of_the_model_has_a_role() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: parameters {sorted(held)}, "
        f"ROLES {sorted(declared)}"
        for path in _python("trainer/model")
        for node in _classes(path)
        if (held := _parameters(node)) != set(declared := _roles(node))
    ]

    assert not wrong, (
        f"name each parameter in the class's ROLES as one of {', '.join(ROLES)}, and no other:\n"
        + "\n".join(wrong)
    )


def test_every_declared_role_exists() -> None:
    unknown = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}.ROLES: {name} is {role!r}"
        for path in _python("trainer/model")
        for node in _classes(path)
        for name, role in _roles(node).items()
        if role not in ROLES
    ]

    assert not unknown, f"the roles are {', '.join(ROLES)}:\n" + "\n".join(unknown)


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}  # type: ignore[arg-type]


def _is_plain(hint: Any) -> bool:
    if get_origin(hint) in (UnionType, Union, tuple):
        return all(_is_plain(part) for part in get_args(hint) if part is not Ellipsis)
    if get_origin(hint) is Literal:
        return True
    return hint in (int, float, bool, str, NoneType) or hint in SPECS


def _example(cls: type) -> Any:
    """The spec with its defaults, and with stand-ins where it has none."""
    required = [f for f in fields(cls) if f.default is MISSING]  # type: ignore[arg-type]
    values = {f.name: _value(_hints(cls)[f.name]) for f in required}
    return cls(**values, **INVARIANTS.get(cls.__name__, {}))


def _value(hint: Any) -> Any:
    if hint in REQUIRED:
        return REQUIRED[hint]
    if is_dataclass(hint) and isinstance(hint, type):
        return _example(hint)
    if get_origin(hint) is tuple:
        return ()
    return get_args(hint)[0]


def _parameters(owner: ast.ClassDef) -> set[str]:
    """Names of the attributes that the class sets to an nn.Parameter."""
    held: set[str] = set()
    for node in ast.walk(owner):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if ast.unparse(node.value.func) in ("nn.Parameter", "torch.nn.Parameter", "Parameter"):
            held |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
    return held


def _roles(owner: ast.ClassDef) -> dict[str, str]:
    for node in owner.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROLES":
            return ast.literal_eval(node.value)
    return {}

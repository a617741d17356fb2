"""The sources that a single file is cut from: modules, their definitions, and what a name means.

A module is read as text and never imported. Its top level may hold imports, functions, classes and
assignments to one name; whatever else stands there is an error once the single file needs the
module's names that it touches.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Final

from trainer.errors import FairwayError

ROOT_PACKAGES: Final = ("trainer", "service")
STAND_INS: Final = "service.singlefile.stand_ins"
# What is replaced, because the single file starts afresh, knows its own model and reads no other
# file's; why each is the same there is said where it is defined.
REPLACED: Final = {
    "trainer.data.manifest:read_manifest": "read_manifest",
    "trainer.finalize.artifact:_coder": "range_coder",
    "trainer.finalize.artifact:_open": "open_own",
    "trainer.finalize.artifact_header:_parse_model": "parse_own_model",
    "trainer.finalize.code:write_code": "write_code",
    "trainer.finalize.gptq:walk_on": "walk_plainly",
    "trainer.train.departures:kin_of": "no_kin",
    "trainer.train.departures:take_up": "nothing_to_take_up",
    "trainer.train.steering:Steering": "Unsteered",
}


# What only some machines have: the code that needs it stands behind a guard in the single file.
GUARDED: Final = ("triton", "flash_attn", "flash_attn_interface")


class ExportError(FairwayError):
    """The trainer's sources cannot be cut into one file: a bug of the exporter or a new idiom."""


class Text:
    """A source and where its nodes lie in it, in characters."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return first and end character of a node; decorators are not in it."""
        return (
            self.at(node.lineno, node.col_offset),  # type: ignore[attr-defined]
            self.at(node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
        )

    def at(self, line: int, column: int) -> int:
        """A node counts columns in bytes of UTF-8."""
        text = self._lines[line - 1]
        return self._starts[line - 1] + len(text.encode()[:column].decode())

    def line_start(self, line: int) -> int:
        return self._starts[line - 1]

    def line(self, number: int) -> str:
        return self._lines[number - 1]

    def lines_of(self, node: ast.stmt) -> tuple[int, int]:
        """Return first and last line of a statement with its decorators and the comments on it."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(each.lineno for each in decorators)])
        indent = " " * node.col_offset + "#"
        while first > 1 and self.line(first - 1).startswith(indent):
            first -= 1
        assert node.end_lineno is not None
        return first, node.end_lineno


@dataclass(frozen=True, slots=True)
class External:
    """A name that an import from outside binds."""

    module: str
    name: str | None
    bound: str


@dataclass(frozen=True, slots=True)
class Package:
    """A module of ours, as a name is bound to it."""

    name: str


@dataclass(frozen=True, eq=False)
class Definition:
    """Something that a module's top level binds to one name; `lines` with comments on it."""

    module: "Module"
    name: str
    node: ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Expr
    lines: tuple[int, int]

    @property
    def qualname(self) -> str:
        return f"{self.module.name}:{self.name}"

    @property
    def value(self) -> ast.expr | None:
        """What is assigned, if this is an assignment."""
        return self.node.value if isinstance(self.node, ast.Assign | ast.AnnAssign) else None

    @property
    def is_alias(self) -> bool:
        """Whether this only names a type, for annotations and isinstance."""
        value = self.value
        return isinstance(value, ast.BinOp | ast.Subscript) and _is_type(value)


Meaning = Definition | External | Package | None


@dataclass(frozen=True, eq=False)
class Module:
    """One source file."""

    name: str
    text: Text
    tree: ast.Module
    definitions: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)
    registered: dict[str, list[Definition]] = field(default_factory=dict)
    """What a module gives an operator of torch's that it defines, by the operator's name."""

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def guarded(self) -> list[ast.stmt]:
        """The imports of this module that only some machines can do."""
        return [node for node in self.tree.body if is_guarded(node)]


_MODULES: Final[dict[str, Module]] = {}


def read_module(name: str) -> Module:
    """Read a module of ours; equal names give the same object."""
    if name in _MODULES:
        return _MODULES[name]
    package, *parts = name.split(".")
    place = files(package)
    for part in parts:
        place = place / part
    path = place / "__init__.py" if place.is_dir() else place.parent / f"{place.name}.py"  # type: ignore[attr-defined]
    return parse_module(name, path.read_text(encoding="utf-8"))


def parse_module(name: str, source: str) -> Module:
    """Take a module's source apart; under its name it is known from then on."""
    source = _one_by_one(source)
    module = Module(name, Text(source), ast.parse(source))
    _MODULES[name] = module
    last: Definition | None = None
    for node in module.tree.body:
        last = _take(module, node, last)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _take_import(module, node)
    return module


def _one_by_one(source: str) -> str:
    """Give every plain value of a module a line of its own, where several are named in one."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                if len(names) != len(values) or not all(
                    isinstance(each, ast.Constant) for each in values
                ):
                    continue
                lines[node.lineno - 1 : node.end_lineno] = [
                    f"{ast.unparse(name)} = {ast.unparse(value)}\n"
                    for name, value in zip(names, values, strict=True)
                ]
    return "".join(lines)


def _take(module: Module, node: ast.stmt, last: Definition | None) -> Definition | None:
    """File one statement of a module's top level; return the definition that it made."""
    match node:
        case ast.Import() | ast.ImportFrom():
            return None
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            pass
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            pass
        case ast.Expr(value=ast.Constant(value=str())):
            if last is not None:  # the docstring of an assignment
                lines = (last.lines[0], node.end_lineno or node.lineno)
                module.definitions[last.name] = Definition(module, last.name, last.node, lines)
            return None
        case ast.Expr() if _operator_of(module, node) is not None:
            name = "_"
        case _:
            module.effects.append(node)
            return None
    if name == "_":  # nobody reads it
        name = f"_{node.lineno}"
    if name in module.definitions:
        raise ExportError(f"{module.name}, line {node.lineno}: {name} is defined a second time")
    made = Definition(module, name, node, module.text.lines_of(node))  # type: ignore[arg-type]
    module.definitions[name] = made
    operator = _operator_of(module, node)
    if operator is not None:
        module.registered.setdefault(operator, []).append(made)
    return made


def _operator_of(module: Module, node: ast.stmt) -> str | None:
    """Return the operator of torch's to which a statement, or a decorator, gives something."""
    given = node.decorator_list if isinstance(node, ast.FunctionDef) else [node]
    for each in given:
        call = each.value if isinstance(each, ast.Expr) else each
        match call.func if isinstance(call, ast.Call) else call:
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if attr.startswith("register_"):
                operator = module.definitions.get(name)
                if operator is not None and _is_operator(operator.node):
                    return name
    return None


def _is_operator(node: ast.stmt) -> bool:
    """Whether a function is decorated as an operator of torch's."""
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(each).startswith("torch.library.custom_op(") for each in node.decorator_list
    )


def _take_import(module: Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None  # the house imports absolutely
            module.imports[alias.asname or alias.name] = (node.module, alias.name)
        else:
            if alias.asname is None and "." in alias.name:
                top = alias.name.partition(".")[0]
                if top in ROOT_PACKAGES:
                    raise ExportError(f"{module.name}: import {alias.name} binds a package")
            module.imports[alias.asname or alias.name.partition(".")[0]] = (alias.name, None)


def is_guarded(node: ast.AST) -> bool:
    """Whether a statement imports what only some machines have."""
    match node:
        case ast.Import(names=names):
            return any(each.name.partition(".")[0] in GUARDED for each in names)
        case ast.ImportFrom(module=str(name)):
            return name.partition(".")[0] in GUARDED
    return False


def is_ours(module: str) -> bool:
    """Whether a module lies in one of our packages."""
    return module.partition(".")[0] in ROOT_PACKAGES


def meaning_of(module: Module, name: str) -> Meaning:
    """Return what a name at a module's top level stands for, None for a builtin.

    What is replaced gives its replacement, except to the stand-ins themselves.
    """
    found = _plain_meaning(module, name)
    if isinstance(found, Definition) and module.name != STAND_INS:
        replaced = REPLACED.get(found.qualname)
        if replaced is not None:
            return read_module(STAND_INS).definitions[replaced]
    return found


def _plain_meaning(module: Module, name: str) -> Meaning:
    if name in module.definitions:
        return module.definitions[name]
    if name not in module.imports:
        return None
    source, part = module.imports[name]
    if not is_ours(source):
        return External(source, part, name)
    if part is None:
        return Package(source)
    if _is_module(f"{source}.{part}"):
        return Package(f"{source}.{part}")
    return _plain_meaning(read_module(source), part)


@cache
def _is_module(name: str) -> bool:
    package, *parts = name.split(".")
    place = files(package)
    for part in parts[:-1]:
        place = place / part
    if not place.is_dir():
        return False
    return (place / parts[-1]).is_dir() or (place / f"{parts[-1]}.py").is_file()


def imported_by(module: Module) -> Iterator[str]:
    """Yield the modules of ours that a module imports, in the order of its text."""
    for source, part in module.imports.values():
        if is_ours(source):
            nested = f"{source}.{part}"
            yield nested if part is not None and _is_module(nested) else source


def in_order(root: str) -> list[Module]:
    """Return a module and all that it imports, what is imported before what imports it."""
    order: dict[str, Module] = {}

    def visit(name: str) -> None:
        if name in order:
            return
        module = read_module(name)
        for below in imported_by(module):
            visit(below)
        order[name] = module

    visit(root)
    return list(order.values())


def _is_type(node: ast.expr) -> bool:
    """Whether an expression is a type: names, None, unions and subscripts of such."""
    match node:
        case ast.Name(id=name):
            return name[:1].isupper() or name in ("tuple", "list", "dict", "int", "float", "str")
        case ast.Attribute(attr=name):
            return name[:1].isupper() or name == "ndarray"
        case ast.Constant(value=value):
            return value is None or value is ... or isinstance(value, str | int)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _is_type(left) and _is_type(right)
        case ast.Subscript(value=ast.Name(id="Final")):
            return False
        case ast.Subscript(value=value, slice=ast.Tuple(elts=parts)):
            return _is_type(value) and all(map(_is_type, parts))
        case ast.Subscript(value=value, slice=part):
            return _is_type(value) and _is_type(part)
        case ast.List(elts=parts):
            return all(map(_is_type, parts))
    return False

"""What names and annotations stand for."""

import ast
from functools import cache
from typing import Any, Self

from service.singlefile.bindings import Bindings, bindings_of
from service.singlefile.program import (
    Definition,
    External,
    Meaning,
    Module,
    Package,
    meaning_of,
    read_module,
)
from service.singlefile.values import (
    ANYTHING,
    BOTH,
    NONE,
    Instance,
    Value,
    constant,
    join,
    truths,
)
from service.singlefile.world import (
    BACKEND,
    World,
    definition_of,
    is_class,
    is_known_class,
    is_protocol,
)


class Annotations:
    """Reads annotations inside one function, method or assignment."""

    def __init__(
        self,
        world: World,
        module: Module,
        function: ast.FunctionDef | None = None,
        owner: Definition | None = None,
        busy: frozenset[Any] = frozenset(),
    ) -> None:
        """`owner` is the class of a method; `busy` are the questions that are being answered."""
        self.world = world
        self.module = module
        self.owner = owner
        self.function = function
        self.bindings: Bindings = bindings_of(function) if function is not None else {}
        self.busy = busy

    def inside(
        self,
        module: Module,
        function: ast.FunctionDef | None = None,
        owner: Definition | None = None,
        busy: Any = None,
    ) -> Self:
        """Return a reader of another place, to which one more question leads."""
        added = self.busy if busy is None else self.busy | {busy}
        return type(self)(self.world, module, function, owner, added)

    def meaning(self, node: ast.expr) -> Meaning:
        """Return what a name, or a name in a module of ours, stands for."""
        match node:
            case ast.Name(id=name) if name not in self.bindings:
                return meaning_of(self.module, name)
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if name not in self.bindings:
                module = meaning_of(self.module, name)
                if isinstance(module, Package):
                    return meaning_of(read_module(module.name), attr)
        return None

    def type_value(self, node: ast.expr | None) -> Value:
        """Return what an annotation admits."""
        match node:
            case ast.Constant(value=None):
                return NONE
            case ast.Constant(value=str(text)):
                return self.type_value(_parsed(text))
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return join([self.type_value(left), self.type_value(right)])
            case ast.Name(id="bool"):
                return truths(BOTH)
            case ast.Name() | ast.Attribute():
                return self._type_name(self.meaning(node))
            case ast.Subscript(value=ast.Name(id=name), slice=inner):
                return self._type_subscript(name, node.value, inner)
        return ANYTHING

    def _type_name(self, meaning: Meaning) -> Value:
        if not isinstance(meaning, Definition):
            return ANYTHING
        if is_class(meaning):
            return self.objects_of(meaning)
        if meaning.qualname == BACKEND:
            return join(map(constant, self.world.backends()))
        if meaning.is_alias:
            return self.inside(meaning.module).type_value(meaning.value)
        return ANYTHING

    def _type_subscript(self, name: str, base: ast.expr, inner: ast.expr) -> Value:
        if name == "Literal":
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return join(constant(p.value) for p in parts if isinstance(p, ast.Constant))
        if name == "Final":
            return self.type_value(inner)
        return self._type_name(self.meaning(base))

    def objects_of(self, definition: Definition) -> Value:
        """Return the objects of a class of ours, and of what derives from it, that are made."""
        if is_protocol(definition):
            return ANYTHING
        return join(map(self._made, self.world.made.get(definition.qualname, ())))

    def _made(self, owner: str) -> Value:
        """Return the objects of this very class."""
        if is_known_class(definition_of(owner)) and owner not in self.world.open_classes:
            return frozenset(self.world.known.get(owner, ()))
        return frozenset([Instance(owner)])

    def classes_in(self, node: ast.expr) -> list[Definition | External | str]:
        """Return the classes that a test names; a builtin's by its name."""
        if isinstance(node, ast.BinOp):
            return self.classes_in(node.left) + self.classes_in(node.right)
        if isinstance(node, ast.Tuple):
            return [each for part in node.elts for each in self.classes_in(part)]
        meaning = self.meaning(node)
        if isinstance(meaning, Definition) and meaning.is_alias:
            assert meaning.value is not None
            return self.inside(meaning.module).classes_in(meaning.value)
        if isinstance(meaning, Definition | External):
            return [meaning]
        return [ast.unparse(node)]


@cache
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body

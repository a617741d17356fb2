"""What expressions of the trainer may be, by their annotations and by what is known of a recipe.

Annotations are believed, as the type checker has held the code against them. Names are taken over
all of their bindings in a function, wherever these stand; what a list or a mapping holds is
unknown once a name is bound to it.
"""

import ast
from typing import Any, Final

from service.singlefile.annotations import Annotations
from service.singlefile.bindings import assigned_in, names_in
from service.singlefile.objects import (
    OPEN,
    is_one,
    is_replace,
    is_spec,
    replaced,
    widened,
)
from service.singlefile.program import STAND_INS, Definition, External
from service.singlefile.values import (
    ANYTHING,
    BOTH,
    Const,
    Instance,
    Value,
    compare,
    constant,
    join,
    truth,
    truths,
)
from service.singlefile.world import (
    bases_of,
    definition_of,
    is_class,
    line_of,
    qualname_of,
)

_OPERATORS: Final = {
    ast.Is: "is", ast.IsNot: "is not", ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<",
    ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip
# What is so whatever its class says: the reader of weights refuses every other kind before it does
# anything else. Only where that is refused, in `stand_ins.open_own`, it is not so yet.
_WEIGHTS_KIND: Final = ("trainer.finalize.artifact:_File", "kind")
# Made only of what the recipe says of kernels, or to be plain.
_KERNELS: Final = "trainer.kernels.chosen:Kernels"


class Evaluator(Annotations):
    """Evaluates expressions inside one function, method or assignment."""

    def truth(self, node: ast.expr) -> frozenset[bool]:
        """Return what the truth of an expression may be; nothing, while it waits."""
        return self._settled(truth(self.value(node), self._has_length))

    def _settled(self, found: frozenset[bool]) -> frozenset[bool]:
        return found if found or self.world.is_patient else BOTH

    def value(self, node: ast.expr) -> Value:
        """Return what an expression may be."""
        match node:
            case ast.Constant(value=value):
                return constant(value)
            case ast.Name() | ast.Attribute():
                return self._name_or_attribute(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                return join(self.value(body if holds else other) for holds in self.truth(test))
            case ast.BoolOp():
                return self._logic(node)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return truths(not holds for holds in self.truth(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                name = _OPERATORS[type(op)]
                found = compare(self.value(left), self.value(right), name)
                return truths(self._settled(found))
            case ast.Call():
                return self._call(node)
            case ast.NamedExpr(value=value):
                return self.value(value)
        return ANYTHING

    def _has_length(self, owner: str) -> bool:
        """Whether an object's truth may be other than True."""
        for definition in line_of(definition_of(owner)):
            assert isinstance(definition.node, ast.ClassDef)
            names = {n.name for n in definition.node.body if isinstance(n, ast.FunctionDef)}
            if names & {"__len__", "__bool__"}:
                return True
            if any(isinstance(base, External) for base in bases_of(definition)):
                return True
        return False

    def _logic(self, node: ast.BoolOp) -> Value:
        ends = isinstance(node.op, ast.Or)
        found: list[Value] = []
        for part in node.values:
            value = self.value(part)
            holds = truth(value, self._has_length)
            if part is node.values[-1] or value is None:
                found.append(value)
                continue
            # What is handed on without looking further, of all that this part may be.
            found.append(
                frozenset(a for a in value if ends in truth(frozenset([a]), self._has_length))
            )
            if holds == {ends}:
                break
        return join(found)

    def _name_or_attribute(self, node: ast.Name | ast.Attribute) -> Value:
        meaning = self.meaning(node)
        if isinstance(meaning, Definition):
            return self._global(meaning)
        if isinstance(node, ast.Name):
            return self._local(node.id) if node.id in self.bindings else ANYTHING
        return self.attribute(self.value(node.value), node.attr)

    def _global(self, definition: Definition) -> Value:
        node = definition.node
        question = ("global", definition.qualname)
        if question in self.busy or not isinstance(node, ast.Assign | ast.AnnAssign):
            return ANYTHING
        inside = self.inside(definition.module, busy=question)
        if node.value is None:  # the recipe, which the exporter writes
            assert isinstance(node, ast.AnnAssign)
            return inside.type_value(node.annotation)
        return inside.value(node.value)

    def _local(self, name: str) -> Value:
        question = ("local", id(self.function), name)
        if question in self.busy:
            return ANYTHING
        before, self.busy = self.busy, self.busy | {question}
        try:
            return join(self._bound(*binding) for binding in self.bindings[name])
        finally:
            self.busy = before

    def _bound(self, kind: str, node: Any) -> Value:
        """Return what one binding gives a name."""
        if kind == "self":
            return ANYTHING if self.owner is None else self.objects_of(self.owner)
        if kind == "type":
            return self.type_value(node)
        return self.value(node) if kind == "value" else ANYTHING

    def attribute(self, base: Value, name: str) -> Value:
        """Return what an attribute of a value may be."""
        if base is None:
            return ANYTHING
        parts: list[Value] = []
        for atom in base:
            match atom:
                case Const(value=object_) if is_spec(object_):
                    parts.append(self._of_known(object_, name))
                case Instance(owner=owner):
                    parts.append(self._of_instance(definition_of(owner), name))
                case Const(value=None):  # the checker has it that this is not asked of None
                    continue
                case _:
                    return ANYTHING
        return join(parts)

    def _of_known(self, object_: Any, name: str) -> Value:
        owner = qualname_of(type(object_))
        if owner in self.world.open_classes or (owner, name) in self.world.open_fields:
            return ANYTHING
        if name in object_.__dataclass_fields__:
            return constant(getattr(object_, name))
        return self._of_instance(definition_of(owner), name)

    def _of_instance(self, definition: Definition, name: str) -> Value:
        owner = definition.qualname
        if (owner, name) == _WEIGHTS_KIND and self.module.name != STAND_INS:
            return constant(self.world.kind_of_weights())
        if owner == _KERNELS and (kernel := self.world.kernel(name)) is not ANYTHING:
            return kernel
        question = ("attribute", owner, name)
        if question in self.busy:
            return ANYTHING
        found: list[Value] = []
        for each in line_of(definition):
            assert isinstance(each.node, ast.ClassDef)
            for node in each.node.body:
                match node:
                    case ast.AnnAssign(target=ast.Name(id=target)) if target == name:
                        return self.inside(each.module).type_value(node.annotation)
                    case ast.FunctionDef(name=target) if target == name:
                        return self._property(each, node, question)
                    case ast.Assign() if name in names_in(node):
                        return ANYTHING
            for method, value in assigned_in(each.node).get(name, ()):
                inside = self.inside(each.module, method, each, question)
                if isinstance(value, ast.AnnAssign):
                    return inside.type_value(value.annotation)
                is_whole = isinstance(value, ast.expr)
                found.append(widened(inside.value(value)) if is_whole else ANYTHING)
        return join(found) if found and name not in self.world.stored else ANYTHING

    def _property(self, definition: Definition, node: ast.FunctionDef, question: Any) -> Value:
        names = [each.id for each in node.decorator_list if isinstance(each, ast.Name)]
        if "property" not in names:
            return ANYTHING
        inside = self.inside(definition.module, node, definition, question)
        rest = [each for each in node.body if not isinstance(each, ast.Expr)]
        match rest:
            case [ast.Return(value=ast.expr() as result)]:
                return inside.value(result)
        return inside.type_value(node.returns)

    def _call(self, node: ast.Call) -> Value:
        match node.func:
            case ast.Name(id="isinstance") if len(node.args) == 2:
                return truths(self.is_instance(node.args[0], node.args[1]))
            case ast.Name(id="bool") if len(node.args) == 1:
                return truths(self.truth(node.args[0]))
        meaning = self.meaning(node.func)
        if is_replace(meaning):
            objects, unknown = self.replaced(node)
            # A field that is not known is open from then on, whatever else the object is.
            return ANYTHING if OPEN in unknown else join(map(constant, objects))
        if not isinstance(meaning, Definition):
            return ANYTHING
        if is_class(meaning):
            return self.objects_of(meaning)
        if isinstance(meaning.node, ast.FunctionDef):
            return self.inside(meaning.module).type_value(meaning.node.returns)
        return ANYTHING

    def replaced(self, node: ast.Call) -> tuple[list[Any], set[str]]:
        """Return the specs that a call of `replace` makes, and its fields that are not known."""
        return replaced(self.value(node.args[0]), self._keywords(node))

    def _keywords(self, node: ast.Call) -> dict[str, Value]:
        return {keyword.arg or OPEN: self.value(keyword.value) for keyword in node.keywords}

    def is_instance(self, node: ast.expr, classes: ast.expr) -> frozenset[bool]:
        """Return what isinstance may say."""
        value = self.value(node)
        found: set[bool] = set()
        kinds = self.classes_in(classes)
        if all(isinstance(each, Definition) and self._is_never(each) for each in kinds):
            return frozenset([False])
        if value is None:
            return BOTH
        for atom in value:
            found |= is_one(atom, kinds)
        return self._settled(frozenset(found))

    def _is_never(self, definition: Definition) -> bool:
        return is_class(definition) and self.objects_of(definition) == frozenset()

"""What expressions of the trainer may be, by their annotations and by what is known of a recipe.

Annotations are believed, as the type checker has held the code against them. Names are taken over
all of their bindings in a function, wherever these stand; what a list or a mapping holds is
unknown once a name is bound to it.
"""

import ast
from typing import Any, Final

from service.singlefile.annotations import Annotations
from service.singlefile.bindings import arguments_of, assigned_in, is_simple
from service.singlefile.objects import (
    built,
    is_mapping,
    is_one,
    is_replace,
    is_spec,
    items,
    loosened,
    made_value,
    replaced,
    widened,
)
from service.singlefile.program import STAND_INS, Definition, External
from service.singlefile.values import (
    ANYTHING,
    BOTH,
    Const,
    Foreign,
    Instance,
    Many,
    Row,
    Value,
    compare,
    constant,
    item_of,
    join,
    part_of,
    truth,
    truths,
)
from service.singlefile.world import (
    bases_of,
    definition_of,
    is_class,
    is_known_class,
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
_ABSENT: Final = object()


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
            case ast.Tuple(elts=parts) if not any(isinstance(p, ast.Starred) for p in parts):
                return frozenset([Row(tuple(self.value(part) for part in parts))])
            case ast.List(elts=parts) if not any(isinstance(p, ast.Starred) for p in parts):
                return frozenset([Many(join(self.value(part) for part in parts))])
            case ast.ListComp(elt=item) | ast.GeneratorExp(elt=item) | ast.SetComp(elt=item):
                return frozenset([Many(self.value(item))])
            case ast.DictComp(value=item):
                return frozenset([Many(self.value(item), is_mapping=True)])
            case ast.Subscript():
                return self._subscript(node)
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

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self.value(node.value)
        match node.slice:
            case ast.Constant(value=int(index)) if index >= 0:
                return part_of(base, index) if not is_mapping(base) else items(base)
        return items(base)

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
        return loosened(inside.value(node.value))

    def _local(self, name: str) -> Value:
        question = ("local", id(self.function), name)
        if question in self.busy:
            return ANYTHING
        before, self.busy = self.busy, self.busy | {question}
        try:
            return join(self._bound(*binding) for binding in self.bindings[name])
        finally:
            self.busy = before

    def _bound(self, kind: str, node: Any, path: tuple[int, ...]) -> Value:
        """Return what one binding gives a name; `path` leads through an unpacked tuple."""
        if kind == "self":
            return ANYTHING if self.owner is None else self.objects_of(self.owner)
        if kind == "parameter":
            return self._parameter(node)
        if kind == "type":
            return self.type_value(node)
        if kind == "unknown":
            return ANYTHING
        value = self.value(node)
        if kind == "each":
            value = item_of(value)
        for index in path:
            value = part_of(value, index)
        return loosened(value) if kind == "value" else value

    def _parameter(self, argument: ast.arg) -> Value:
        if argument.arg in self.told:
            return self.told[argument.arg]
        declared = self.type_value(argument.annotation) if argument.annotation else ANYTHING
        if self.owner is not None or self.function is None:
            return declared
        own = (*self.function.args.posonlyargs, *self.function.args.args)
        if argument not in (*own, *self.function.args.kwonlyargs):
            return declared
        function = f"{self.module.name}:{self.function.name}"
        if function in self.world.handed_on:
            return declared
        given = self.world.arguments.get((function, argument.arg), frozenset())
        holds = given is None or any(isinstance(atom, Many) for atom in given)
        return declared if holds else given

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
                case Foreign():
                    parts.append(frozenset([Foreign()]))
                case Const(value=None):  # the checker has it that this is not asked of None
                    continue
                case _:
                    return ANYTHING
        return join(parts)

    def _of_known(self, object_: Any, name: str) -> Value:
        owner = qualname_of(type(object_))
        if owner in self.world.open_classes or (owner, name) in self.world.open_fields:
            return ANYTHING
        is_field = name in object_.__dataclass_fields__
        if is_field or isinstance(getattr(type(object_), name, None), property):
            return constant(getattr(object_, name))
        return ANYTHING

    def _of_instance(self, definition: Definition, name: str) -> Value:
        owner = definition.qualname
        if (owner, name) == _WEIGHTS_KIND and self.module.name != STAND_INS:
            return constant(self.world.kind_of_weights())
        question = ("attribute", owner, name)
        if question in self.busy:
            return ANYTHING
        for each in line_of(definition):
            found = self._declared(each, name, question)
            if found is not _ABSENT:
                return found
        return ANYTHING

    def _declared(self, definition: Definition, name: str, question: Any) -> Any:
        """Return what a class says of its attribute, or _ABSENT."""
        assert isinstance(definition.node, ast.ClassDef)
        found: list[Value] = []
        for node in definition.node.body:
            match node:
                case ast.AnnAssign(target=ast.Name(id=target)) if target == name:
                    return self.inside(definition.module).type_value(node.annotation)
                case ast.FunctionDef(name=target) if target == name:
                    return self._property(definition, node, question)
        for method, value in assigned_in(definition.node).get(name, ()):
            inside = self.inside(definition.module, method, definition, question)
            if isinstance(value, ast.AnnAssign):
                found.append(inside.type_value(value.annotation))
            else:
                found.append(
                    widened(inside.value(value)) if isinstance(value, ast.expr) else ANYTHING
                )
        return join(found) if found else _ABSENT

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
            case ast.Name(id="list" | "sorted" | "tuple" | "reversed" | "iter") if node.args:
                return frozenset([Many(item_of(self.value(node.args[0])))])
            case ast.Name(id="enumerate") if node.args:
                item = item_of(self.value(node.args[0]))
                return frozenset([Many(frozenset([Row((ANYTHING, item))]))])
            case ast.Name(id="zip"):
                items = tuple(item_of(self.value(part)) for part in node.args)
                return frozenset([Many(frozenset([Row(items)]))])
        meaning = self.meaning(node.func)
        if isinstance(meaning, External):
            return self._external_call(meaning, node)
        if isinstance(meaning, Definition):
            return self._own_call(meaning, node)
        if isinstance(node.func, ast.Attribute):
            return self._method_call(self.value(node.func.value), node.func.attr, node)
        return ANYTHING

    def _external_call(self, meaning: External, node: ast.Call) -> Value:
        if is_replace(meaning) and node.args:
            objects, unknown = self.replaced(node)
            # A field that is not known is open from then on, whatever else the object is.
            return ANYTHING if "*" in unknown else made_value(objects)
        return ANYTHING

    def _own_call(self, meaning: Definition, node: ast.Call) -> Value:
        if is_known_class(meaning):
            objects = self.built(meaning, node)
            return ANYTHING if objects is None else made_value(objects)
        if is_class(meaning):
            return self.objects_of(meaning)
        simple = self._simple_call(meaning, node)
        return self._returned(meaning, meaning.node) if simple is None else simple

    def replaced(self, node: ast.Call) -> tuple[list[Any], set[str]]:
        """Return the specs that a call of `replace` makes, and its fields that are not known."""
        return replaced(self.value(node.args[0]), self._keywords(node))

    def built(self, meaning: Definition, node: ast.Call) -> list[Any] | None:
        """Return the specs that a call of their class makes, None where it may make others."""
        return None if node.args else built(meaning, self._keywords(node))

    def _keywords(self, node: ast.Call) -> dict[str, Value]:
        return {keyword.arg or "*": self.value(keyword.value) for keyword in node.keywords}

    def _simple_call(self, meaning: Definition, node: ast.Call) -> Value:
        """Return what a function that only returns gives, told what this call tells it."""
        function = meaning.node
        if not isinstance(function, ast.FunctionDef) or not is_simple(function):
            return ANYTHING
        given = arguments_of(function, node)
        question = ("call", meaning.qualname)
        if given is None or question in self.busy:
            return ANYTHING
        inside = self.inside(meaning.module, function, busy=question)
        inside.told = {name: self.value(value) for name, value in given.items()}
        result = function.body[-1]
        assert isinstance(result, ast.Return)
        return ANYTHING if result.value is None else inside.value(result.value)

    def _returned(self, definition: Definition, node: ast.stmt) -> Value:
        if not isinstance(node, ast.FunctionDef) or node.returns is None:
            return ANYTHING
        return self.inside(definition.module).type_value(node.returns)

    def _method_call(self, base: Value, name: str, node: ast.Call) -> Value:
        if name == "import_module":
            return frozenset([Foreign()])
        if base is None:
            return ANYTHING
        parts: list[Value] = []
        for atom in base:
            match atom:
                case Instance(owner=owner):
                    parts.append(self._method_of(definition_of(owner), name))
                case Const(value=object_) if is_spec(object_):
                    parts.append(self._method_of_known(object_, name, node))
                case Many(item=item, is_mapping=True) if name == "values":
                    parts.append(frozenset([Many(item)]))
                case Many(item=item, is_mapping=True) if name == "items":
                    parts.append(frozenset([Many(frozenset([Row((ANYTHING, item))]))]))
                case _:
                    return ANYTHING
        return join(parts)

    def _method_of(self, definition: Definition, name: str) -> Value:
        for each in line_of(definition):
            assert isinstance(each.node, ast.ClassDef)
            for node in each.node.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return self._returned(each, node)
        return ANYTHING

    def _method_of_known(self, object_: Any, name: str, node: ast.Call) -> Value:
        """Call a spec's own method where it is told nothing: specs are pure."""
        if node.args or node.keywords or not self.world.is_closed(object_):
            return ANYTHING
        method = getattr(object_, name, None)
        return constant(method()) if callable(method) else ANYTHING

    def is_instance(self, node: ast.expr, classes: ast.expr) -> frozenset[bool]:
        """Return what isinstance may say."""
        value = self.value(node)
        found: set[bool] = set()
        kinds = self.classes_in(classes)
        if all(isinstance(k, Definition) and k.qualname not in self.world.made for k in kinds):
            return frozenset([False])
        if value is None:
            return BOTH
        for atom in value:
            found |= is_one(atom, kinds)
        return self._settled(frozenset(found))

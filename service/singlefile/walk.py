"""Expressions: conditions that the recipe decides are replaced by what they decide.

Only such are touched as have no effect of their own: names, attributes, comparisons, isinstance.
"""

import ast
import re
from typing import Final

from service.singlefile.bindings import bound_in
from service.singlefile.calls import note_call
from service.singlefile.edits import Page
from service.singlefile.evaluate import Evaluator
from service.singlefile.program import Definition, ExportError, Meaning
from service.singlefile.types import annotate, members_of
from service.singlefile.values import constant
from service.singlefile.walker import Walker
from service.singlefile.world import World, is_class, is_known_class

_SCOPES: Final = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# What they set is not seen.
_SETTERS: Final = {"setattr", "delattr", "globals", "vars", "exec", "eval"}
_SETTER_ATTRIBUTES: Final = {"__setattr__", "__delattr__", "__dict__"}


class Walk(Walker):
    """Walks over the expressions of one definition, or of one method."""

    def expression(self, node: ast.AST | None) -> None:
        """Walk over an expression as it is evaluated."""
        match node:
            case None:
                return
            case ast.Name():
                self._name(node)
            case ast.Attribute(ctx=ast.Load()):
                self._attribute(node)
            case ast.Attribute():
                self._stored(node)
            case ast.Constant(value=str(text)):
                if text.isidentifier():
                    self.world.names.add(text)
            case ast.JoinedStr():
                self._f_string(node)
            case ast.IfExp():
                self._choice(node)
            case ast.BoolOp():
                self._logic(node)
            case ast.Compare() | ast.UnaryOp(op=ast.Not()) if self._is_literal(node):
                pass
            case ast.Call():
                self._call(node)
            case ast.Subscript(value=ast.Name() as table) if self._is_asked_by_type(node):
                self.need(self.meaning(table))
                self.rename(table, self.meaning(table))
                self.expression(node.slice)
            case _ if isinstance(node, _SCOPES):
                self._scope(node)
            case _:
                self._children(node)

    def _children(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            self.expression(child)

    def _is_literal(self, node: ast.expr) -> bool:
        """Replace a condition in the place of a value by True or False, if it is sure."""
        holds = self.decide(node)
        if holds is not None:
            self.page.replace(*self.text.span(node), str(holds))
        return holds is not None or self.waits(node)

    def _is_asked_by_type(self, node: ast.Subscript) -> bool:
        """Whether a table of classes is asked for that of an object, which is one that is made."""
        return (
            isinstance(node.slice, ast.Call)
            and ast.unparse(node.slice.func) == "type"
            and class_keys(self.world, self.meaning(node.value)) is not None
        )

    def _name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load) or self.is_local(node.id):
            return
        if node.id == "__name__":  # one module, whose loggers have one name
            self.page.replace(*self.text.span(node), '"trainer"')
            return
        meaning = self.evaluator.meaning(node)
        self.use(meaning)
        if class_keys(self.world, meaning) is not None:
            self.world.handed_on.add(meaning.qualname)  # type: ignore[union-attr]
        self.rename(node, meaning)

    def _attribute(self, node: ast.Attribute) -> None:
        meaning = self.meaning(node)
        if meaning is not None:
            self.use(meaning)
            self.rename(node, meaning)
            return
        if self.folds and self.is_pure(node) and self.evaluator.value(node) == constant(None):
            self.page.replace(*self.text.span(node), "None")
            return
        if node.attr in _SETTER_ATTRIBUTES:
            raise ExportError(f"{self.definition.qualname}: {node.attr} hides what it sets")
        self.world.names.add(node.attr)
        # A class that is only asked for what it is itself makes no objects.
        self.expression(node.value)

    def _stored(self, node: ast.Attribute) -> None:
        """An attribute is set, or deleted: by its own object's method, or by whoever has it."""
        if self.meaning(node) is not None:
            where = self.definition.qualname
            raise ExportError(f"{where}: {ast.unparse(node)} is set from outside")
        if not isinstance(node.value, ast.Name) or node.value.id != "self" or not self.is_method:
            self.world.stored.add(node.attr)
        self.expression(node.value)

    def _f_string(self, node: ast.JoinedStr) -> None:
        """Nothing is cut inside: Python 3.11 does not say where its parts stand."""
        inner = Walk.__new__(Walk)
        inner.__dict__.update(self.__dict__)
        inner.page = Page(self.text)
        inner.folds = False
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                inner.expression(part.value)
                inner.expression(part.format_spec)
        if inner.page.edits:
            self.page.replace(*self.text.span(node), self._renamed_text(node))

    def _renamed_text(self, node: ast.JoinedStr) -> str:
        """Write an f-string with the names of the single file."""
        start, stop = self.text.span(node)
        text, copy = self.text.source[start:stop], ast.parse(ast.unparse(node), mode="eval").body
        for each in [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)]:
            meaning = self.meaning(each)
            if not isinstance(meaning, Definition) or not isinstance(each, ast.Name):
                if isinstance(meaning, Definition):
                    raise ExportError(f"{self.definition.qualname}: {ast.unparse(each)} in a text")
                continue
            new = self.name_of(meaning)
            text = re.sub(rf"(?<![\w.]){each.id}(?!\w)", new, text)
            for part in ast.walk(copy):
                if isinstance(part, ast.Name) and part.id == each.id:
                    part.id = new
        written = ast.unparse(ast.parse(text, mode="eval")) if "\n" not in text else ""
        return text if written == ast.unparse(copy) else ast.unparse(copy)

    def _choice(self, node: ast.IfExp) -> None:
        holds = self.decide(node.test)
        if holds is None:
            if not self.waits(node.test):
                self._children(node)
            return
        kept = node.body if holds else node.orelse
        start, stop = self.text.span(node)
        self.page.replace(start, stop, *self._operand(kept, (start, stop)))
        self.expression(kept)

    def _operand(
        self, node: ast.expr, inside: tuple[int, int]
    ) -> tuple[str | tuple[int, int], ...]:
        """The text of an operand, with its parentheses or, where it needs some, in new ones."""
        start, stop = self.text.span(node)
        source = self.text.source
        while True:
            before, after = start - 1, stop
            while before > inside[0] and source[before].isspace():
                before -= 1
            while after < inside[1] - 1 and source[after].isspace():
                after += 1
            if before < inside[0] or after >= inside[1]:
                break
            if source[before] != "(" or source[after] != ")":
                break
            start, stop = before, after + 1
        needs = "\n" in source[start:stop] or isinstance(node, ast.NamedExpr)
        return ("(", (start, stop), ")") if needs else ((start, stop),)

    def _logic(self, node: ast.BoolOp) -> None:
        """Leave out what is sure to let the next one decide; stop at what is sure to decide."""
        ends = isinstance(node.op, ast.Or)
        kept: list[ast.expr] = []
        for part in node.values:
            if self.waits(part):
                break
            holds = self.decide(part)
            if holds is (not ends) and part is not node.values[-1]:
                continue
            kept.append(part)
            if holds is ends:
                break
        if kept and len(kept) < len(node.values):
            span = self.text.span(node)
            word = " or " if ends else " and "
            pieces = [p for part in kept for p in (word, *self._operand(part, span))][1:]
            if len(kept) > 1 or not isinstance(kept[0], ast.BoolOp | ast.IfExp):
                self.page.replace(*span, *pieces)
            else:
                self.page.replace(*span, "(", self.text.span(kept[0]), ")")
        for part in kept:
            self.expression(part)

    def _call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            if self._is_literal(node):
                return
            self.expression(node.args[0])
            self.classes(node.args[1])
            return
        if isinstance(node.func, ast.Name) and node.func.id in _SETTERS:
            raise ExportError(f"{self.definition.qualname}: {node.func.id} hides what it sets")
        meaning = self.meaning(node.func)
        if meaning is None or not isinstance(node.func, ast.Name | ast.Attribute):
            self.expression(node.func)
        else:
            self.use(meaning, is_called=True)
            self.rename(node.func, meaning)
            note_call(self, meaning, node)
        for part in (*node.args, *node.keywords):
            self.expression(part)

    def classes(self, node: ast.expr) -> None:
        """Walk over what isinstance or a handler names; classes without objects are left out."""
        parts = members_of(node)
        kept = [part for part in parts if self._has_objects(part)] or parts[:1]
        if len(kept) < len(parts):
            spans: list[str | tuple[int, int]] = []
            for part in kept:
                spans += [" | ", self.text.span(part)]
            self.page.replace(*self.text.span(node), *spans[1:])
        for part in kept:
            meaning = self.meaning(part)
            if isinstance(meaning, Definition):
                self.need(meaning)
                self.rename(part, meaning)
            else:
                self.expression(part)

    def _has_objects(self, node: ast.expr) -> bool:
        meaning = self.meaning(node)
        if not isinstance(meaning, Definition) or not is_class(meaning):
            return True
        return self.evaluator.objects_of(meaning) != frozenset()

    # Scopes and types.

    def _scope(self, node: ast.AST) -> None:
        assert isinstance(node, _SCOPES)
        if isinstance(node, ast.Lambda):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                self.expression(default)
        self.scopes.append(bound_in(node))
        if isinstance(node, ast.Lambda):
            self.expression(node.body)
        else:
            self._children(node)
        self.scopes.pop()

    def annotation(self, node: ast.expr | None) -> None:
        if node is not None:
            annotate(self, node)


def class_keys(world: World, meaning: Meaning) -> list[Definition] | None:
    """The keys of a table, if that is what a name stands for and all keys are specs' classes."""
    if not isinstance(meaning, Definition) or not isinstance(meaning.node, ast.Assign):
        return None
    table = meaning.node.value
    if not isinstance(table, ast.Dict) or not table.keys:
        return None
    there = Evaluator(world, meaning.module)
    keys = [there.meaning(key) if key is not None else None for key in table.keys]
    known = [key for key in keys if isinstance(key, Definition) and is_known_class(key)]
    return known if len(known) == len(keys) else None

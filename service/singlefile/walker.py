"""What every walk needs: what names mean, what is sure, and where what is met is noted."""

import ast
from functools import cache
from typing import Final

from service.singlefile.edits import Page
from service.singlefile.evaluate import Evaluator
from service.singlefile.objects import is_replace
from service.singlefile.program import Definition, ExportError, External, Meaning
from service.singlefile.world import World, is_class, is_known_class

_PURE_CALLS: Final = {"isinstance", "len", "bool", "type"}


class Walker:
    """Walks over one definition, or over one method of a class."""

    def __init__(
        self,
        world: World,
        definition: Definition,
        page: Page,
        renamed: dict[str, str],
        method: ast.FunctionDef | None = None,
    ) -> None:
        self.world = world
        self.definition = definition
        self.module = definition.module
        self.page = page
        self.text = page.text
        self.renamed = renamed
        own = definition.node if isinstance(definition.node, ast.FunctionDef) else method
        owner = definition if method is not None else None
        self.evaluator = Evaluator(world, self.module, own, owner)
        self.is_method = method is not None
        self.scopes: list[set[str]] = []
        self.folds = own is None or not _yields(own)
        """Whether anything is cut: not in a generator, which it could cease to be."""

    def need(self, meaning: Meaning) -> None:
        """Take what a name stands for into the live code."""
        if isinstance(meaning, External):
            self.world.externals.add(meaning)
        elif isinstance(meaning, Definition):
            self.world.live.setdefault(meaning.qualname, meaning)

    def use(self, meaning: Meaning, *, is_called: bool = False) -> None:
        """Need a name's meaning as a value: of a class there are objects from now on."""
        self.need(meaning)
        if not is_called and is_replace(meaning):
            raise ExportError(f"{self.definition.qualname}: `replace` is handed on, not called")
        if not isinstance(meaning, Definition):
            return
        if is_class(meaning) and not (is_known_class(meaning) and is_called):
            self.world.make(meaning)
            if is_known_class(meaning):
                self.world.open_classes.add(meaning.qualname)

    def name_of(self, definition: Definition) -> str:
        """What a definition is called in the single file."""
        return self.renamed.get(definition.qualname, definition.name)

    def rename(self, node: ast.expr, meaning: Meaning) -> None:
        """Write a name, or a name in a module of ours, as it is called in the single file."""
        if isinstance(meaning, Definition) and ast.unparse(node) != self.name_of(meaning):
            self.page.replace(*self.text.span(node), self.name_of(meaning))

    def is_local(self, name: str) -> bool:
        return any(name in scope for scope in self.scopes)

    def meaning(self, node: ast.expr) -> Meaning:
        """Return what a name stands for beyond this definition."""
        top = node.value if isinstance(node, ast.Attribute) else node
        if isinstance(top, ast.Name) and self.is_local(top.id):
            return None
        return self.evaluator.meaning(node)

    def decide(self, node: ast.expr) -> bool | None:
        """Return what a condition is sure to be, None where it is not or does something."""
        if not self.folds or not self.is_pure(node):
            return None
        found = self.evaluator.truth(node)
        return next(iter(found)) if len(found) == 1 else None

    def waits(self, node: ast.expr) -> bool:
        """Whether a condition works on what nobody has made yet."""
        return self.folds and self.is_pure(node) and not self.evaluator.truth(node)

    def is_pure(self, node: ast.expr) -> bool:
        """Whether evaluating an expression does nothing else."""
        for each in ast.walk(node):
            if isinstance(each, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
                return False
            if isinstance(each, ast.Call) and not self._is_pure_call(each):
                return False
        return True

    def _is_pure_call(self, node: ast.Call) -> bool:
        return isinstance(node.func, ast.Name) and node.func.id in _PURE_CALLS


@cache
def _yields(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function))

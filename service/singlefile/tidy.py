"""What a cut leaves behind in a function: values that are bound and never read."""

import ast
from typing import Final

from service.singlefile.edits import Page
from service.singlefile.program import Text

_PURE: Final = (
    ast.Constant, ast.Name, ast.Attribute, ast.Tuple, ast.BinOp, ast.operator, ast.expr_context,
)  # fmt: skip
_ROUNDS: Final = 8


def tidy(source: str) -> str:
    """Take out assignments of plain values to names that nothing reads, until there are none."""
    for _ in range(_ROUNDS):
        page = Page(Text(source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                _tidy_function(page, node)
        if not page.edits:
            break
        source = page.render(0, len(source))
    return source


def _tidy_function(page: Page, function: ast.FunctionDef) -> None:
    read = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)
    }
    shared = {
        name
        for node in ast.walk(function)
        if isinstance(node, ast.Global | ast.Nonlocal)
        for name in node.names
    }
    for block in _blocks(function):
        for node in block:
            if len(block) > 1 and isinstance(node, ast.Assign) and len(node.targets) == 1:
                _tidy_assignment(page, node, read | shared)


def _blocks(function: ast.FunctionDef) -> list[list[ast.stmt]]:
    """The blocks of a function, without those of functions in it."""
    found: list[list[ast.stmt]] = []
    waiting: list[ast.AST] = [function]
    while waiting:
        node = waiting.pop()
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                found.append(block)
                waiting += [s for s in block if not isinstance(s, ast.FunctionDef | ast.ClassDef)]
        waiting += getattr(node, "handlers", []) + getattr(node, "cases", [])
    return found


def _tidy_assignment(page: Page, node: ast.Assign, read: set[str]) -> None:
    match node.targets[0], node.value:
        case ast.Name(id=name), value if name not in read and _is_pure(value):
            page.cut_lines(*page.text.lines_of(node))
        case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
            kept = [
                (target, value)
                for target, value in zip(targets, values, strict=True)
                if not (isinstance(target, ast.Name) and target.id not in read and _is_pure(value))
            ]
            if not kept:
                page.cut_lines(*page.text.lines_of(node))
            elif len(kept) < len(targets):
                sides = [
                    [page.text.span(each) for each in side] for side in zip(*kept, strict=True)
                ]
                page.replace(*page.text.span(node), *_listed(sides[0]), " = ", *_listed(sides[1]))


def _listed(spans: list[tuple[int, int]]) -> list[str | tuple[int, int]]:
    return [piece for span in spans for piece in (", ", span)][1:]


def _is_pure(node: ast.expr) -> bool:
    return all(isinstance(each, _PURE) for each in ast.walk(node))

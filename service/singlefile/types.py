"""Annotations: what they name must be there, so classes without objects are taken out of them."""

import ast
from typing import Final

from service.singlefile.edits import Piece
from service.singlefile.program import Definition, External
from service.singlefile.walker import Walker
from service.singlefile.world import is_class, is_protocol

ANY: Final = External("typing", "Any", "Any")


def annotate(walk: Walker, node: ast.expr) -> None:
    """Walk over an annotation; what stays of it names only what the single file has."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        _quoted(walk, node)
        return
    if isinstance(node, ast.BinOp):
        _union(walk, node)
        return
    meaning = walk.meaning(node) if isinstance(node, ast.Name | ast.Attribute) else None
    if isinstance(meaning, Definition):
        if _is_there(walk, meaning):
            walk.need(meaning)
            walk.rename(node, meaning)
        else:
            walk.need(ANY)
            walk.page.replace(*walk.text.span(node), "Any")
        return
    if isinstance(meaning, External):
        walk.need(meaning)
        return
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
        annotate(walk, node.value)
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            annotate(walk, child)


def _is_there(walk: Walker, meaning: Definition) -> bool:
    if not is_class(meaning) or is_protocol(meaning):
        return True
    return walk.evaluator.objects_of(meaning) != frozenset()


def _union(walk: Walker, node: ast.BinOp) -> None:
    members = members_of(node)
    kept = [part for part in members if _stays(walk, part)]
    if not kept:
        walk.need(ANY)
        walk.page.replace(*walk.text.span(node), "Any")
        return
    if len(kept) < len(members):
        pieces: list[Piece] = []
        for part in kept:
            pieces += [" | ", walk.text.span(part)]
        walk.page.replace(*walk.text.span(node), *pieces[1:])
    for part in kept:
        annotate(walk, part)


def _stays(walk: Walker, part: ast.expr) -> bool:
    meaning = walk.meaning(part) if isinstance(part, ast.Name | ast.Attribute) else None
    return not isinstance(meaning, Definition) or _is_there(walk, meaning)


def members_of(node: ast.expr) -> list[ast.expr]:
    """Return the members of a union."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return members_of(node.left) + members_of(node.right)
    return [node]


def _quoted(walk: Walker, node: ast.Constant) -> None:
    """A quoted annotation is kept, or becomes Any where it names what is not there."""
    for part in ast.walk(ast.parse(str(node.value), mode="eval")):
        if not isinstance(part, ast.Name):
            continue
        meaning = walk.meaning(part)
        if isinstance(meaning, Definition) and (
            not _is_there(walk, meaning) or walk.name_of(meaning) != part.id
        ):
            walk.need(ANY)
            walk.page.replace(*walk.text.span(node), "Any")
            return
        walk.need(meaning)

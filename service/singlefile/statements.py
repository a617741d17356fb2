"""Statements and blocks: arms that the recipe never takes go, and what can no longer be reached."""

import ast
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

from service.singlefile.bindings import bound_in
from service.singlefile.program import Definition, ExportError, is_guarded
from service.singlefile.types import annotate
from service.singlefile.walk import Walk
from service.singlefile.world import is_class

_ENDS: Final = (ast.Return, ast.Raise, ast.Continue, ast.Break)


class Fate(Enum):
    """What becomes of a statement: it stays, it goes, or it stays and nothing after it is met."""

    STAYS = 1
    GOES = 2
    ENDS = 3


class Arm(NamedTuple):
    """One arm of an if: its test, its body, and where its header begins."""

    node: ast.If
    test: ast.expr
    body: list[ast.stmt]


def walk_function(walk: Walk, node: ast.FunctionDef) -> None:
    """Walk over a function: decorators, defaults, annotations, body."""
    for decorator in node.decorator_list:
        walk.expression(decorator)
    args = node.args
    for default in (*args.defaults, *args.kw_defaults):
        walk.expression(default)
    for argument in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg):
        if argument is not None:
            walk.annotation(argument.annotation)
    walk.annotation(node.returns)
    walk.scopes.append(bound_in(node))
    walk_block(walk, node.body)
    walk.scopes.pop()


def walk_block(walk: Walk, body: Sequence[ast.stmt]) -> Fate:
    """Walk over a block; it goes where nothing stays in it."""
    stays = False
    going: list[ast.stmt] = []
    fate = Fate.STAYS
    for node in body:
        if fate is Fate.ENDS:
            going.append(node)
            continue
        found = _statement(walk, node)
        if found is Fate.GOES:
            going.append(node)
            continue
        stays, fate = True, found
    if not stays:
        first, last = _body_lines(walk, body)
        walk.page.cut_lines(first, last, " " * body[0].col_offset + "pass\n")
        return Fate.GOES
    for node in going:
        first, last = walk.text.lines_of(node)
        walk.page.cut_lines(first, last)
    return fate


def _statement(walk: Walk, node: ast.stmt) -> Fate:
    match node:
        case ast.If():
            return _branch(walk, node)
        case ast.FunctionDef():
            walk_function(walk, node)
        case ast.Match():
            _match(walk, node)
        case ast.Global() | ast.ClassDef() | ast.AsyncFunctionDef():
            raise ExportError(
                f"{walk.module.name}, line {node.lineno}: the exporter does not follow "
                f"`{ast.unparse(node).splitlines()[0]}`"
            )
        case ast.Import() | ast.ImportFrom():
            if not is_guarded(node):
                return Fate.GOES  # what it binds is at the top of the single file
        case ast.AnnAssign():
            annotate(walk, node.annotation)
            walk.expression(node.value)
            walk.expression(node.target)
        case ast.Assert(test=test) if walk.decide(test) is True:
            return Fate.GOES
        case ast.Try():
            _try(walk, node)
        case ast.For() | ast.While() | ast.With():
            _compound(walk, node)
        case _:
            walk.expression(node)
    return Fate.ENDS if isinstance(node, _ENDS) else Fate.STAYS


def _compound(walk: Walk, node: ast.For | ast.While | ast.With) -> None:
    for name, value in ast.iter_fields(node):
        if name in ("body", "orelse"):
            if value:
                walk_block(walk, value)
        elif isinstance(value, ast.AST):
            walk.expression(value)
        elif isinstance(value, list):
            for part in value:
                walk.expression(part)


def _try(walk: Walk, node: ast.Try) -> None:
    walk_block(walk, node.body)
    for handler in node.handlers:
        if handler.type is not None:
            for part in (
                handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
            ):
                walk.classes(part)
        walk_block(walk, handler.body)
    for body in (node.orelse, node.finalbody):
        if body:
            walk_block(walk, body)


def _match(walk: Walk, node: ast.Match) -> None:
    """Leave out the cases of classes without objects, as the subject may be."""
    walk.expression(node.subject)
    for case in node.cases:
        pattern = case.pattern
        if isinstance(pattern, ast.MatchClass) and walk.folds:
            may = walk.evaluator.is_instance(node.subject, pattern.cls)
            if may == {False}:
                last = case.body[-1].end_lineno
                assert last is not None
                walk.page.cut_lines(pattern.lineno, last)
                continue
        for each in ast.walk(pattern):
            if isinstance(each, ast.MatchClass):
                _matched(walk, each.cls)
                for name in each.kwd_attrs:
                    walk.world.names.add(name)
            elif isinstance(each, ast.MatchValue):
                walk.expression(each.value)
        walk.expression(case.guard)
        walk_block(walk, case.body)


def _matched(walk: Walk, node: ast.expr) -> None:
    meaning = walk.meaning(node)
    if isinstance(meaning, Definition) and is_class(meaning):
        walk.need(meaning)
        walk.rename(node, meaning)
    else:
        walk.expression(node)


def _branch(walk: Walk, node: ast.If) -> Fate:
    """Walk over an if with all of its arms, without those that are never taken."""
    arms, other = _arms(walk, node)
    kept: list[Arm] = []
    for arm in arms:
        if walk.waits(arm.test):
            return Fate.ENDS  # whether what follows is met shows later
        holds = walk.decide(arm.test)
        if holds is True:
            other = arm.body
            break
        if holds is None:
            kept.append(arm)
    is_whole = len(kept) == len(arms)
    fates: list[Fate] = []
    for arm in kept:
        walk.expression(arm.test)
        fates.append(walk_block(walk, arm.body))
    if other:
        fates.append(walk_block(walk, other))
    if not is_whole:
        if not kept and not other:
            return Fate.GOES
        _rewrite(walk, node, kept, other)
    if not kept:
        return fates[0]
    return Fate.ENDS if other and all(fate is Fate.ENDS for fate in fates) else Fate.STAYS


def _arms(walk: Walk, node: ast.If) -> tuple[list[Arm], list[ast.stmt]]:
    """Return an if and its elifs, and the body of its else."""
    arms = [Arm(node, node.test, node.body)]
    while len(node.orelse) == 1 and isinstance(inner := node.orelse[0], ast.If):
        start, _ = walk.text.span(inner)
        if not walk.text.source.startswith("elif", start):
            break
        node = inner
        arms.append(Arm(node, node.test, node.body))
    return arms, node.orelse


def _rewrite(walk: Walk, node: ast.If, kept: list[Arm], other: list[ast.stmt]) -> None:
    """Write an if anew with the arms that are left."""
    text, gap = walk.text, " " * node.col_offset
    stop = text.line_start((node.end_lineno or node.lineno) + 1)
    if not kept:
        depth = other[0].col_offset - node.col_offset
        whole = _body_span(walk, other)
        walk.page.replace(text.line_start(node.lineno), stop, whole, dedent=depth)
        return
    pieces: list[str | tuple[int, int]] = []
    for index, arm in enumerate(kept):
        head, _ = text.span(arm.node)
        word = "elif" if text.source.startswith("elif", head) else "if"
        pieces += [
            f"{gap}elif" if index else "if",
            (head + len(word), _body_span(walk, arm.body)[1]),
        ]
    if other:
        pieces += [f"{gap}else:\n", _body_span(walk, other)]
    walk.page.replace(text.span(node)[0], stop, *pieces)


def _body_span(walk: Walk, body: list[ast.stmt]) -> tuple[int, int]:
    """The lines of a block, the last one's end among them."""
    first, last = _body_lines(walk, body)
    return walk.text.line_start(first), walk.text.line_start(last + 1)


def _body_lines(walk: Walk, body: Sequence[ast.stmt]) -> tuple[int, int]:
    last = body[-1].end_lineno
    assert last is not None
    return walk.text.lines_of(body[0])[0], last

"""Which names a function binds, and to what."""

import ast
from collections.abc import Iterator
from functools import cache

# How, and by what node.
Binding = tuple[str, ast.AST | None]
Bindings = dict[str, list[Binding]]
Scope = ast.FunctionDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@cache
def bindings_of(function: ast.FunctionDef) -> Bindings:
    """Return all bindings inside a function, those of what is nested in it too."""
    found: Bindings = {}
    for node in ast.walk(function):
        for name, binding in _bindings(node, function):
            found.setdefault(name, []).append(binding)
    return found


def _bindings(node: ast.AST, function: ast.FunctionDef) -> Iterator[tuple[str, Binding]]:
    match node:
        case ast.FunctionDef(args=args) | ast.Lambda(args=args):
            if isinstance(node, ast.FunctionDef) and node is not function:
                yield node.name, ("unknown", None)
            yield from _parameters(args)
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _targets(target, value)
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
            yield name, ("type", annotation)
        case ast.AugAssign(target=ast.Name(id=name)):
            yield name, ("unknown", None)
        case ast.NamedExpr(target=ast.Name(id=name), value=value):
            yield name, ("value", value)
        case ast.For(target=target) | ast.comprehension(target=target):
            yield from _targets(target, None)
        case ast.withitem(optional_vars=ast.expr() as target):
            yield from _targets(target, None)
        case ast.ExceptHandler(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name, ("unknown", None)
        case ast.MatchAs(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name, ("unknown", None)


def _parameters(args: ast.arguments) -> Iterator[tuple[str, Binding]]:
    for argument in (*args.posonlyargs, *args.args, *args.kwonlyargs):
        if argument.arg == "self" and argument.annotation is None:
            yield argument.arg, ("self", None)
        else:
            yield argument.arg, ("type", argument.annotation)
    for argument in (args.vararg, args.kwarg):
        if argument is not None:
            yield argument.arg, ("unknown", None)


def _targets(target: ast.expr, value: ast.AST | None) -> Iterator[tuple[str, Binding]]:
    match target, value:
        case ast.Name(id=name), None:
            yield name, ("unknown", None)
        case ast.Name(id=name), _:
            yield name, ("value", value)
        case ast.Tuple(elts=parts), ast.Tuple(elts=values) if len(parts) == len(values):
            is_plain = not any(isinstance(each, ast.Starred) for each in (*parts, *values))
            for part, each in zip(parts, values, strict=True):
                yield from _targets(part, each if is_plain else None)
        case ((ast.Tuple() | ast.List() | ast.Starred()), _):
            for part in ast.iter_child_nodes(target):
                if isinstance(part, ast.expr):
                    yield from _targets(part, None)


def names_in(node: ast.AST) -> set[str]:
    """Return the names that stand in a node."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


@cache
def assigned_in(node: ast.ClassDef) -> dict[str, list[tuple[ast.FunctionDef, ast.AST | None]]]:
    """Return what methods give each attribute of their object: a value, or an annotated statement.

    None where it is unpacked, counted or iterated.
    """
    found: dict[str, list[tuple[ast.FunctionDef, ast.AST | None]]] = {}
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    bound = [
        (method, target, value)
        for method in methods
        for each in ast.walk(method)
        for target, value in _attributes(each)
    ]
    for method, target, value in bound:
        for part in ast.walk(target):
            match part:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    whole = value if part is target else None
                    found.setdefault(name, []).append((method, whole))
    return found


def _attributes(node: ast.AST) -> Iterator[tuple[ast.expr, ast.AST | None]]:
    """Yield what a statement binds, and to what."""
    match node:
        case ast.AnnAssign(target=target):
            yield target, node
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _pairs(target, value)
        case ast.AugAssign(target=target):
            yield target, None
        case ast.For(target=target) | ast.comprehension(target=target):
            yield target, None
        case ast.withitem(optional_vars=ast.expr() as target):
            yield target, None


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.AST | None]]:
    """Yield what an assignment binds part by part, where both sides are spelt out."""
    match target, value:
        case ast.Tuple(elts=parts), ast.Tuple(elts=values) if len(parts) == len(values):
            if not any(isinstance(each, ast.Starred) for each in (*parts, *values)):
                yield from zip(parts, values, strict=True)
                return
    yield target, value


@cache
def bound_in(scope: Scope) -> set[str]:
    """Return the names that a scope binds itself, without those of the scopes nested in it."""
    if isinstance(scope, ast.FunctionDef | ast.Lambda):
        args = scope.args
        found = {each.arg for each in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
        found |= {each.arg for each in (args.vararg, args.kwarg) if each is not None}
        body: list[ast.AST] = [*scope.body] if isinstance(scope, ast.FunctionDef) else []
    else:
        found = set()
        body = []
        for generator in scope.generators:
            found |= _stored(generator.target)
    for node in body:
        found |= _stored(node)
    return found


def _stored(node: ast.AST) -> set[str]:
    """Names that a node binds in the scope it stands in."""
    found: set[str] = set()
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            found.add(name)
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Lambda():
            return found
        case ast.ExceptHandler(name=str(name)) | ast.MatchStar(name=str(name)):
            found.add(name)
        case ast.MatchAs(name=str(name)) | ast.MatchMapping(rest=str(name)):
            found.add(name)
    inside = isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
    for child in ast.iter_child_nodes(node):
        if inside and isinstance(child, ast.comprehension):
            continue
        found |= {name for name in _stored(child) if not inside or any(_walrus(child, name))}
    return found


def _walrus(node: ast.AST, name: str) -> Iterator[bool]:
    """Whether an assignment expression binds the name: it does so in the scope around."""
    for each in ast.walk(node):
        if isinstance(each, ast.NamedExpr) and each.target.id == name:
            yield True

"""What a call makes known: the specs that it makes, and what it hands to a function."""

import ast

from service.singlefile.evaluate import Evaluator
from service.singlefile.objects import OPEN, is_replace, is_spec
from service.singlefile.program import Definition, ExportError, External, Meaning
from service.singlefile.values import Const
from service.singlefile.walker import Walker
from service.singlefile.world import COMPUTED, is_known_class, qualname_of


def note_call(walk: Walker, meaning: Meaning, node: ast.Call) -> None:
    """Take in what a call makes, or hands to a function."""
    if isinstance(meaning, External) and is_replace(meaning):
        _note_replaced(walk, node)
    if not isinstance(meaning, Definition):
        return
    if is_known_class(meaning):
        _note_made(walk, meaning, node)
    elif isinstance(meaning.node, ast.FunctionDef):
        _note_handed(walk, meaning, meaning.node.args, node)


def _note_made(walk: Walker, meaning: Definition, node: ast.Call) -> None:
    if walk.module.name == COMPUTED:
        return
    world, owner = walk.world, meaning.qualname
    given = {keyword.arg for keyword in node.keywords}
    world.made.add(owner)
    world.reads |= {(owner, name) for name in given if name}
    assert isinstance(meaning.node, ast.ClassDef)
    for each in meaning.node.body:
        match each:
            case ast.AnnAssign(target=ast.Name(id=name)) if name not in given:
                world.wanted_defaults.add((owner, name))
    objects = walk.evaluator.built(meaning, node)
    if objects is None:
        world.open_classes.add(owner)
    else:
        world.learn(objects)


def _note_replaced(walk: Walker, node: ast.Call) -> None:
    world = walk.world
    base = walk.evaluator.value(node.args[0])
    owners = {
        qualname_of(type(atom.value))
        for atom in base or ()
        if isinstance(atom, Const) and is_spec(atom.value)
    }
    if not owners:
        return  # no spec: wherever those are replaced, it is known that they are
    given = {keyword.arg for keyword in node.keywords if keyword.arg}
    world.reads |= {(owner, name) for owner in owners for name in given}
    objects, unknown = walk.evaluator.replaced(node)
    world.learn(objects)
    if OPEN in unknown:
        world.open_classes |= owners
    world.open_fields |= {(owner, name) for owner in owners for name in unknown}


def _note_handed(walk: Walker, meaning: Definition, args: ast.arguments, node: ast.Call) -> None:
    """Join what is handed to each parameter with what other calls hand to it."""
    name = meaning.qualname
    is_starred = any(isinstance(part, ast.Starred) for part in node.args)
    if is_starred or any(keyword.arg is None for keyword in node.keywords):
        walk.world.handed_on.add(name)
        return
    positional = [*args.posonlyargs, *args.args]
    names = [each.arg for each in positional]
    given: dict[str, ast.expr] = dict(zip(names, node.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    defaults: dict[str, ast.expr] = dict(zip(names[::-1], args.defaults[::-1], strict=False))
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if default is not None:
            defaults[argument.arg] = default
    there = Evaluator(walk.world, meaning.module)
    for argument in (*positional, *args.kwonlyargs):
        if argument.arg in given:
            value = walk.evaluator.value(given[argument.arg])
        elif argument.arg in defaults:
            value = there.value(defaults[argument.arg])
        else:
            raise ExportError(f"{walk.definition.qualname}: {argument.arg} is not given to {name}")
        walk.world.hand(name, argument.arg, value)

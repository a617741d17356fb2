"""What a call makes known: the specs that it makes."""

import ast
from collections.abc import Mapping
from dataclasses import replace

from service.singlefile.objects import OPEN, is_replace, owner_of
from service.singlefile.program import Definition, ExportError, External, Meaning
from service.singlefile.walker import Walker
from service.singlefile.world import COMPUTED, is_known_class


def note_call(walk: Walker, meaning: Meaning, node: ast.Call) -> None:
    """Take in the specs that a call makes."""
    if isinstance(meaning, External) and is_replace(meaning):
        _note_replaced(walk, node)
    elif isinstance(meaning, Definition) and is_known_class(meaning):
        _note_made(walk, meaning, node)


def _note_made(walk: Walker, meaning: Definition, node: ast.Call) -> None:
    if walk.module.name == COMPUTED:
        return
    world, owner = walk.world, meaning.qualname
    given = {keyword.arg for keyword in node.keywords}
    assert isinstance(meaning.node, ast.ClassDef)
    defaults: dict[str | None, ast.expr | None] = {}
    for each in meaning.node.body:
        match each:
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if name not in given:
                world.wanted_defaults.add((owner, name))
                defaults[name] = value
    made = None if node.args or None in given else _made_like(walk, owner, defaults)
    if made is not None:
        world.learn([made])
        world.open_fields |= {(owner, name) for name in given if name is not None}
        return
    world.make(meaning)
    world.open_classes.add(owner)


def _made_like(
    walk: Walker, owner: str, defaults: Mapping[str | None, ast.expr | None]
) -> object | None:
    """Return an object that is known with the fields that a call leaves out at their defaults;
    None where that does not tell what the call makes."""
    known = sorted((const.value for const in walk.world.known.get(owner, ())), key=repr)
    try:
        plain = {name: ast.literal_eval(value) for name, value in defaults.items() if name}  # type: ignore[arg-type]
        return replace(known[0], **plain) if known else None
    except ValueError:  # no literal, or at odds with the rest
        return None


def _note_replaced(walk: Walker, node: ast.Call) -> None:
    world = walk.world
    base = walk.evaluator.value(node.args[0])
    if base is None:
        _note_replaced_in_any(walk, node)
        return
    owners = {owner for atom in base if (owner := owner_of(atom)) in world.known}
    if not owners:
        return  # an object that holds what its annotations say
    objects, unknown = walk.evaluator.replaced(node)
    world.learn(objects)
    if OPEN in unknown:
        world.open_classes |= owners
    world.open_fields |= {(owner, name) for owner in owners for name in unknown}


def _note_replaced_in_any(walk: Walker, node: ast.Call) -> None:
    """What is replaced in an unknown object is unknown in every spec that has such fields."""
    given = {keyword.arg for keyword in node.keywords}
    if None in given:
        raise ExportError(f"{walk.definition.qualname}: {ast.unparse(node)} may change any spec")
    for owner, objects in walk.world.known.items():
        names = given.intersection(*(each.value.__dataclass_fields__ for each in objects))
        walk.world.open_fields |= {(owner, name) for name in names if name is not None}

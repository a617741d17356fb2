"""From the live code's root to the text of one file.

The walk over all live definitions is repeated until it finds nothing new; only then is the text
taken, so that what is cut was cut by all that is known.
"""

import ast
import re
import sys
from typing import Final

from service.singlefile.edits import Page, indented
from service.singlefile.names import check_names, new_names
from service.singlefile.packages import packages_of
from service.singlefile.program import (
    GUARDED,
    Definition,
    ExportError,
    External,
    Module,
    in_order,
    read_module,
)
from service.singlefile.spell import Speller
from service.singlefile.statements import walk_function
from service.singlefile.types import annotate
from service.singlefile.walk import Walk, class_keys
from service.singlefile.world import World, bases_of, definition_of, is_known_class, is_protocol
from trainer.specs.model import ModelSpec
from trainer.specs.task import FinalTask, TrainTask

ROOT: Final = "service.singlefile.driver"
RECIPE: Final = "service.singlefile.recipe"
# Whose methods nobody outside calls by name.
_PLAIN_BASES: Final = {"Exception", "Protocol", "Generic"}
_MAX_ROUNDS: Final = 60
_HEAD: Final = '''\
"""Train one model, finalize it and score what was written: `python train_gpt.py --data DIR`.

Under torchrun with several workers. `--score WEIGHTS` only scores a weights file. Cut out of
Fairway's trainer: what its recipe, TRAIN and FINAL below, does not reach is not here.
"""

from __future__ import annotations

'''
# Remarks to the tools that check the trainer.
_ASIDE: Final = re.compile(
    r"  # (type: ignore\[[\w-]+\]|pyright: ignore\[\w+\]|noqa: \w+|fmt: skip)( \([^)\n]*\))?"
)


class Cut:
    """The live code of a recipe, and its text."""

    def __init__(
        self, train: TrainTask, final: FinalTask, world_size: int, root: str = ROOT
    ) -> None:
        """`root` is the module whose `main` is live."""
        self.world = World(train, final)
        self.recipe = {"TRAIN": train, "FINAL": final, "WORLD_SIZE": world_size}
        self.packages = packages_of(final.final)
        self.renamed: dict[str, str] = {}
        self.pages: dict[str, Page] = {}
        self.root = root
        self.world.live[f"{root}:main"] = read_module(root).definitions["main"]
        for name in self.recipe:
            self.world.live[f"{RECIPE}:{name}"] = read_module(RECIPE).definitions[name]
        self._settle()
        self.world.is_patient = False  # what still waits is taken as it is
        self._settle()
        self._check_models()
        self.renamed = new_names(self.world)
        self._round()

    def _settle(self) -> None:
        for _ in range(_MAX_ROUNDS):
            before = self.world.measure()
            self._round()
            if self.world.measure() == before:
                return
        raise ExportError(f"{self.root}: the walk over the code does not settle")

    def _check_models(self) -> None:
        """ExportError for a model whose blueprint is not among those computed beforehand."""
        opened = self.world.open_classes | {owner for owner, _ in self.world.open_fields}
        for owner in sorted(opened):
            if owner.startswith(ModelSpec.__module__):
                raise ExportError(f"{owner}: running code makes or changes it; only data may")

    def _round(self) -> None:
        """Walk over everything that is live, until no definition is left that was not walked."""
        self.pages = {}
        walked: set[str] = set()
        for owner in [*self.world.known]:
            self.world.live.setdefault(owner, definition_of(owner))
        while waiting := [name for name in self.world.live if name not in walked]:
            for name in waiting:
                walked.add(name)
                self._walk(self.world.live[name])

    def _walk(self, definition: Definition) -> None:
        module = definition.module
        page = self.pages.setdefault(module.name, Page(module.text))
        walk = Walk(self.world, definition, page, self.renamed)
        node = definition.node
        if isinstance(node, ast.FunctionDef):
            walk_function(walk, node)
        elif isinstance(node, ast.ClassDef):
            self._walk_class(walk, node)
        elif isinstance(node, ast.Expr):
            walk.expression(node)
        elif module.name != RECIPE:
            _walk_assignment(walk, node)
        for each in module.registered.get(definition.name, ()):
            walk.need(each)
        new = self.renamed.get(definition.qualname)
        if new is not None:
            _rename(page, node, new)

    def _walk_class(self, walk: Walk, node: ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            walk.expression(decorator)
        for base in node.bases:
            walk.classes(base.value if isinstance(base, ast.Subscript) else base)
            if isinstance(base, ast.Subscript):
                annotate(walk, base.slice)
        keeps_all = _keeps_methods(walk.definition)
        going: list[int] = []
        walk.scopes.append(set())
        for index, part in enumerate(node.body):
            match part:
                case ast.FunctionDef():
                    if keeps_all or self._is_called(walk.definition, part.name):
                        method = Walk(self.world, walk.definition, walk.page, self.renamed, part)
                        walk_function(method, part)
                    else:
                        going.append(index)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    self._walk_field(walk, part, name)
                case ast.Assign(value=value):
                    walk.expression(value)
                case ast.Expr() | ast.Pass():
                    pass
                case _:
                    raise ExportError(
                        f"{walk.definition.qualname}: the exporter does not follow "
                        f"`{ast.unparse(part).splitlines()[0]}` in a class"
                    )
        walk.scopes.pop()
        _cut_parts(walk, node, going)

    def _is_called(self, definition: Definition, name: str) -> bool:
        if name == "__post_init__":  # what a spec checks was checked when it was written down
            return not is_known_class(definition)
        return name.startswith("__") or name in self.world.names

    def _walk_field(self, walk: Walk, node: ast.AnnAssign, name: str) -> None:
        annotate(walk, node.annotation)
        if node.value is None:
            return
        owner = walk.definition.qualname
        if (
            is_known_class(walk.definition)
            and not _is_plain(node.value)
            and (owner, name) not in self.world.wanted_defaults
        ):
            walk.page.replace(walk.text.span(node.annotation)[1], walk.text.span(node.value)[1])
            return
        walk.expression(node.value)

    def default_of(self, owner: str, name: str) -> ast.expr | None:
        """The default that a spec's field keeps."""
        definition = definition_of(owner)
        assert isinstance(definition.node, ast.ClassDef)
        for node in definition.node.body:
            match node:
                case ast.AnnAssign(target=ast.Name(id=target), value=value) if target == name:
                    return value if value is not None and _is_plain(value) else None
        return None

    def name_of(self, owner: str) -> str:
        return self.renamed.get(owner, owner.partition(":")[2])

    def text(self) -> str:
        """Return the single file's source; ExportError if a name in it means nothing."""
        parts = [self._head()]
        said: set[str] = set()
        for module in in_order(self.root):
            self._check_effects(module)
            own = sorted(
                (d for d in self.world.live.values() if d.module is module), key=lambda d: d.lines
            )
            own = [d for d in own if self.name_of(d.qualname) not in said]
            said |= {self.name_of(d.qualname) for d in own}
            if not own:
                continue
            parts.append(_banner(module))
            text = "".join(
                _gap(before, definition) + self._text_of(definition).strip("\n")
                for before, definition in zip([None, *own], own, strict=False)
            )
            parts.append(self._behind_guard(module, text) if module.guarded else text)
        source = "".join(parts)
        source += '\n\n\nif __name__ == "__main__":\n    raise SystemExit(main())\n'
        source = _ASIDE.sub("", source)
        check_names(source)
        return source

    def _behind_guard(self, module: Module, text: str) -> str:
        """Return definitions that are there only where what they need can be imported."""
        lines = [
            line
            for node in module.guarded
            for line in ast.unparse(_used(node, self.world.externals)).splitlines()
        ]
        imports = "".join(f"    {line}\n" for line in lines)
        return (
            f"\n\ntry:\n{imports}except ImportError:\n"
            f"    pass  # what follows is called only where it is installed\nelse:"
            f"{indented(text)}"
        )

    def _text_of(self, definition: Definition) -> str:
        module = definition.module
        if module.name == RECIPE:
            speller = Speller(self.name_of, self.default_of)
            return f"{definition.name} = {speller.spell(self.recipe[definition.name])}"
        page, text = self.pages[module.name], module.text
        first, last = definition.lines
        return page.render(text.line_start(first), text.line_start(last + 1))

    def _head(self) -> str:
        plain: set[str] = set()
        parts: dict[str, set[str]] = {}
        bound: dict[str, External] = {}
        for external in self.world.externals:
            top = external.module.partition(".")[0]
            if top in GUARDED:
                continue  # imported beside what needs it
            if bound.setdefault(external.bound, external) != external:
                raise ExportError(f"{external.bound}: two imports bind it")
            if top not in self.packages and top not in sys.stdlib_module_names:
                raise ExportError(f"{external.module}: the single file would need this package")
            if external.name is None:
                is_same = external.bound == external.module.partition(".")[0]
                ending = "" if is_same else f" as {external.bound}"
                plain.add(f"import {external.module}{ending}")
            else:
                is_same = external.name == external.bound
                ending = "" if is_same else f" as {external.bound}"
                parts.setdefault(external.module, set()).add(f"{external.name}{ending}")
        lines = sorted(plain, key=lambda line: line.split()[1])
        for name in sorted(parts):
            lines.append(f"from {name} import {', '.join(sorted(parts[name]))}")
        return _HEAD + "\n".join(lines)

    def _check_effects(self, module: Module) -> None:
        """ExportError for a statement of a module that may act on what is live, or on a library."""
        live = {d.name for d in self.world.live.values() if d.module is module}
        for effect in module.effects:
            names = {n.id for n in ast.walk(effect) if isinstance(n, ast.Name)}
            if names & live or not _acts_on_ours(module, effect):
                raise ExportError(
                    f"{module.name}, line {effect.lineno}: `{ast.unparse(effect).splitlines()[0]}` "
                    "cannot be cut out; do it in a function"
                )


def _acts_on_ours(module: Module, effect: ast.stmt) -> bool:
    """Whether a statement does nothing but set up a definition of its module."""
    match effect:
        case ast.For(body=body, orelse=[]):
            return all(_acts_on_ours(module, each) for each in body)
        case ast.Expr(value=ast.Call(func=ast.Attribute() as target)):
            pass
        case ast.Assign(targets=[ast.Attribute() as target]):
            pass
        case _:
            return False
    top: ast.expr = target
    while isinstance(top, ast.Attribute):
        top = top.value
    return isinstance(top, ast.Name) and top.id in module.definitions


def _is_plain(node: ast.expr) -> bool:
    """Whether a default is a literal."""
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _keeps_methods(definition: Definition) -> bool:
    """Whether something outside may call a class's methods: what it derives from."""
    if is_protocol(definition):
        return True
    for base in bases_of(definition):
        if isinstance(base, Definition):
            if _keeps_methods(base):
                return True
        elif isinstance(base, External) and base.name not in _PLAIN_BASES:
            return True
    return False


def _cut_parts(walk: Walk, node: ast.ClassDef, going: list[int]) -> None:
    """Take fields and methods out of a class, with docstrings and the blank lines before them."""
    is_empty = all(
        index in going or (isinstance(part, ast.Expr) and index - 1 in going)
        for index, part in enumerate(node.body)
    )
    for index in going:
        part = node.body[index]
        first, last = walk.text.lines_of(part)
        match part, node.body[index + 1 : index + 2]:
            case ast.AnnAssign(), [ast.Expr(value=ast.Constant(value=str())) as said]:
                last = said.end_lineno or last
        while first > 1 and not walk.text.line(first - 1).strip():
            first -= 1
        is_last = is_empty and index == going[-1]
        walk.page.cut_lines(first, last, " " * part.col_offset + "pass\n" if is_last else "")


def _walk_assignment(walk: Walk, node: ast.Assign | ast.AnnAssign) -> None:
    if isinstance(node, ast.AnnAssign):
        annotate(walk, node.annotation)
    if walk.definition.is_alias and node.value is not None:
        annotate(walk, node.value)
        return
    keys = class_keys(walk.world, walk.definition)
    if keys is None or walk.definition.qualname in walk.world.handed_on:
        walk.expression(node.value)
        return
    assert isinstance(node.value, ast.Dict)
    pieces: list[str | tuple[int, int]] = []
    for key, value in zip(node.value.keys, node.value.values, strict=True):
        assert key is not None
        meaning = walk.meaning(key)
        assert isinstance(meaning, Definition)
        if walk.evaluator.objects_of(meaning) == frozenset():
            continue
        pieces += [", ", walk.text.span(key), ": ", walk.text.span(value)]
        walk.need(meaning)
        walk.rename(key, meaning)
        walk.expression(value)
    walk.page.replace(*walk.text.span(node.value), "{", *pieces[1:], "}")


def _used(node: ast.stmt, externals: set[External]) -> ast.stmt:
    """Return an import without the names that nothing live reads."""
    assert isinstance(node, ast.Import | ast.ImportFrom)
    bound = {each.bound for each in externals}
    names = [each for each in node.names if (each.asname or each.name.partition(".")[0]) in bound]
    if isinstance(node, ast.Import):
        return ast.Import(names)
    return ast.ImportFrom(node.module, names, 0)


def _rename(page: Page, node: ast.stmt, new: str) -> None:
    """Give a definition its new name where it is defined."""
    text = page.text
    if isinstance(node, ast.Expr):
        return  # it binds nothing
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        word = "def " if isinstance(node, ast.FunctionDef) else "class "
        start = text.at(node.lineno, node.col_offset) + len(word)
        page.replace(start, start + len(node.name), new)
        return
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target  # type: ignore[attr-defined]
    page.replace(*text.span(target), new)


def _gap(before: Definition | None, after: Definition) -> str:
    """The blank lines between two definitions: as they were, if both are assignments."""
    pair = [each.node for each in (before, after) if each is not None]
    if before is None or not all(isinstance(node, ast.Assign | ast.AnnAssign) for node in pair):
        return "\n\n\n"
    return "\n" if before.lines[1] + 1 == after.lines[0] else "\n\n"


def _banner(module: Module) -> str:
    said = (ast.get_docstring(module.tree) or "").strip()
    lines = [f"# === {module.name}", *(f"# {line}".rstrip() for line in said.splitlines())]
    return "\n\n\n" + "\n".join(lines)

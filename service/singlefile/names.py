"""What definitions are called in one file, and whether every name of it means something."""

import ast
import builtins
import symtable

from service.singlefile.program import Definition, ExportError
from service.singlefile.world import World, is_class


def new_names(world: World) -> dict[str, str]:
    """Return new names for definitions that would be called alike, or like something else."""
    groups: dict[str, list[Definition]] = {}
    for definition in world.live.values():
        groups.setdefault(definition.name, []).append(definition)
    taken = set(groups) | {external.bound for external in world.externals} | set(dir(builtins))
    imported = {external.bound for external in world.externals} | set(dir(builtins))
    renamed: dict[str, str] = {}
    for name, group in sorted(groups.items()):
        alike: dict[str, list[Definition]] = {}
        for definition in sorted(group, key=_rank):
            # One assignment is as good as another that says the same.
            is_value = isinstance(definition.node, ast.Assign | ast.AnnAssign)
            text = ast.unparse(definition.node) if is_value else definition.qualname
            alike.setdefault(text, []).append(definition)
        ordered = sorted(alike.values(), key=lambda same: -len(same))
        for same in ordered if name in imported else ordered[1:]:
            new = _suffixed(same[0])
            if new in taken:
                raise ExportError(f"{same[0].qualname}: no name is left for it but {new}")
            taken.add(new)
            renamed |= {definition.qualname: new for definition in same}
    return renamed


def _rank(definition: Definition) -> tuple[bool, str]:
    """A part keeps its name before the spec that configures it."""
    return ".specs." in definition.module.name, definition.module.name


def _suffixed(definition: Definition) -> str:
    if not is_class(definition):
        return f"{definition.name}_{definition.module.short}"
    if ".specs." in definition.module.name:
        return f"{definition.name}Spec"
    return definition.module.short.title().replace("_", "") + definition.name


def check_names(source: str) -> None:
    """Raise ExportError for a name that nothing in the file binds."""
    try:
        compile(source, "train_gpt.py", "exec")
    except SyntaxError as error:
        raise ExportError(f"train_gpt.py, line {error.lineno}: {error.msg}") from error
    table = symtable.symtable(source, "train_gpt.py", "exec")
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    bound |= {s.get_name() for s in table.get_symbols() if s.is_namespace()}
    bound |= set(dir(builtins)) | {"__name__", "__file__"}
    missing: set[str] = set()

    def look(scope: symtable.SymbolTable) -> None:
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced() and symbol.get_name() not in bound:
                missing.add(symbol.get_name())
        for child in scope.get_children():
            look(child)

    look(table)
    missing |= {
        s.get_name() for s in table.get_symbols() if s.is_referenced() and s.get_name() not in bound
    }
    if missing:
        raise ExportError(f"train_gpt.py: nothing defines {', '.join(sorted(missing))}")

"""A recipe as the Python that makes it."""

import ast
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

from service.singlefile.objects import is_spec
from service.singlefile.world import qualname_of

_WIDTH: Final = 84  # leaves room for the name of the field and a comma


@dataclass(frozen=True, slots=True)
class Speller:
    """Writes specs down: `name_of` a class by its qualified name, `default_of` one of its fields
    the default that it keeps."""

    name_of: Callable[[str], str]
    default_of: Callable[[str, str], ast.expr | None]

    def spell(self, value: Any, depth: int = 0) -> str:
        """Return an expression that makes a spec, without the fields that are at a default."""
        if isinstance(value, tuple):
            parts = [self.spell(part, depth + 1) for part in value]
            return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
        if not is_spec(value):
            return _quoted(repr(value))
        owner = qualname_of(type(value))
        given = [
            f"{each.name}={self.spell(part, depth + 1)}"
            for each in fields(value)
            if not self._is_default(owner, each.name, part := getattr(value, each.name))
        ]
        name = self.name_of(owner)
        line = f"{name}({', '.join(given)})"
        if "\n" not in line and len(line) + 4 * depth <= _WIDTH:
            return line
        gap = "    " * (depth + 1)
        lines = "".join(f"{gap}{part},\n" for part in given)
        return f"{name}(\n{lines}{'    ' * depth})"

    def _is_default(self, owner: str, name: str, value: Any) -> bool:
        default = self.default_of(owner, name)
        # By their text: 1, 1.0 and True are equal.
        return default is not None and repr(ast.literal_eval(default)) == repr(value)


def _quoted(text: str) -> str:
    is_simple = text.startswith("'") and '"' not in text
    return f'"{text[1:-1]}"' if is_simple else text

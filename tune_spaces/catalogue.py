"""The recipes and sweeps that ship with Fairway, by name."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.codec import read_recipe, suggest
from trainer.errors import UsageError


def _folder(kind: str) -> Path:
    return Path(str(files("tune_spaces"))) / kind


def names(kind: str) -> list[str]:
    """Names of the shipped files of a kind: recipes or sweeps."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def find(kind: str, name_or_path: str, where: str) -> Path:
    """Return the file of a shipped name, or the given path if it is one."""
    shipped = _folder(kind) / f"{name_or_path}.yaml"
    if "/" not in name_or_path and shipped.is_file():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    hint = suggest(name_or_path, names(kind))
    raise UsageError(f"{where}: no {kind.removesuffix('s')} {name_or_path!r}{hint}")


def load_recipe(name_or_path: str, where: str) -> dict[str, Any]:
    """Read a recipe by shipped name or path as plain data, everything it extends merged in."""
    return read_recipe(find("recipes", name_or_path, where))


def describe(name: str) -> str:
    """The comment that opens a shipped recipe: its card."""
    card: list[str] = []
    for line in (_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        card.append(line.removeprefix("#").strip())
    return " ".join(card)

"""The recipes and sweeps that ship with Fairway, by name, and the cards of the recipes."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.codec import read_recipe, suggest
from trainer.errors import UsageError

CARD_BULLETS = ("source", "claim", "found", "legal", "forecast", "parameters")


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
    """The first line of a shipped recipe, a comment: what it is."""
    text = (_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("#").strip()


def cards() -> dict[str, dict[str, str]]:
    """The cards in recipes/README.md: recipe name to bullet name to text.

    A card is a second-level heading, one recipe or several with commas between, and bullets
    `* Name: text`.
    """
    text = (_folder("recipes") / "README.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return {
        name: _bullets(body)
        for heading, body in zip(sections[::2], sections[1::2], strict=True)
        for name in heading.split(", ")
    }


def card(name: str) -> dict[str, str]:
    """The card of a shipped recipe; UsageError where it has none or one lacks a bullet."""
    bullets = cards().get(name, {})
    missing = [bullet for bullet in CARD_BULLETS if not bullets.get(bullet)]
    if missing:
        raise UsageError(
            f"{_folder('recipes') / 'README.md'}: the card of {name} has no {', '.join(missing)}; "
            f"write `## {name}` with the bullets of the other cards"
        )
    return bullets


def _bullets(body: str) -> dict[str, str]:
    found = re.findall(r"^\* (\w+): (.+\n(?:  .+\n)*)", body, flags=re.MULTILINE)
    return {name.lower(): " ".join(text.split()) for name, text in found}

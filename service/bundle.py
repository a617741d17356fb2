"""A sweep file as it travels to a service: its text, and the local files that it names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.baselines import KIND as BASELINES
from trainer.codec import read_mapping, read_recipe, to_yaml
from trainer.errors import UsageError
from tune_spaces.catalogue import find, names


@dataclass(frozen=True, slots=True)
class Bundle:
    """YAML text of a sweep, and of each file that it names, by file name."""

    sweep: str
    files: dict[str, str] = field(default_factory=dict[str, str])


def read_bundle(sweep: str | Path) -> Bundle:
    """Read a sweep file, or a shipped one by name, with what it names on this machine.

    A recipe goes with everything it extends merged in. Names of shipped recipes and baselines stay
    names; any other path becomes the name of a file in the bundle. UsageError where a named file
    is missing, or two of one name are named.
    """
    path = find("sweeps", str(sweep), "fairway")
    data = read_mapping(path)
    files: dict[str, str] = {}
    renamed = dict(data)
    if name := _local(data.get("recipe"), "recipes"):
        where = f"{path}: recipe"
        source = find("recipes", name, where)
        renamed["recipe"] = _add(files, source, to_yaml(read_recipe(source)), where)
    if name := data.get("clocks"):
        renamed["clocks"] = _add_text(files, Path(str(name)), f"{path}: clocks")
    gate = data.get("gate")
    name = _local(gate.get("baseline"), BASELINES) if isinstance(gate, dict) else None
    if name and name.endswith((".yaml", ".yml")):  # else it is a sweep of the service
        named = _add_text(files, Path(name), f"{path}: gate.baseline")
        renamed["gate"] = {**data["gate"], "baseline": named}
    text = path.read_text(encoding="utf-8") if renamed == data else to_yaml(renamed)
    return Bundle(text, files)


def _local(name: Any, kind: str) -> str | None:
    """The name of a file of this machine, None for a shipped name or what is none."""
    is_local = isinstance(name, str) and ("/" in name or name not in names(kind))
    return name if is_local else None


def _add_text(files: dict[str, str], source: Path, where: str) -> str:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: {source} is not a readable text file") from error
    return _add(files, source, text, where)


def _add(files: dict[str, str], source: Path, text: str, where: str) -> str:
    name = f"{source.stem}.yaml"
    if files.setdefault(name, text) != text:
        raise UsageError(f"{where}: two files are named {name}; rename one of them")
    return name

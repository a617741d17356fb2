"""The folder that an import leaves: what it holds, and whose it is.

    DIR/import.json    what was imported: sha256 of the file, fingerprint of the recipe
    DIR/recipe.yaml    the recipe it was imported with, in full
    DIR/bank/          a state dict: entry `raw`, float32, as a training leaves it
    DIR/weights.fw     a quantized file: its integers, scales and floats, as an artifact

docs/import.md describes it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trainer.codec import fingerprint, parse, read_recipe, to_yaml
from trainer.errors import DataError, UsageError
from trainer.finalize.artifact import write_weights
from trainer.finalize.pipeline import WEIGHTS_FILE
from trainer.finalize.stored import Quantized, Stored, restore
from trainer.importer.fitting import fit
from trainer.importer.formats import PublicFile, read_public
from trainer.importer.unseen import unseen
from trainer.protocol import SPEC_VERSION, UNKNOWN_TOKENIZER
from trainer.runtime.files import read_json, write_json, write_text
from trainer.runtime.tensors import load_tensors, save_tensors
from trainer.specs.final import Zstd
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe

ENTRY: Final = "raw"
_AGAIN = "import the file again"
# What our own write of import.json leaves when it is killed.
_LEFTOVER = re.compile(r"\.import\.json\.\d+\.tmp")


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import made, and where: `path` is the folder.

    `bytes` are those of the bank's entry or of the weights file; `assumed` is what no tensor tells.
    """

    kind: str  # bank | artifact
    form: str
    path: str
    tensors: int
    integer_tensors: int
    parameters: int
    bytes: int
    assumed: dict[str, Any] = field(default_factory=dict)


def import_file(source: Path, recipe: Recipe, folder: Path) -> Imported:
    """Bring a public script's file in: a state dict as a bank, a quantized file as an artifact.

    Nothing is written unless everything fits. UsageError when the folder holds anything but the
    same import, or cannot be written.
    """
    file = read_public(source)
    model = recipe.model.exported() if file.is_quantized else recipe.model
    stored = fit(file, model, str(source))
    try:
        _claim(folder, file, recipe)
        path = _write(folder, file, recipe, stored)
        num_bytes = path.stat().st_size
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{folder}: {reason}; name another folder with -o") from error
    return Imported(
        kind="artifact" if file.is_quantized else "bank",
        form=file.form,
        path=str(folder),
        tensors=len(stored),
        integer_tensors=sum(isinstance(part, Quantized) for part in stored.values()),
        parameters=_num_parameters(stored),
        bytes=num_bytes,
        assumed=unseen(model),
    )


def _write(folder: Path, file: PublicFile, recipe: Recipe, stored: dict[str, Stored]) -> Path:
    """Write the recipe and the tensors; return the file that the tensors are in."""
    write_text(folder / "recipe.yaml", to_yaml(recipe))
    if file.is_quantized:
        path = folder / WEIGHTS_FILE
        write_weights(path, recipe.model.exported(), stored, Zstd(), UNKNOWN_TOKENIZER)
    else:
        path = folder / "bank" / f"{ENTRY}.pt"
        save_tensors(path.parent, {ENTRY: {name: restore(part) for name, part in stored.items()}})
    return path


def is_imported_bank(folder: Path) -> bool:
    """Whether an import has been here that left, or was to leave, a bank."""
    return (folder / "import.json").is_file() and not (folder / WEIGHTS_FILE).is_file()


def load_bank(folder: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """Read back an imported state dict: its model and its float32 state.

    DataError if it is altered or the import was cut short.
    """
    path = folder / "recipe.yaml"
    if not path.is_file() or not (folder / "bank" / "index.json").is_file():
        raise DataError(f"{folder}: the import was cut short; {_AGAIN}")
    recipe = parse(Recipe, read_recipe(path), str(path))
    identity = read_json(folder / "import.json")
    if not isinstance(identity, dict) or identity.get("recipe") != fingerprint(recipe):
        raise DataError(f"{path}: altered since the import, or read by another version; {_AGAIN}")
    try:
        return recipe.model, load_tensors(folder / "bank", ENTRY)
    except DataError as error:
        raise DataError(f"{str(error).rpartition(';')[0] or error}; {_AGAIN}") from error


def _claim(folder: Path, file: PublicFile, recipe: Recipe) -> None:
    """Make the folder this import's. What an import that was cut short left is its own."""
    identity = {
        "spec_version": SPEC_VERSION,
        "source_sha256": file.sha256,
        "recipe": fingerprint(recipe),
    }
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file; name a new folder with -o")
    is_used = folder.is_dir() and any(
        _LEFTOVER.fullmatch(entry.name) is None for entry in folder.iterdir()
    )
    if is_used and _identity(folder) != identity:
        raise UsageError(
            f"{folder}: holds something else than this import; name a new folder with -o"
        )
    write_json(folder / "import.json", identity)


def _identity(folder: Path) -> Any:
    """What the folder says it holds; None where it says nothing that can be read."""
    path = folder / "import.json"
    try:
        return read_json(path) if path.is_file() else None
    except DataError:
        return None


def _num_parameters(stored: Mapping[str, Stored]) -> int:
    return sum(
        (part.q if isinstance(part, Quantized) else part.tensor).numel() for part in stored.values()
    )

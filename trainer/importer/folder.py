"""The folder that an import leaves: what it holds, and whose it is.

    DIR/import.json    what was imported: sha256 of the file, fingerprint of the recipe
    DIR/recipe.yaml    the recipe it was imported with, in full
    DIR/bank/          a state dict: entry `raw`, float32, as a training leaves it
    DIR/weights.fw     a quantized file: its integers, scales and floats, as an artifact

docs/import.md describes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trainer.codec import fingerprint, parse, read_recipe, to_yaml
from trainer.errors import DataError, UsageError
from trainer.finalize.artifact import write_weights
from trainer.finalize.quantize import Quantized, Stored, restore
from trainer.importer.fitting import fit
from trainer.importer.formats import PublicFile, read_public
from trainer.protocol import SPEC_VERSION, UNKNOWN_TOKENIZER
from trainer.runtime.files import read_json, write_json, write_text
from trainer.runtime.tensors import load_tensors, save_tensors
from trainer.specs.final import Zstd
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe

WEIGHTS_FILE: Final = "weights.fw"
ENTRY: Final = "raw"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import made. `bytes` are those of the bank's entry or of the weights file."""

    kind: str  # bank | artifact
    form: str
    path: str
    tensors: int
    integer_tensors: int
    parameters: int
    bytes: int


def import_file(source: Path, recipe: Recipe, folder: Path) -> Imported:
    """Bring a public script's file in: a state dict as a bank, a quantized file as an artifact.

    Nothing is written unless everything fits. UsageError when the folder holds anything but the
    same import.
    """
    file = read_public(source)
    model = recipe.model.exported() if file.is_quantized else recipe.model
    stored = fit(file, model, str(source))
    _claim(folder, file, recipe)
    write_text(folder / "recipe.yaml", to_yaml(recipe))
    if file.is_quantized:
        path = folder / WEIGHTS_FILE
        write_weights(path, model, stored, Zstd(), UNKNOWN_TOKENIZER)
    else:
        path = folder / "bank" / f"{ENTRY}.pt"
        save_tensors(path.parent, {ENTRY: {name: restore(part) for name, part in stored.items()}})
    return Imported(
        kind="artifact" if file.is_quantized else "bank",
        form=file.form,
        path=str(path),
        tensors=len(stored),
        integer_tensors=sum(isinstance(part, Quantized) for part in stored.values()),
        parameters=_num_parameters(stored),
        bytes=path.stat().st_size,
    )


def is_imported_bank(folder: Path) -> bool:
    """Whether an import of a state dict has been here."""
    return (folder / "import.json").is_file() and (folder / "bank").is_dir()


def load_bank(folder: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """Read back an imported state dict: its model and its float32 state. DataError if altered."""
    path = folder / "recipe.yaml"
    recipe = parse(Recipe, read_recipe(path), str(path))
    identity = read_json(folder / "import.json")
    if not isinstance(identity, dict) or identity.get("recipe") != fingerprint(recipe):
        raise DataError(f"{path}: altered since the import; import the file again")
    return recipe.model, load_tensors(folder / "bank", ENTRY)


def _claim(folder: Path, file: PublicFile, recipe: Recipe) -> None:
    """Make the folder this import's. What an import that was cut short left is its own."""
    identity = {
        "spec_version": SPEC_VERSION,
        "source_sha256": file.sha256,
        "recipe": fingerprint(recipe),
    }
    path = folder / "import.json"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file; name a new folder with -o")
    is_used = folder.is_dir() and any(folder.iterdir())
    if is_used and not (path.is_file() and read_json(path) == identity):
        raise UsageError(
            f"{folder}: holds something else than this import; name a new folder with -o"
        )
    write_json(path, identity)


def _num_parameters(stored: Mapping[str, Stored]) -> int:
    return sum(
        (part.q if isinstance(part, Quantized) else part.tensor).numel() for part in stored.values()
    )

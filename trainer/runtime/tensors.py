"""Tensor files with a checksum of our own: a bit flip loads silently everywhere else."""

import io
from pathlib import Path
from typing import Any

import torch

from trainer.errors import DataError
from trainer.runtime.files import read_json, sha256_file, write_bytes, write_json


def save_tensors(folder: Path, files: dict[str, Any]) -> None:
    """Write each value as `<name>.pt` (tensors, numbers and containers only), then index.json.

    The index holds every file's sha256 and is written last: a folder without one is not whole.
    """
    index = {}
    for name, value in files.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        write_bytes(folder / f"{name}.pt", buffer.getvalue())
        index[name] = sha256_file(folder / f"{name}.pt")
    write_json(folder / "index.json", index)


def saved_names(folder: Path) -> list[str]:
    """Return the names that `folder` holds, in the order they were saved."""
    return list(_index(folder))


def load_tensors(folder: Path, name: str) -> Any:
    """Read one value back onto the CPU; DataError names the file when it is missing or altered."""
    path = folder / f"{name}.pt"
    index = _index(folder)
    if name not in index:
        raise DataError(f"{folder}: holds no {name!r}, only {', '.join(index)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; remove {folder.parent} and run again")
    if sha256_file(path) != index[name]:
        raise DataError(
            f"{path}: altered since it was written (sha256 differs); remove {folder.parent} "
            "and run again"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _index(folder: Path) -> dict[str, str]:
    path = folder / "index.json"
    index = read_json(path)
    if not isinstance(index, dict) or not all(isinstance(sha, str) for sha in index.values()):
        raise DataError(
            f"{path}: not a checksum for each file; remove {folder.parent} and run again"
        )
    return index

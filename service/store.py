"""The stage store: one folder per id, done when it holds result.json. Shared by all sweeps.

Two that need the same stage do not compute it twice: the second waits on a lock file and then
finds the result. The lock is the kernel's (flock), so a killed holder frees it by dying.
"""

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.runtime.files import locked, read_json

KINDS = (
    "states",  # what trunks leave
    "trainings",
    "parities",
    "hessians",
    "artifacts",
    "ranks",  # finals scored on held-out training shards
    "fits",  # artifacts fitted to a cap
    "finals",
)


class Store:
    """Find, claim and compute stages under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, kind: str, stage_id: str) -> Path:
        """The stage's folder, whether or not it exists."""
        assert kind in KINDS
        return self.root / kind / stage_id

    def find(self, kind: str, stage_id: str) -> dict[str, Any] | None:
        """Return the result of a finished stage, None if it is not finished."""
        path = self.folder(kind, stage_id) / "result.json"
        return read_json(path) if path.is_file() else None

    @contextmanager
    def claim(self, kind: str, stage_id: str) -> Generator[Path]:
        """Hold a stage alone, waiting for whoever holds it now; yields its folder."""
        folder = self.folder(kind, stage_id)
        with locked(folder.with_name(f"{stage_id}.lock")):
            # Not before: a holder that starts over would find made what it has just removed.
            folder.mkdir(parents=True, exist_ok=True)
            yield folder

    def compute(
        self, kind: str, stage_id: str, build: Callable[[Path], object], *, resumes: bool = False
    ) -> tuple[dict[str, Any], bool]:
        """Return the stage's result and whether it was there already; else build it.

        `build` writes into the folder, result.json last. Unless it `resumes`, it starts from
        an empty folder: what an interrupted attempt left must not be counted.
        """
        with self.claim(kind, stage_id) as folder:
            found = self.find(kind, stage_id)
            if found is not None:
                return found, True
            if not resumes:
                shutil.rmtree(folder)
                folder.mkdir()
            build(folder)
            return read_json(folder / "result.json"), False

"""The code that is counted: the trainer package as one runnable zip.

Sources go in as they are: `ast.unparse` differs between Python versions, and a stripped file
would no longer be the one that was tested. What only makes data, or brings in what others
made, is no part of training or of scoring, so it is not shipped. `python code.pyz …` needs the
third-party packages only.
"""

import hashlib
import io
import zipfile
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from trainer.runtime.files import write_bytes

PACKAGE: Final = "trainer"
NOT_SHIPPED: Final = frozenset(
    f"trainer/data/{name}"
    for name in (
        "embedded", "fetch.py", "download.py", "prepare.py", "documents.py", "partition.py",
        "overlap.py", "staging.py",
    )
) | {"trainer/importer", "trainer/liveness"}  # fmt: skip
EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
MAIN: Final = b"""\
from trainer.__main__ import main

raise SystemExit(main())
"""


def code_files() -> dict[str, bytes]:
    """Return the sources that ship, by path from the package's parent, in sorted order."""
    found: dict[str, bytes] = {}
    _collect(files(PACKAGE), PACKAGE, found)
    return dict(sorted(found.items()))


def code_digest() -> str:
    """Return the sha256 over every shipped name and content."""
    digest = hashlib.sha256()
    for name, content in code_files().items():
        # Each part is hashed at a fixed length, so no two trees can spell the same bytes.
        digest.update(hashlib.sha256(name.encode()).digest())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def write_code(path: Path) -> int:
    """Write the zip, equal sources giving equal bytes, and return its size in bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"__main__.py": MAIN, **code_files()}.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3  # Unix, wherever this runs
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    write_bytes(path, buffer.getvalue())
    return len(buffer.getvalue())


def _collect(folder: Traversable, prefix: str, found: dict[str, bytes]) -> None:
    for item in folder.iterdir():
        name = f"{prefix}/{item.name}"
        if name in NOT_SHIPPED:
            continue
        if item.is_dir():
            _collect(item, name, found)
        elif name.endswith(".py"):
            found[name] = item.read_bytes()

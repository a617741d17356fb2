"""Write the requirements*.lock that the images are installed from: `make locks`, which needs uv.

The versions are those of constraints.txt. The hashes are of the wheels that an image can take,
which are CPython 3.11's on Linux x86-64 with Debian 12's glibc, and of nothing else: no source
archive is ever built in an image, and a wheel of another machine is refused by its hash. The folder
or page UV_FIND_LINKS must offer torch's CPU wheel; it is asked for the image without a GPU alone.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

DOCKER = Path(__file__).resolve().parent
ROOT = DOCKER.parent
PYTHON = (3, 11)
GLIBC_MINOR = 36
"""Debian 12's."""
OLD_NAMES = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")
CPU = "trainer-cpu"
FIND_LINKS = "UV_FIND_LINKS"
IMAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "service": (("serve", "mlflow", "postgres", "ray"), ()),
    "trainer": (("train", "mlflow", "ray", "fa4"), ()),
    CPU: (("train", "mlflow", "ray"), ("torch==2.13.0+cpu",)),
}
"""What an image is made of: extras of Fairway, and packages beside them."""


def main() -> None:
    """Write all the locks, or say in a line why not."""
    for image, (extras, beside) in IMAGES.items():
        words = [word for extra in extras for word in ("--extra", extra)]
        write_lock(image, [str(ROOT / "pyproject.toml"), *words], beside)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    write_lock("build", [], tuple(build["requires"]))


def write_lock(name: str, sources: list[str], requirements: tuple[str, ...]) -> None:
    """Resolve for the image and write DOCKER/requirements-NAME.lock."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "asked.in"), Path(folder, "pylock.toml")
        asked.write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
        options = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36"]
        options += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet"]
        options += ["--constraint", str(ROOT / "constraints.txt"), "--no-emit-package", "fairway"]
        command = ["uv", "pip", "compile", *options, "--format", "pylock.toml", "-o", str(found)]
        done = subprocess.run(
            [*command, *sources, str(asked)],
            env={k: v for k, v in os.environ.items() if k != FIND_LINKS or name == CPU},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"requirements-{name}.lock: {done.stderr.strip()}")
        packages = tomllib.loads(found.read_text(encoding="utf-8"))["packages"]
    text = "".join(_lines(packages))
    head = f"# What the image `{name}` is installed from. Do not edit: `make locks` writes it.\n"
    (DOCKER / f"requirements-{name}.lock").write_text(head + text, encoding="utf-8")


def _lines(packages: list[dict[str, Any]]) -> Iterator[str]:
    taken = frozenset(_tags())
    for package in packages:
        pin = f"{package['name']}=={package['version']}"
        hashes = sorted(set(_hashes(package, taken)))
        if not hashes:
            sys.exit(f"{pin}: no wheel that an image can take; choose another version")
        yield " \\\n    ".join([pin, *(f"--hash=sha256:{sha256}" for sha256 in hashes)]) + "\n"


def _hashes(package: dict[str, Any], taken: frozenset[Tag]) -> Iterator[str]:
    for wheel in package.get("wheels", ()):
        name = wheel.get("name") or wheel["url"].rpartition("/")[2].replace("%2B", "+")
        *_, tags = parse_wheel_filename(name)
        if tags & taken:
            yield wheel["hashes"]["sha256"]


def _tags() -> Iterator[Tag]:
    """The tags of the wheels that pip takes inside the images."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, GLIBC_MINOR + 1)]
    yield from cpython_tags(PYTHON, platforms=[*platforms, *OLD_NAMES])
    yield from compatible_tags(PYTHON, platforms=[*platforms, *OLD_NAMES])


if __name__ == "__main__":
    main()

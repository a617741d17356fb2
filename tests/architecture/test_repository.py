"""What may stand in a committed file, and how large the repository may be."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 40_000_000

# Fairway is installed from wherever the reader's pip looks: a host that is named in a file is one
# that a closed network can't reach, and a path of one machine is nowhere else.
HOSTS = (
    "pypi.org",
    "pythonhosted.org",
    "download.pytorch.org",
    "registry.npmjs.org",
    "proxy.golang.org",
    "docker.io",
    "ghcr.io",
    "quay.io",
    "nvcr.io",
)
PATHS = ("work", "root", "opt/wheels", "opt/pypi", "tmp/bash")
NAMED = re.compile(
    "|".join(re.escape(host) for host in HOSTS)
    + r"|(?<![\w.~})-])/(?:"
    + "|".join(PATHS)
    + r")(?![\w.-])"
)


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    """The files that git has, or would take."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the repository's")
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_host_or_a_path_of_one_machine(committed: list[Path]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in committed
        if path != Path(__file__).resolve()
        for number, line in enumerate(_lines(path), 1)
        if (match := NAMED.search(line))
    ]

    assert not found, "take the value from the environment or an argument:\n" + "\n".join(found)


def test_the_repository_stays_small(committed: list[Path]) -> None:
    sizes = sorted(((path.stat().st_size, path) for path in committed), reverse=True)
    largest = [f"{path.relative_to(ROOT)}: {size:,} bytes" for size, path in sizes[:5]]

    total = sum(size for size, _ in sizes)

    assert total < MAX_BYTES, f"{total:,} bytes; the largest are:\n" + "\n".join(largest)


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8", errors="replace").splitlines()

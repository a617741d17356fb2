"""The Dockerfile's own install steps, run in an empty folder: every package by its hash.

They ask a package index. Where none answers, or none has torch's CPU wheel, they are skipped.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.containers.dockerfile import ROOT, CleanRoot, commands

PYTHON = Path(sys.executable).parent
LIST = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
IMPORT = "import sys, service.cli, service.api.app, service.outbox; print('torch' in sys.modules)"

pytestmark = [
    pytest.mark.timeout(1_200),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the images have Python 3.11"),
]


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pip that reaches an index."""
    folder = tmp_path_factory.mktemp("asking")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    program = str(folder / "bin" / "pip")
    said = _refused(program, _pin("build", "pluggy"), "--retries=0", "--no-cache-dir")
    if said is not None:
        pytest.skip(f"no package index answers pip: {said}")
    return program


@pytest.fixture
def root(tmp_path: Path, pip: str) -> CleanRoot:
    """An empty root with the build stage's pip in it."""
    root = CleanRoot(tmp_path, str(PYTHON))
    root.copy("build")
    for command in commands("build"):
        root.run(command)
    return root


def test_the_services_steps_install_by_hash_and_bring_no_torch(root: CleanRoot) -> None:
    for stage in ("wheel", "packages"):
        root.copy(stage, IMAGE="service")
        for command in commands(stage):
            root.run(command)

    python = root.inside("/opt/venv/bin/python")
    fairway = root.inside("/opt/venv/bin/fairway")
    listed = root.run(f'{python} -c "{LIST}"').split()
    assert {"fairway", "mlflow", "ray"} <= set(listed)
    assert not [name for name in listed if re.match("torch|nvidia|cuda|triton|hatchling", name)]
    assert root.run(f'{python} -c "{IMPORT}"').strip() == "False"
    assert "Usage: fairway serve" in root.run(f"{fairway} serve --help")
    home = str(root.folder / "home")
    assert "warmdown_iters" in root.run(f"{fairway} validate quickstart --home {home}")


@pytest.mark.parametrize("image", ["trainer", "trainer-cpu"])
def test_a_trainers_step_finds_every_package_of_its_lock_by_hash(
    root: CleanRoot, pip: str, image: str
) -> None:
    torch = _pin(image, "torch")
    said = _refused(pip, torch) if "+cpu" in torch else None
    if said is not None:
        pytest.skip(f"no index or folder offers {torch}: {said}")
    root.copy("packages", IMAGE=image)
    (step,) = [command for command in commands("packages") if "--require-hashes" in command]

    said = root.run(step.replace(" install ", " install --dry-run "))

    (found,) = re.findall(r"^Would install (.+)$", said, re.MULTILINE)
    assert len(found.split()) == len(re.findall("^[a-z].*==", _lock(image), re.MULTILINE))
    assert f"torch-{torch.partition('==')[2]}" in found.split()


def _refused(pip: str, pin: str, *options: str) -> str | None:
    """Why pip would not install this, None where it would."""
    words = ("install", "--dry-run", "--no-deps", "--only-binary", ":all:", "--timeout=20")
    done = subprocess.run([pip, *words, *options, pin], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else None


def _pin(image: str, package: str) -> str:
    (pin,) = re.findall(rf"^{package}==[^ ]+", _lock(image), re.MULTILINE)
    return pin


def _lock(image: str) -> str:
    return (ROOT / "docker" / f"requirements-{image}.lock").read_text(encoding="utf-8")

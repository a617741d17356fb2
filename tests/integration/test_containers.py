"""The images built and the stack run for real, by podman, on a base made of this machine's Debian.

No image registry is asked. What is missing for it is said in the reason of the skip; with the
tools of `TOOLS` and as root it takes some ten minutes and 15 GB, which are given back.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "tests" / "containers"
TOOLS = ("podman", "podman-compose", "runc", "debootstrap", "tar")
PACKAGES = "buildah podman runc netavark aardvark-dns catatonit iptables debootstrap"
COPIED = (".dockerignore", "LICENSE", "README.md", "pyproject.toml", "docker", "service")
COPIED += ("trainer", "tune_spaces")
BASE, POSTGRES = "localhost/base:bookworm", "localhost/postgres:bookworm"
NOFILE = 16_384
BUILD_S, UP_S = 1_500, 900
WITHOUT_NETWORK = ("--network", "none", "--read-only", "--cap-drop", "all")

pytestmark = pytest.mark.timeout(3_600)


@dataclass(frozen=True)
class Engine:
    """Podman with a store of its own, on a copy of the tree that is a repository of its own."""

    folder: Path
    tree: Path
    commit: str
    environment: dict[str, str]

    def __call__(self, *words: str, timeout_s: float = BUILD_S) -> str:
        """Run podman, or fail with what it said."""
        return self.run("podman", *words, timeout_s=timeout_s)

    def stack(self, script: str, *words: str, timeout_s: float) -> str:
        """Run a script of docker/, as the Makefile does."""
        path = str(self.tree / "docker" / script)
        return self.run(sys.executable, path, *words, timeout_s=timeout_s)

    def run(self, *words: str, timeout_s: float) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{words[:3]}: {(done.stdout + done.stderr)[-6_000:]}"
        return done.stdout

    def facts(self) -> dict[str, str]:
        """What the stack's .env says."""
        lines = (self.tree / "docker" / ".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"no containers here: {', '.join(missing) or 'not root'}; as root, apt-get install "
            f"{PACKAGES}; pip install podman-compose"
        )
    folder = tmp_path_factory.mktemp("containers")
    tree = _copied(folder / "tree")
    commit = _committed(tree)
    engine = Engine(folder, tree, commit, {**os.environ, **_settings(folder), "PATH": _path()})
    try:
        _make_base(engine)
        yield engine
    finally:
        for words in (("stop", "--all", "--time", "5"), ("system", "reset", "--force")):
            subprocess.run(["podman", *words], env=engine.environment, capture_output=True)
        shutil.rmtree(folder / "store", ignore_errors=True)


@pytest.fixture(scope="module")
def built(engine: Engine) -> Engine:
    """The images of the CPU profile, built as `make up` builds them."""
    flags = ["--build-arg", f"BASE_IMAGE={BASE}", "--layers=false", "--network=host"]
    pip_conf = engine.folder / "pip.conf"
    lines = ["[global]"]
    if cert := os.environ.get("PIP_CERT"):
        lines.append(f"cert = {cert}")
        flags.append(f"--volume={cert}:{cert}:ro")
    if links := os.environ.get("PIP_FIND_LINKS"):
        lines.append(f"find-links = {links}")
        flags += [f"--volume={link}:{link}:ro" for link in links.split() if link[0] == "/"]
    pip_conf.write_text("\n".join(lines) + "\n")
    words = ("build", "--profile", "cpu", "--pip-conf", str(pip_conf), "--", *flags)
    engine.stack("stack.py", *words, timeout_s=BUILD_S)
    return engine


@pytest.mark.containers
@pytest.mark.parametrize(("target", "has_torch"), [("service", False), ("trainer-cpu", True)])
def test_an_image_knows_its_commit_and_has_torch_only_to_compute(
    built: Engine, target: str, has_torch: bool
) -> None:
    image = f"fairway-{target}:latest"
    (described,) = json.loads(built("image", "inspect", image))
    variables = dict(pair.split("=", 1) for pair in described["Config"]["Env"])
    ask = "import importlib.util as u; print(u.find_spec('torch') is not None)"

    run = ("run", "--rm", *WITHOUT_NETWORK, "--tmpfs=/tmp", image)

    assert built(*run, "python", "-c", ask).strip() == str(has_torch)
    assert built(*run, "id", "-u").strip() == "10001"
    assert "warmdown_iters" in built(*run, "fairway", "validate", "quickstart", "--home", "/tmp/h")
    assert described["Config"]["User"] == "10001:10001"
    assert variables["FAIRWAY_GIT_COMMIT"] == built.commit
    assert variables["FAIRWAY_GIT_DIRTY"] == "false"
    assert built(*run, "sh", "-c", 'cat "$FAIRWAY_GIT_DIFF"') == ""
    assert described["Labels"]["org.opencontainers.image.revision"] == built.commit


@pytest.mark.containers
def test_the_stack_comes_up_runs_a_sweep_and_is_shut(built: Engine) -> None:
    built(
        *("build", "--file", str(STAND_INS / "postgres.Dockerfile"), "--network=host"),
        *("--build-arg", f"BASE_IMAGE={BASE}", "--layers=false", "--tag", POSTGRES),
        str(STAND_INS),
    )

    try:
        said = built.stack("stack.py", "up", timeout_s=UP_S)
        assert "Fairway is ready at http://127.0.0.1:" in said
        seen = built.stack("smoke.py", timeout_s=UP_S)
    except BaseException:
        sys.stderr.write(_logs(built))
        raise
    finally:
        built.stack("stack.py", "down", "--volumes", timeout_s=UP_S)

    assert "ok: quickstart succeeded with 16 finals" in seen
    assert "ok: MLflow has 16 finals" in seen
    assert "not checked" not in seen
    assert not (built.tree / "docker" / "secrets" / "admin_token").exists()


def _logs(engine: Engine) -> str:
    names = engine("ps", "--all", "--format", "{{.Names}}").split()
    parts = []
    for name in names:
        done = subprocess.run(
            ["podman", "logs", "--tail", "40", name],
            env=engine.environment,
            capture_output=True,
            text=True,
        )
        parts.append(f"---- {name}\n{done.stdout}{done.stderr}")
    return "\n".join(parts)


def _settings(folder: Path) -> dict[str, str]:
    """Podman's own configuration, and what this machine's limits ask of the stack's."""
    containers, storage = folder / "containers.conf", folder / "storage.conf"
    containers.write_text(
        '[containers]\nlog_driver = "k8s-file"\n'
        f'default_ulimits = ["nofile={NOFILE}:{NOFILE}", "nproc=4096:4096"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{folder / "networks"}"\n'
    )
    storage.write_text(
        f'[storage]\ndriver = "{os.environ.get("STORAGE_DRIVER", "overlay")}"\n'
        f'graphroot = "{folder / "store"}"\nrunroot = "{folder / "run"}"\n'
    )
    return {
        "BUILDAH_ISOLATION": "chroot",
        "CONTAINERS_CONF": str(containers),
        "CONTAINERS_STORAGE_CONF": str(storage),
        "FAIRWAY_ENGINE": "podman",
        "FAIRWAY_MLFLOW_PORT": "15000",
        "FAIRWAY_NOFILE": str(NOFILE),
        "FAIRWAY_PORT": "17878",
        "FAIRWAY_POSTGRES_IMAGE": POSTGRES,
    }


def _make_base(engine: Engine) -> None:
    """Debian 12 with Python 3.11, as this machine's mirror has it."""
    root = engine.folder / "rootfs"
    found = ("ca-certificates", "python3", "python3-venv", "tini")
    words = ("--variant=minbase", f"--include={','.join(found)}", "bookworm", str(root), _mirror())
    engine.run("debootstrap", *words, timeout_s=BUILD_S)
    engine.run("sh", "-c", f"tar -C {root} -c . | podman import - {BASE}", timeout_s=BUILD_S)
    shutil.rmtree(root)


def _mirror() -> str:
    """Where this machine's own Debian packages come from."""
    sources = sorted(Path("/etc/apt").glob("sources.list*/**/*.sources"))
    sources += sorted(Path("/etc/apt").glob("sources.list"))
    text = "\n".join(path.read_text() for path in sources)
    found = re.search(r"^(?:URIs:|deb(?: \[.*\])?) *(\S+)", text, re.MULTILINE)
    assert found, "no Debian mirror in this machine's sources"
    return found[1]


def _copied(tree: Path) -> Path:
    tree.mkdir(parents=True)
    leave = shutil.ignore_patterns("__pycache__", ".env", "secrets")
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, tree / name, **({"ignore": leave} if source.is_dir() else {}))
    return tree


def _committed(tree: Path) -> str:
    """Make the tree a repository with one commit, and return that."""
    git = ["git", "-C", str(tree), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "A tree to build"]):
        subprocess.run([*git, *words], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

"""The scripts of the images and the stack, run; a stand-in takes the container engine's place."""

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.facts import dirty_diff

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
ENGINE = ROOT / "tests" / "containers" / "engine.py"
IMAGES = {
    f"FAIRWAY_{role}_{fact}": "x" for role in ("SERVICE", "TRAINER") for fact in ("IMAGE", "DIGEST")
}


@dataclass(frozen=True)
class StandIn:
    """A container engine that notes what it is asked."""

    folder: Path

    @property
    def home(self) -> Path:
        """The home of Fairway's commands in its containers."""
        return self.folder / "home"

    @property
    def diff(self) -> Path:
        """What a build was handed."""
        return self.folder / "git.diff"

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {name: v for name, v in os.environ.items() if not name.startswith("FAIRWAY_")}
        own = {"FAIRWAY_ENGINE": str(ENGINE), "FAIRWAY_HOME": str(self.home)}
        return {**kept, **own, "PATH": path, "STAND_IN": str(self.folder)}

    def answer(self, answers: dict[str, str]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    def run(self, script: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return _python(script, *words, env={**self.environment, **settings})

    def calls(self, pattern: str) -> list[dict[str, Any]]:
        """The calls that begin like this."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [json.loads(line) for line in lines]
        return [each for each in calls if re.search(f"(^| ){pattern}", " ".join(each["words"]))]

    def arguments(self, call: dict[str, Any]) -> dict[str, str]:
        """The build arguments of a call."""
        words = call["words"]
        pairs = [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"]
        return dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture
def engine(tmp_path: Path) -> StandIn:
    engine = StandIn(tmp_path / "engine")
    engine.folder.mkdir()
    engine.answer({"inspect .*fairway-service": "1" * 64, "inspect .*fairway-trainer": "2" * 64})
    return engine


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with what a build reads, and a file or two of the images'."""
    tree = tmp_path / "tree"
    leave = shutil.ignore_patterns("__pycache__", ".env", "secrets", "kubernetes")
    shutil.copytree(DOCKER, tree / "docker", ignore=leave)
    for name in ("service/known.py", "trainer/gone.py", "README.md"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("known\n")
    _git(tree, "init", "-q")
    _git(tree, "add", "-A")
    _git(tree, "commit", "-q", "-m", "A tree to build")
    return tree


@pytest.fixture
def port() -> Iterator[int]:
    """Where something says that it is ready."""

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


# ---- secrets ----------------------------------------------------------------------------------


def test_secrets_are_random_shut_away_and_never_replaced(tmp_path: Path) -> None:
    stack = _copied(tmp_path)

    assert _python(stack, "secrets").returncode == 0
    folder = stack.parent / "secrets"
    first = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / "ray_token").unlink()
    assert _python(stack, "secrets").returncode == 0

    second = {path.name: path.read_text() for path in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", text) for text in second.values())
    assert len({*first.values(), *second.values()}) == 5
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"ray_token"}
    assert set(second) | {"admin_token"} >= set(_secrets_of_compose())


# ---- build ------------------------------------------------------------------------------------


def test_a_clean_tree_is_built_and_says_so(tree: Path, engine: StandIn) -> None:
    done = engine.run(tree / "docker" / "stack.py", "build")

    arguments = [engine.arguments(call) for call in engine.calls("build")]
    assert done.returncode == 0, done.stderr
    assert [each["IMAGE"] for each in arguments] == ["service", "trainer-cpu"]
    for each in arguments:
        lock = (DOCKER / f"requirements-{each['IMAGE']}.lock").read_bytes()
        assert each["GIT_COMMIT"] == _git(tree, "rev-parse", "HEAD").strip()
        assert each["GIT_DIRTY"] == "false"
        assert each["GIT_DIFF_SHA256"] == hashlib.sha256(b"").hexdigest()
        assert each["LOCK_SHA256"] == hashlib.sha256(lock).hexdigest()
    assert not engine.diff.exists()
    assert (tree / "docker" / ".env").read_text().splitlines() == [
        "COMPOSE_PROFILES=cpu",
        f"FAIRWAY_SERVICE_IMAGE=fairway-service:{'1' * 12}",
        f"FAIRWAY_SERVICE_DIGEST=sha256:{'1' * 64}",
        f"FAIRWAY_TRAINER_IMAGE=fairway-trainer-cpu:{'2' * 12}",
        f"FAIRWAY_TRAINER_DIGEST=sha256:{'2' * 64}",
    ]


@pytest.mark.parametrize("changed", ["service/known.py", "service/new.py", "README.md"])
def test_a_tree_that_is_not_its_commit_is_refused_in_a_line(
    tree: Path, engine: StandIn, changed: str
) -> None:
    (tree / changed).write_text("changed\n")

    done = engine.run(tree / "docker" / "stack.py", "build")

    assert done.returncode == 1
    assert re.fullmatch(r"stack: .+: differs from its commit .+ build --dirty\n", done.stderr)
    assert not engine.calls("build")


def test_a_dirty_image_has_the_diff_that_makes_its_tree_again(
    tree: Path, engine: StandIn, tmp_path: Path
) -> None:
    (tree / "service" / "known.py").write_text("changed\n")
    (tree / "trainer" / "gone.py").unlink()
    (tree / "service" / "new ä.bin").write_bytes(bytes(range(256)))
    (tree / "notes.txt").write_text("the images do not take this\n")

    done = engine.run(tree / "docker" / "stack.py", "build", "--dirty")

    assert done.returncode == 0, done.stderr
    for call in engine.calls("build"):
        arguments = engine.arguments(call)
        assert arguments["GIT_DIRTY"] == "true"
        sha256 = hashlib.sha256(engine.diff.read_bytes()).hexdigest()
        assert arguments["GIT_DIFF_SHA256"] == sha256
    again = tmp_path / "again"
    _git(tree, "worktree", "add", "--detach", str(again), arguments["GIT_COMMIT"])
    _git(again, "apply", str(engine.diff))
    assert (again / "service" / "known.py").read_text() == "changed\n"
    assert not (again / "trainer" / "gone.py").exists()
    assert (again / "service" / "new ä.bin").read_bytes() == bytes(range(256))
    assert not (again / "notes.txt").exists()


def test_the_facts_of_an_image_have_the_diff_that_fairway_would_record(
    tree: Path, engine: StandIn
) -> None:
    (tree / "service" / "known.py").write_text("changed\n")
    (tree / "service" / "new.py").write_text("new\n")

    engine.run(tree / "docker" / "stack.py", "build", "--dirty")

    assert engine.diff.read_bytes() == dirty_diff(tree)


@pytest.mark.parametrize("is_dirty", [False, True])
def test_the_build_by_hand_looks_whether_the_tree_is_clean(
    tree: Path, engine: StandIn, is_dirty: bool
) -> None:
    guide = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^```sh\n(docker build .+?)```$", guide, re.MULTILINE | re.DOTALL)
    if is_dirty:
        (tree / "service" / "known.py").write_text("changed\n")
    docker = engine.folder / "docker"
    docker.symlink_to(ENGINE)

    path = {"PATH": f"{docker.parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", command], cwd=tree, env={**engine.environment, **path}, check=True)

    (call,) = engine.calls("build")
    arguments = engine.arguments(call)
    lock = (DOCKER / "requirements-trainer.lock").read_bytes()
    assert arguments["IMAGE"] == "trainer"
    assert arguments["GIT_COMMIT"] == _git(tree, "rev-parse", "HEAD").strip()
    assert arguments["GIT_DIRTY"] == str(is_dirty).lower()
    assert arguments["LOCK_SHA256"] == hashlib.sha256(lock).hexdigest()


# ---- up ---------------------------------------------------------------------------------------


def test_a_stack_without_images_is_refused_in_a_line(tmp_path: Path) -> None:
    done = _python(_copied(tmp_path), "up")

    assert done.returncode == 1
    assert "names no FAIRWAY_SERVICE_IMAGE, " in done.stderr
    assert "build the images first" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_images_may_be_named_in_the_environment_alone(
    tmp_path: Path, engine: StandIn, port: int
) -> None:
    stack = _copied(tmp_path)

    done = engine.run(stack, "up", **IMAGES, FAIRWAY_PORT=str(port))

    assert done.returncode == 0, done.stderr
    assert engine.calls("compose up -d$")


def test_the_environment_goes_before_env_for_the_engine_as_for_the_script(
    tmp_path: Path, engine: StandIn, port: int
) -> None:
    stack = _copied(tmp_path)
    lines = [f"{name}={value}" for name, value in IMAGES.items()]
    lines += ["FAIRWAY_PORT=1", "FAIRWAY_GANGS=3"]
    (stack.parent / ".env").write_text("\n".join(lines) + "\n")

    done = engine.run(stack, "up", FAIRWAY_PORT=str(port))

    (call,) = engine.calls("compose up -d$")
    assert done.stdout.startswith(f"Fairway is ready at http://127.0.0.1:{port},")
    assert call["settings"]["FAIRWAY_PORT"] == str(port)
    assert call["settings"]["FAIRWAY_GANGS"] == "3"


def test_a_database_that_lost_its_tokens_gets_a_new_one_though_a_file_is_there(
    tmp_path: Path, engine: StandIn, port: int
) -> None:
    stack = _copied(tmp_path)
    file = stack.parent / "secrets" / "admin_token"
    settings = {**IMAGES, "FAIRWAY_PORT": str(port)}

    assert engine.run(stack, "up", **settings).returncode == 0
    first = file.read_text()
    assert engine.run(stack, "up", **settings).returncode == 0
    second = file.read_text()
    shutil.rmtree(engine.home)  # as `docker compose down --volumes` does
    assert engine.run(stack, "up", **settings).returncode == 0
    third = file.read_text()

    assert re.fullmatch(r"fwy_\S+\n", first)
    assert first == second != third
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(engine.calls("fairway token create")) == 2


# ---- smoke ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("also", "is_it"),
    [
        (f"sha256:{'3' * 64} []", True),
        (f"sha256:{'5' * 64} [registry.example/fairway@sha256:{'3' * 64}]", True),
        (f"sha256:{'5' * 64} [registry.example/fairway@sha256:{'4' * 64}]", False),
    ],
    ids=["built here", "of a registry", "another"],
)
def test_smoke_knows_an_image_by_its_own_digest_and_by_its_registrys(
    engine: StandIn, also: str, is_it: bool
) -> None:
    digest = f"sha256:{'3' * 64}"
    engine.answer(
        {
            r"^ps ": "container",
            r"exec -T service python": "False",
            r"exec -T ray-head python": "True",
            r"FAIRWAY_IMAGE_DIGEST": digest,
            r"^inspect .*\{\{.Image\}\} container": f"sha256:{'5' * 64}",
            r"^image inspect ": also,
        }
    )

    names = {"FAIRWAY_SERVICE_DIGEST": digest, "FAIRWAY_TRAINER_DIGEST": digest}
    command = [sys.executable, "-c", "import smoke; smoke.check_images()"]
    environment = {**engine.environment, **names, "PYTHONPATH": str(DOCKER)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert (done.returncode == 0) == is_it, done.stdout + done.stderr
    assert ("NOT SO: service runs" in done.stderr) != is_it


# ---- the entrypoint ---------------------------------------------------------------------------


def test_the_entrypoint_takes_the_password_out_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("geheim\n")
    show = ("sh", "-c", 'echo "$PGPASSWORD"; exit 7')

    done = _entrypoint(*show, PGPASSWORD_FILE=str(tmp_path / "password"))
    without = _entrypoint(*show)
    missing = _entrypoint(*show, PGPASSWORD_FILE=str(tmp_path / "none"))

    assert (done.returncode, done.stdout) == (7, "geheim\n")
    assert (without.returncode, without.stdout) == (7, "\n")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "not readable by user" in missing.stderr


def _secrets_of_compose() -> list[str]:
    return list(yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["secrets"])


def _copied(folder: Path) -> Path:
    """A copy of the stack's script, with nothing beside it."""
    (folder / "docker").mkdir()
    return Path(shutil.copy(DOCKER / "stack.py", folder / "docker"))


def _python(
    script: Path, *words: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def _git(tree: Path, *words: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", str(tree), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _entrypoint(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DOCKER / "entrypoint.sh"), *words],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
    )

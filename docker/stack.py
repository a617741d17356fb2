"""Build Fairway's images and run them together on one machine; the Makefile calls it.

    stack.py secrets                        write the secrets that are missing
    stack.py build --profile cpu [-- FLAG]  build the images; flags go to the engine's build
        [--dirty]                           of a tree that is not its commit: with the difference
    stack.py up                             start everything, and wait until it is ready
    stack.py down [--volumes]               end it; --volumes deletes everything that it holds

What was built stands in .env, which compose reads: the images, their digests, the profile. Other
settings may be written there by hand and are kept; the environment goes before .env.
FAIRWAY_ENGINE=podman takes podman and podman-compose in place of docker. Needs nothing but Python
and the engine.
"""

import argparse
import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

DOCKER = Path(__file__).resolve().parent
ROOT = DOCKER.parent
ENV, SECRETS = DOCKER / ".env", DOCKER / "secrets"
ADMIN_TOKEN = SECRETS / "admin_token"
PROFILES = {"cpu": ("service", "trainer-cpu"), "gpu": ("service", "trainer")}
SOURCES = ("service", "trainer", "tune_spaces")
"""The folders whose files go into an image, known to git or not."""
IMAGES = tuple(
    f"FAIRWAY_{role}_{fact}" for role in ("SERVICE", "TRAINER") for fact in ("IMAGE", "DIGEST")
)
MADE = ("fairway_db_password", "mlflow_db_password", "postgres_password", "ray_token")
READY_S = 600.0
DATABASE_S = 120.0


def main() -> None:
    """Do what the command line says; a fault is told in a line, with exit code 1."""
    parser = argparse.ArgumentParser(description="Fairway's images and their stack.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("secrets", help="write the secrets that are missing")
    build_parser = verbs.add_parser("build", help="build the images")
    build_parser.add_argument("--profile", choices=sorted(PROFILES), default="cpu")
    build_parser.add_argument("--dirty", action="store_true", help="what is not committed, too")
    build_parser.add_argument("--pip-conf", type=Path, help="where packages come from")
    build_parser.add_argument("flags", nargs="*", help="for the engine's build, after a --")
    verbs.add_parser("up", help="start everything and wait until it is ready")
    down_parser = verbs.add_parser("down", help="end everything")
    down_parser.add_argument("--volumes", action="store_true", help="and delete what it holds")
    told = parser.parse_args()
    if told.verb == "secrets":
        write_secrets()
    elif told.verb == "build":
        build(told.profile, told.pip_conf, told.flags, with_diff=told.dirty)
    elif told.verb == "up":
        up()
    else:
        down(with_volumes=told.volumes)


def write_secrets() -> None:
    """Write a random secret into each file that is missing; none is ever replaced.

    The folder is its owner's alone. The files can be read by whoever gets hold of them, since
    compose mounts them as they are into containers whose user is another.
    """
    SECRETS.mkdir(mode=0o700, exist_ok=True)
    SECRETS.chmod(0o700)
    for name in MADE:
        path = SECRETS / name
        if not path.exists():
            _write_new(path, secrets.token_hex(32), 0o444)


def build(profile: str, pip_conf: Path | None, flags: list[str], *, with_diff: bool) -> None:
    """Build the images of a profile, name each after its digest, and write both into .env.

    What the tree has over its commit goes into the images `with_diff`, and is refused without.
    """
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    diff = tree_diff()
    if diff and not with_diff:
        _fail(
            f"{ROOT}: differs from its commit by {len(diff)} bytes of diff; commit them, or have "
            "them in the images with build --dirty"
        )
    facts = {"COMPOSE_PROFILES": profile}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "git.diff")
        path.write_bytes(diff)
        path.chmod(0o644)  # for the image's user
        words = ["--build-context", f"diff={folder}"] if diff else []
        if pip_conf is not None:
            words += ["--secret", f"id=pip_conf,src={pip_conf.absolute()}"]
        for image in PROFILES[profile]:
            arguments = {
                "IMAGE": image,
                "GIT_COMMIT": commit,
                "GIT_DIRTY": str(bool(diff)).lower(),
                "GIT_DIFF_SHA256": hashlib.sha256(diff).hexdigest(),
                "LOCK_SHA256": hashlib.sha256(_lock(image).read_bytes()).hexdigest(),
            }
            facts |= _build(image, arguments, [*words, *flags])
    _write_env(facts)


def _lock(image: str) -> Path:
    return DOCKER / f"requirements-{image}.lock"


def _build(image: str, arguments: dict[str, str], flags: list[str]) -> dict[str, str]:
    """Build one image; return what .env says of it."""
    words = [word for item in arguments.items() for word in ("--build-arg", "=".join(item))]
    name = f"fairway-{image}"
    _run(
        *(engine(), "build", "--file", str(DOCKER / "Dockerfile"), "--platform", "linux/amd64"),
        *("--tag", f"{name}:latest", *words, *flags, str(ROOT)),
    )
    found = _output(engine(), "image", "inspect", "--format", "{{.Id}}", f"{name}:latest")
    sha256 = found.removeprefix("sha256:")
    tagged = f"{name}:{sha256[:12]}"
    _run(engine(), "tag", f"{name}:latest", tagged)
    key = "FAIRWAY_SERVICE" if image == "service" else "FAIRWAY_TRAINER"
    return {f"{key}_IMAGE": tagged, f"{key}_DIGEST": f"sha256:{sha256}"}


def tree_diff() -> bytes:
    """What the tree has over its commit, as `git apply` takes it: tracked files, and those of the
    images' folders that git does not know yet. Empty where it is clean."""
    plain = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv")
    diff = _git(*plain, "HEAD", "--")
    listed = _git("ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCES)
    for name in filter(None, os.fsdecode(listed).split("\0")):
        diff += _git(*plain, "--no-index", "--", "/dev/null", name, differs=1)
    return diff


def _git(*words: str, differs: int = 0) -> bytes:
    """What git prints; `differs` is the exit code that is no fault beside 0."""
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode not in (0, differs):
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout


def up() -> None:
    """Start everything and wait until it is ready; the first time, make an admin's token.

    The service refuses to listen beyond loopback as long as no token exists.
    """
    missing = [name for name in IMAGES if not setting(name)]
    if missing:
        _fail(f"{ENV}: names no {', '.join(missing)}; build the images first, with stack.py build")
    write_secrets()
    compose("up", "-d", "postgres")
    _wait_for_database()
    if not (ADMIN_TOKEN.exists() and _has_token()):
        _create_token()
    if engine() == "podman":
        # podman-compose waits for nobody's health, and podman 4 starts nothing that depends on what
        # has ended. Whatever comes up too early is started again.
        compose("run", "--rm", "--no-deps", "-T", "mlflow-migrate")
        compose("up", "-d", "--no-deps")
    else:
        compose("up", "-d")
    _wait_until_ready()
    print(f"Fairway is ready at {address()}, its admin's token in {ADMIN_TOKEN}")


def _has_token() -> bool:
    """Whether the database knows a token; it may be another than the one that a file here is of."""
    return '"active": true' in _in_service("fairway", "token", "ls", "--output", "json")


def _create_token() -> None:
    said = _in_service("fairway", "token", "create", "admin", "--role", "admin")
    tokens = [line for line in said.splitlines() if line.startswith("fwy_")]
    if len(tokens) != 1:
        _fail("`fairway token create` printed no token; see the database's log")
    ADMIN_TOKEN.unlink(missing_ok=True)
    _write_new(ADMIN_TOKEN, tokens[0].strip(), 0o600)


def _in_service(*words: str) -> str:
    """What a command prints in a container like the service's."""
    return compose("run", "--rm", "--no-deps", "-T", "service", *words, capture=True)


def down(*, with_volumes: bool) -> None:
    """End everything; a token is of no use without the database that knew it."""
    compose("down", *(["--volumes"] if with_volumes else []))
    if with_volumes:
        ADMIN_TOKEN.unlink(missing_ok=True)


def compose(*words: str, capture: bool = False) -> str:
    """Run a compose command on the stack; return what it printed where that is captured."""
    program = ["podman-compose"] if engine() == "podman" else [engine(), "compose"]
    return _run(*program, *words, capture=capture)


def containers(service: str) -> list[str]:
    """The ids of a service's running containers."""
    wanted = [
        f"label=com.docker.compose.{key}" for key in ("project=fairway", f"service={service}")
    ]
    filters = [word for each in wanted for word in ("--filter", each)]
    return _output(engine(), "ps", "--quiet", *filters).split()


def address() -> str:
    """Where the service is reached from this machine."""
    return f"http://127.0.0.1:{setting('FAIRWAY_PORT', '7878')}"


def setting(name: str, default: str = "") -> str:
    """A setting as compose sees it: the environment goes before .env."""
    return os.environ.get(name, read_env().get(name)) or default


def read_env() -> dict[str, str]:
    """What .env says; nothing before the first build."""
    lines = ENV.read_text(encoding="utf-8").splitlines() if ENV.exists() else []
    told = [line.partition("=") for line in lines if line.strip() and line[0] != "#"]
    return {key.strip(): value.strip() for key, _, value in told}


def _write_env(values: dict[str, str]) -> None:
    """Set these in .env and keep its other lines."""
    lines = ENV.read_text(encoding="utf-8").splitlines() if ENV.exists() else []
    kept = [line for line in lines if line.partition("=")[0].strip() not in values]
    lines = [*kept, *(f"{key}={value}" for key, value in values.items())]
    ENV.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_new(path: Path, text: str, mode: int) -> None:
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "w") as file:
        file.write(f"{text}\n")


def _wait_for_database() -> None:
    asked = ("exec", "-T", "postgres", "pg_isready", "--quiet", "--host=127.0.0.1")
    deadline = time.monotonic() + DATABASE_S
    while True:
        try:
            compose(*asked, "--username=fairway", "--dbname=fairway", capture=True)
            return
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                _fail(f"postgres is not ready after {DATABASE_S:.0f} s; see its log")
            time.sleep(1)


def _wait_until_ready() -> None:
    deadline, said = time.monotonic() + READY_S, ""
    while True:
        try:
            with urllib.request.urlopen(f"{address()}/readyz", timeout=15):
                return
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
        except OSError as error:
            said = str(error)
        if time.monotonic() > deadline:
            _fail(f"the service is not ready after {READY_S:.0f} s: {said}")
        time.sleep(2)


def engine() -> str:
    """The program that builds and runs: docker, or what FAIRWAY_ENGINE names."""
    return os.environ.get("FAIRWAY_ENGINE") or "docker"


def _output(*words: str) -> str:
    return _run(*words, capture=True).strip()


def _run(*words: str, capture: bool = False) -> str:
    options: dict[str, Any] = {"capture_output": True} if capture else {}
    done = subprocess.run(
        words, cwd=DOCKER, env={**read_env(), **os.environ}, check=True, text=True, **options
    )
    return done.stdout or ""


def _fail(text: str) -> NoReturn:
    sys.exit(f"stack: {text}")


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        _fail(f"{error.filename}: not found; install it, or set FAIRWAY_ENGINE")
    except subprocess.CalledProcessError as error:
        _fail(f"`{' '.join(error.cmd[:4])} …` ended with {error.returncode}\n{error.stderr or ''}")

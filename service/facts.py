"""What a run must record to be run again: code, data, versions, machine. Reads, decides nothing."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from trainer.data.shards import Dataset
from trainer.errors import UsageError

PACKAGES = ("torch", "ray", "mlflow", "zstandard", "numpy", "sentencepiece", "optuna")
OURS = ("service", "trainer", "tune_spaces")


def environment(dataset: Dataset) -> dict[str, Any]:
    """Versions, machine, data and the git commit that the code was in."""
    return {
        **_git(Path(__file__).resolve().parent.parent),
        "data_name": dataset.name,
        "data_digest": dataset.digest,
        "tokenizer_sha256": dataset.manifest.tokenizer.sha256,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any]:
    if not (folder / ".git").exists():
        return {"git_commit": None, "git_dirty": None}

    def ask(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True
            )
        except OSError:  # no git here: the commit is not known
            return ""
        return done.stdout.strip()

    commit = ask("rev-parse", "HEAD") or None
    return {
        "git_commit": commit,
        "git_dirty": bool(ask("status", "--porcelain")) if commit else None,
    }


def check_packages() -> None:
    """Refuse to run where another distribution has overwritten one of our packages.

    PyPI has a `trainer` and a `service`; installing one of them replaces ours without a word.
    """
    owners = packages_distributions()
    for name in OURS:
        for owner in set(owners.get(name, ())) - {"fairway"}:
            raise UsageError(
                f"package {name}: the distribution {owner} installed its own over Fairway's; "
                f"run pip uninstall {owner} and install fairway again"
            )

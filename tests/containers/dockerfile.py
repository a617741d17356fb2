"""The Dockerfile's stages, and their steps taken out of it to be run in a folder of their own."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
FOLDERS = ("opt", "dist", "src")
"""What the steps that install write to, each at the top of an image."""


def stages() -> dict[str, str]:
    """The stages by name."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    parts = re.split(r"^FROM (\S+) AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def instructions(stage: str) -> list[str]:
    """A stage's instructions, each in one line."""
    lines = [line for line in stages()[stage].splitlines() if line and line[0] != "#"]
    return re.sub(r"\\\n *", "", "\n".join(lines)).splitlines()


def commands(stage: str) -> list[str]:
    """What a stage runs, without what is mounted for it."""
    return [
        re.sub(r"^RUN (--mount=\S+ +)*", "", line)
        for line in instructions(stage)
        if line.startswith("RUN ")
    ]


@dataclass(frozen=True)
class CleanRoot:
    """A folder that stands for an image's root."""

    folder: Path
    python: str
    """The interpreter's folder: the base image's `python3`."""

    def copy(self, stage: str, **arguments: str) -> None:
        """Do the stage's COPYs out of the tree."""
        for line in instructions(stage):
            if line.startswith("COPY ") and "--from" not in line:
                *sources, target = line.split()[1:]
                for source in sources:
                    self._copy(_with(source, arguments), target)

    def run(self, command: str) -> str:
        """Run a command of the Dockerfile in here; return what it printed."""
        done = subprocess.run(
            ["sh", "-c", self.inside(command)],
            env={**os.environ, "PATH": f"{self.python}:{os.environ['PATH']}"},
            cwd=self._at("/src"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr)[-4_000:]}"
        return done.stdout

    def inside(self, command: str) -> str:
        """A command with the image's folders replaced by those in here."""
        return re.sub(rf"(?<![\w/.])/(?={'|'.join(FOLDERS)})", f"{self.folder}/", command)

    def _copy(self, source: str, target: str) -> None:
        path = self._at(target if target.startswith("/") else f"/src/{target}")
        if (ROOT / source).is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, path, ignore=leave, dirs_exist_ok=True)
        else:
            shutil.copy2(ROOT / source, path)

    def _at(self, path: str) -> Path:
        found = Path(f"{self.folder}{path}")
        (found if path.endswith(("/", "/src")) else found.parent).mkdir(parents=True, exist_ok=True)
        return found


def _with(text: str, arguments: dict[str, str]) -> str:
    for name, value in arguments.items():
        text = text.replace(f"${{{name}}}", value)
    assert "$" not in text, text
    return text

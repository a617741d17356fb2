"""Triton's kernels where there is no GPU: run by its interpreter, in a process of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: torch for the CPU has none"
)


def interpret(program: str, *words: object) -> str:
    """Run a program and return what it prints; an AssertionError with its last words if it fails.

    Apart, because Triton decides at import whether it interprets.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

"""The command line, called in this process as a shell would call it."""

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple

import pytest

from service.cli import main


class Done(NamedTuple):
    """A command that ended: its exit code, its data, and its talk line by line."""

    status: int
    out: str
    lines: list[str]


def fairway(*words: object) -> Done:
    """Call `fairway` with these words."""
    out, err, status = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fairway", *map(str, words)])
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
    return Done(status, out.getvalue(), err.getvalue().splitlines())

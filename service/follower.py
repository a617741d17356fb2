"""The projector as a child of the run: started beside it, waited for at its end."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from service.paths import Paths
from trainer.errors import BackendError

PATIENCE_S = 120.0
HASTE_S = 10.0  # after an interrupt: a projector that needs longer ends by itself, without us


class Follower:
    """Runs `service.tracking` for one sweep. The sweep never waits on it but at the very end."""

    def __init__(self, paths: Paths, sweep_id: str, uri: str, after: int) -> None:
        self._command = [sys.executable, "-m", "service.tracking", "--home", str(paths.home)]
        self._command += ["--sweep", sweep_id, "--uri", uri, "--after", str(after)]
        self._log = paths.sweep(sweep_id).logs / "tracking.log"

    def __enter__(self) -> "Follower":
        self._process = self._start("--parent-pid", str(os.getpid()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.terminate()
        if kind is None or issubclass(kind, Exception):
            self._end(self._process)
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(HASTE_S)

    def finish(self) -> None:
        """Wait until everything is written; BackendError says how to write it later."""
        code = self._end(self._process)
        if code != 0:  # it may have met the follower of a run that was killed before this one
            code = self._end(self._start("--once"))
        if code != 0:
            raise BackendError(
                f"MLflow is not complete ({_last_line(self._log)}); the results are safe: "
                "run `fairway sync` when it is back"
            )

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> int:
        """Wait for a projector, for as long as there is patience; return its exit code."""
        try:
            return process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*self._command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "no output"

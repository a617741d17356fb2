"""A real MLflow server that can be killed and started again on the same port and store."""

import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from service.paths import Paths
from service.runs import ID_TAG, SWEEP_TAG
from service.tracking import ui_command
from tests.ports import free_port

START_S = 300.0  # on a busy machine


class MlflowServer:
    """Serves a home's embedded store by the command that users are given. Use as `with`."""

    def __init__(self, home: Path) -> None:
        self._paths = Paths(home)
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it and wait until it answers, ten seconds or so."""
        home = self._paths.home
        home.mkdir(parents=True, exist_ok=True)
        with (home / "mlflow-server.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f"exec env {ui_command(self._paths, port=self._port)}"],
                cwd=home,
                start_new_session=True,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, (home / "mlflow-server.log").read_text()
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.2)

    def kill(self) -> None:
        """End it with everything that it started, as a lost machine would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=10):
                return True
        except OSError:
            return False

    def __enter__(self) -> "MlflowServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def runs_of(client: Any, sweep_id: str) -> dict[str, Any]:
    """Every run of a sweep, by the id of its stage; no stage may have two."""
    experiments = [each.experiment_id for each in client.search_experiments()]
    wanted = f"tags.`{SWEEP_TAG}` = '{sweep_id}'"
    runs = client.search_runs(experiments, wanted, max_results=1_000)
    by_id = {run.data.tags[ID_TAG]: run for run in runs}
    assert len(by_id) == len(runs), sorted(run.data.tags[ID_TAG] for run in runs)
    return by_id


def contents(client: Any, sweep_id: str) -> dict[str, Any]:
    """All that MLflow's store holds of a sweep, by the id of its stage: what a run is, and every
    point of every metric."""
    return {
        key: {
            "run": (run.info.run_id, run.info.status, run.info.end_time),
            "params": run.data.params,
            "tags": run.data.tags,
            "points": {
                name: [
                    (point.step, point.timestamp, point.value)
                    for point in client.get_metric_history(run.info.run_id, name)
                ]
                for name in sorted(run.data.metrics)
            },
        }
        for key, run in runs_of(client, sweep_id).items()
    }

"""The driver killed without warning, twice: the same command goes on and nothing is doubled."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import (
    NUM_FINALS,
    TAIL_STEPS,
    TRUNK_STEPS,
    Cli,
    Finished,
    by_point,
    events,
    make_cli,
)

# Three starts of Ray; on a machine that is busy with other work they take minutes.
pytestmark = pytest.mark.timeout(2400)
DETERMINED = ["weights_sha256", "artifact_bytes", "entry"]


def kill_when(cli: Cli, condition: Callable[[], bool]) -> None:
    """Start the run, kill -9 its driver as soon as the condition holds."""
    process = cli.start("run", str(cli.sweep))
    deadline = time.monotonic() + 400
    try:
        while not condition():
            assert process.poll() is None, (cli.home / "run.log").read_text()
            assert time.monotonic() < deadline, (cli.home / "run.log").read_text()
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def count(cli: Cli, event: str) -> int:
    if not list(cli.home.glob("sweeps/*/events.jsonl")):
        return 0
    return sum(e["event"] == event for e in events(cli.home))


def has_checkpoint(cli: Cli) -> bool:
    return any(cli.home.glob("store/states/*/trunk/checkpoint/*/index.json"))


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A sweep killed within its trunk, then within its finals, then run to its end."""
    cli = make_cli(tmp_path_factory.mktemp("killed"))
    cli.home.mkdir()
    kill_when(cli, lambda: has_checkpoint(cli))
    kill_when(cli, lambda: count(cli, "final_scored") >= 3)
    done = cli.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return cli


def test_the_numbers_equal_those_of_an_undisturbed_run(killed_twice: Cli, finished: Finished):
    assert by_point(killed_twice.home, DETERMINED) == by_point(finished.cli.home, DETERMINED)


def test_the_ledger_has_each_stage_once(killed_twice: Cli):
    ended = Counter(
        event.get("final") or event.get("training")
        for event in events(killed_twice.home)
        if event["event"] in ("training_finished", "final_scored")
    )

    assert set(ended.values()) == {1}
    assert len(ended) == 2 + NUM_FINALS


def test_what_was_finished_is_not_computed_again(killed_twice: Cli):
    told = events(killed_twice.home)
    (trunk,) = [e for e in told if e["event"] == "trunk_finished"]
    tails = [e["result"]["steps_computed"] for e in told if e["event"] == "training_finished"]
    status = killed_twice.json("status")

    assert 0 < trunk["steps_computed"] < TRUNK_STEPS  # went on from its checkpoint
    assert sorted(tails) == sorted(TAIL_STEPS)
    assert status["trained_steps"] == trunk["steps_computed"] + sum(tails)
    assert status["cache_hits"] >= 2 + 3


def test_nothing_of_the_killed_runs_is_left_running(killed_twice: Cli):
    home = str(killed_twice.home)
    deadline = time.monotonic() + 30
    while (left := processes_with(home)) and time.monotonic() < deadline:
        time.sleep(0.5)

    assert left == []


def processes_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
        if text in words and path.parent.name != str(os.getpid()):
            found.append(words)
    return found


def test_mlflow_has_each_run_once_after_the_kills(killed_twice: Cli):
    from mlflow import MlflowClient

    from service.paths import Paths
    from service.tracking import default_uri

    client = MlflowClient(default_uri(Paths(killed_twice.home)))
    experiment = client.get_experiment_by_name("micro")
    runs = client.search_runs([experiment.experiment_id])

    names = Counter(run.data.tags["fairway.id"] for run in runs)
    assert set(names.values()) == {1}
    assert len(names) == 1 + 2 + NUM_FINALS

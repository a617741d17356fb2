"""A sweep that is told to pause, to stop and to cancel, and interrupted, on its way: it ends in
order each time, and once it is left alone its results are those of an undisturbed run."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.control import read_order, write_order
from service.paths import Paths, SweepPaths, find_sweep
from tests.integration.conftest import (
    NUM_FINALS,
    NUM_TRAININGS,
    TRUNK_STEPS,
    Cli,
    Finished,
    by_point,
    events,
)
from tests.integration.test_engine_kills import (
    DETERMINED,
    PATIENCE_S,
    Disturbed,
    begin,
    below,
    is_alive,
)

# Five starts of Ray; on a machine that is busy with other work they take minutes.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore::ResourceWarning")]
PAUSED, STOPPED, CANCELLED, INTERRUPTED, ENDED = range(5)


@dataclass(frozen=True)
class Attempt:
    """One `fairway run` of the sweep: what it came to and what it wrote into the ledger."""

    exit_code: int
    took_s: float
    """From the order to the end of the process."""
    said: str
    events: list[dict[str, Any]]
    left: list[int]
    """Processes of its own that outlived it."""
    report: dict[str, Any]
    """`fairway status` after it."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def end(self) -> tuple[str, str | None, str | None]:
        (event,) = self.of("sweep_finished")
        assert self.events[-1] == event
        return event["state"], event["reason"], event["order"]


def attempt(root: Path, until: str, disturb: Callable[[Disturbed], None], *options: str) -> Attempt:
    """Run until the ledger has an event of this run that is called so, or until a `checkpoint` of
    a trunk; disturb the run, and wait for its end."""
    before = len(told(root))
    with begin(root, "--num-cpus", "2", *options) as run:
        started = run.process.pid
        deadline = time.monotonic() + PATIENCE_S
        while run.process.poll() is None and until not in news(run, before):
            assert time.monotonic() < deadline, run.log()
            time.sleep(0.05)
        ours = below(started)
        disturb(run)
        since = time.monotonic()
        code = run.process.wait(timeout=PATIENCE_S)
        took_s = time.monotonic() - since
    settled = time.monotonic() + 60
    while (left := [pid for pid in ours if is_alive(pid)]) and time.monotonic() < settled:
        time.sleep(0.1)
    status = run.cli.json("status")
    return Attempt(code, took_s, run.log(), told(root)[before:], left, status)


def told(root: Path) -> list[dict[str, Any]]:
    home = root / "home"
    return events(home) if list(home.glob("sweeps/*/events.jsonl")) else []


def folder(run: Disturbed) -> SweepPaths:
    return find_sweep(Paths(run.cli.home), None)


def order(want: str) -> Callable[[Disturbed], None]:
    return lambda run: write_order(folder(run), want, "alice")


def interrupt(run: Disturbed) -> None:
    os.kill(run.process.pid, signal.SIGTERM)


def news(run: Disturbed, before: int) -> set[str]:
    """What the ledger tells after its first events; and checkpoint, if a trunk has one."""
    found = {event["event"] for event in told(run.cli.home.parent)[before:]}
    return found | ({"checkpoint"} if run.checkpoints("states") else set())


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Attempt]]:
    """Paused within the trunk, stopped in the first training, cancelled before a gang is there,
    interrupted among the finals, and left alone."""
    root = tmp_path_factory.mktemp("told")
    return root, [
        attempt(root, "checkpoint", order("pause")),
        attempt(root, "gang_started", order("stop")),
        attempt(root, "sweep_started", order("cancel")),
        attempt(root, "final_scored", interrupt),
        attempt(root, "sweep_finished", lambda _: None, "--no-tracking"),
    ]


@pytest.mark.parametrize(
    ("which", "end"),
    [
        (PAUSED, ("stopped", "paused by alice", "pause")),
        (STOPPED, ("stopped", "stopped by alice", "stop")),
        (CANCELLED, ("cancelled", "cancelled by alice", "cancel")),
        (INTERRUPTED, ("cancelled", "interrupted", None)),
    ],
)
def test_a_sweep_that_is_told_to_end_says_so_and_leaves_nothing_behind(attempts, which, end):
    run = attempts[1][which]

    assert run.exit_code == 130, run.said
    assert run.end == end
    assert run.left == []
    assert f"{end[1]}; run the same command again to go on" in run.said
    assert (run.report["state"], run.report["trainings"]["running"]) == (end[0], 0)
    assert not {e["training"] for e in run.of("training_started")} - {
        e["training"] for e in run.of("training_finished")
    }


def test_a_pause_stops_a_trunk_at_a_checkpoint_and_counts_what_it_took(attempts):
    paused = attempts[1][PAUSED]

    ended = paused.of("training_finished")
    assert {event["state"] for event in ended} == {"cancelled"}
    assert all("paused by alice" in event["reason"] for event in ended)
    assert sum(event["occupied_s"] for event in ended) > 0
    (trunk,) = [e for run in attempts[1] for e in run.of("trunk_finished")]
    assert trunk["steps_computed"] < TRUNK_STEPS  # the rest was in its checkpoint


def test_a_stop_lets_end_what_runs_and_starts_nothing_more(attempts):
    stopped = attempts[1][STOPPED]

    states = Counter(event["state"] for event in stopped.of("training_finished"))
    assert states["succeeded"] >= 1
    assert set(states) <= {"succeeded", "cancelled"}
    assert stopped.of("final_scored") == []
    assert "0 of 8 finals settled; sweep stopped" in stopped.said  # its table is shown


def test_a_cancellation_does_not_wait_for_what_is_being_started(attempts):
    cancelled = attempts[1][CANCELLED]

    assert cancelled.of("gang_started") == cancelled.of("final_scored") == []
    assert cancelled.took_s < 60  # about 5 on a machine that has nothing else to do


def test_an_older_order_does_not_end_the_next_run(attempts):
    root, (*_, ended) = attempts
    assert ended.exit_code == 0, ended.said
    assert ended.end == ("succeeded", None, None)
    assert read_order(find_sweep(Paths(root / "home"), None)) is None


def test_whatever_a_sweep_was_told_its_results_are_those_of_an_undisturbed_run(
    attempts, finished: Finished
):
    home = attempts[0] / "home"

    assert by_point(home, DETERMINED) == by_point(finished.cli.home, DETERMINED)
    ended = Counter(
        event.get("final") or event["training"]
        for event in told(attempts[0])
        if event["event"] in ("training_finished", "final_scored")
        and event["state"] not in ("cancelled", "failed")
    )
    assert set(ended.values()) == {1}
    assert len(ended) == NUM_TRAININGS + NUM_FINALS


def test_a_run_without_tracking_leaves_mlflow_to_a_later_sync(attempts, finished: Finished):
    root, (*_, interrupted, ended) = attempts
    before = statuses(root / "home")
    assert "RUNNING" not in before.values()
    assert before.keys() != statuses(finished.cli.home).keys()
    assert "mlflow" not in ended.said.removeprefix(interrupted.said).lower()

    cli = Cli(root / "home", root / "sweep.yaml")
    for _ in range(2):
        assert cli("sync").returncode == 0
        assert statuses(root / "home") == statuses(finished.cli.home)


def statuses(home: Path) -> dict[str, str]:
    """MLflow's runs by the ids of their stages."""
    from mlflow import MlflowClient

    from service.tracking import default_uri

    client = MlflowClient(default_uri(Paths(home)))
    experiment = client.get_experiment_by_name("micro")
    runs = client.search_runs([experiment.experiment_id])
    found = {run.data.tags["fairway.id"]: run.info.status for run in runs}
    assert len(found) == len(runs)
    return found

"""Anything killed at any moment: the same command goes on, and every result is there once.

Fifty kills by a seed are benchmarks/kills.py; here is one of each kind.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest
from ray.cluster_utils import Cluster

from tests.integration.conftest import (
    NUM_FINALS,
    NUM_TRAININGS,
    TRUNK_STEPS,
    Cli,
    Finished,
    by_point,
    events,
    make_cli,
)

# Starts of Ray; on a machine that is busy with other work they take minutes.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore::ResourceWarning")]
PATIENCE_S = 900.0
DETERMINED = ["weights_sha256", "artifact_bytes", "entry"]


@dataclass
class Disturbed:
    """A sweep under way in a process of its own, on a Ray of its own or at an address."""

    cli: Cli
    process: Popen[bytes]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def checkpoints(self, kind: str) -> int:
        return len(list(self.cli.home.glob(f"store/{kind}/**/checkpoint/*/index.json")))

    def finals(self) -> int:
        return len(list(self.cli.home.glob("store/finals/*/result.json")))

    def kill_a_rank_in_the_trunk(self) -> None:
        """As soon as there is a checkpoint to go on from."""
        self.wait_until(lambda: len(self.ranks()) == 2)
        ranks = self.ranks()  # found before they begin: the trunk takes no longer than a look
        self.wait_until(lambda: self.checkpoints("states") > 0)
        os.kill(ranks[-1], signal.SIGKILL)

    def ranks(self) -> list[int]:
        return titled("ray::RayTrainWorker", below(self.process.pid))

    def kill_a_trial(self) -> None:
        os.kill(titled("ray::ImplicitFunc", below(self.process.pid))[0], signal.SIGKILL)

    def kill_everything(self) -> None:
        for pid in [self.process.pid, *below(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # went with its parent
        self.process.wait()

    def end(self) -> None:
        assert self.process.wait(timeout=PATIENCE_S) == 0, self.log()

    def log(self) -> str:
        return (self.cli.home / "run.log").read_text()


def below(parent: int) -> list[int]:
    """All processes that descend from one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            ppid = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
        children.setdefault(ppid, []).append(int(path.parent.name))
    found, left = [], [parent]
    while left:
        found += (more := children.get(left.pop(), []))
        left += more
    return found


def titled(word: str, pids: list[int]) -> list[int]:
    """Those of some processes whose title, which Ray sets, begins with a word."""
    found = []
    for pid in pids:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(word.encode()):
            found.append(pid)
    return found


@contextmanager
def begin(root: Path, *where: str) -> Iterator[Disturbed]:
    cli = make_cli(root)
    cli.home.mkdir(exist_ok=True)
    process = cli.start("run", str(cli.sweep), *(where or ("--num-cpus", "2")))
    run = Disturbed(cli, process)
    try:
        yield run
    finally:
        if process.poll() is None:
            run.kill_everything()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_ended_as(finished: Finished, cli: Cli) -> None:
    """The same results as an undisturbed run, and each stage once."""
    assert by_point(cli.home, DETERMINED) == by_point(finished.cli.home, DETERMINED)
    ended = Counter(
        event.get("final") or event.get("training")
        for event in events(cli.home)
        if event["event"] in ("training_finished", "final_scored")
    )
    assert set(ended.values()) == {1}
    assert len(ended) == NUM_TRAININGS + NUM_FINALS


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A rank killed within the trunk, a trial while its gang comes back, a final's process at work,
    then the command alone, whose Ray must end by itself; then run again to the end."""
    root = tmp_path_factory.mktemp("killed")
    with begin(root) as run:
        run.kill_a_rank_in_the_trunk()
        run.kill_a_trial()
        run.wait_until(lambda: run.finals() > 0)
        run.kill_a_trial()
        run.wait_until(lambda: run.finals() > 2)
        started = below(run.process.pid)
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
    with begin(root) as again:
        again.end()
    # What a killed command had started ends by itself; its tracker looks for it for a while.
    deadline = time.monotonic() + 120
    while (left := [pid for pid in started if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    return again.cli


def test_mlflow_has_each_run_once_after_the_kills(killed: Cli):
    from mlflow import MlflowClient

    from service.paths import Paths
    from service.tracking import default_uri

    client = MlflowClient(default_uri(Paths(killed.home)))
    experiment = client.get_experiment_by_name("micro")
    runs = client.search_runs([experiment.experiment_id])

    names = Counter(run.data.tags["fairway.id"] for run in runs)
    assert set(names.values()) == {1}
    assert len(names) == 1 + NUM_TRAININGS + NUM_FINALS


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def test_whatever_is_killed_the_results_are_those_of_an_undisturbed_run(
    killed: Cli, finished: Finished
):
    assert_ended_as(finished, killed)


def test_a_killed_rank_costs_a_gang_and_nothing_that_was_saved(killed: Cli):
    found = events(killed.home)
    (trunk,) = [event for event in found if event["event"] == "trunk_finished"]
    gangs = [event for event in found if event["event"] == "gang_started"]

    assert trunk["steps_computed"] < TRUNK_STEPS  # the rest was in its checkpoint
    assert len(gangs) == 2


def test_the_node_of_a_gang_may_die_under_it(
    finished: Finished, tmp_path: Path, two_nodes: Cluster
):
    second = two_nodes.add_node(num_cpus=2)  # the gang fits here alone
    with begin(tmp_path, "--address", two_nodes.address) as run:
        run.wait_until(lambda: run.checkpoints("states") > 0)
        two_nodes.remove_node(second, allow_graceful=False)
        two_nodes.add_node(num_cpus=2)
        run.end()

    assert_ended_as(finished, run.cli)

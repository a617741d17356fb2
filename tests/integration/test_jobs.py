"""Jobs on this machine: each runs once, outlives whoever started it, and tells how it ended."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.files import JobFiles, running_attempts
from service.jobs.local import LocalRunner
from service.jobs.runner import Job, JobState
from tests import tiny
from tests.dispatching import ROOT, kill_group, wait_until
from tests.serving import SWEEP, home_with
from trainer.codec import to_yaml
from trainer.data.shards import Dataset

pytestmark = pytest.mark.timeout(500)

RECORD = "import os, sys; open('../ran', 'a').write(f'{os.getcwd()} {sys.argv[1:]}\\n')"
SLEEP = f"{RECORD}; import time; time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
POLITE = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit('told')); {SLEEP}"


class Bench:
    """A home with one job, and what its program left behind."""

    def __init__(self, root: Path) -> None:
        self.job = Job("sweep-1", 1, root / "home", root / "bundle", ("a.b=c",))
        self.job.bundle.mkdir(parents=True)
        self.files = JobFiles.of(self.job)
        self.ran = root / "ran"

    def start(self, code: str, runner: LocalRunner | None = None) -> LocalRunner:
        runner = runner or runner_of(code)
        runner.start(self.job)
        return runner

    def wait_until_it_works(self) -> None:
        wait_until(self.ran.is_file)

    def wait_until_ended(self) -> JobState:
        """As a service that has just been started sees it."""
        wait_until(lambda: LocalRunner().state(self.job).phase == "ended")
        return LocalRunner().state(self.job)

    def pid(self) -> int:
        begun = self.files.begun()
        assert begun is not None
        return begun.pid

    def log(self) -> list[str]:
        return self.job.log.read_text().splitlines()


def runner_of(code: str, stop_s: float = 240.0) -> LocalRunner:
    return LocalRunner(None, (sys.executable, "-c", code), stop_s)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bench = Bench(tmp_path)
    yield bench
    while bench.files.state().phase == "running":
        if bench.files.begun() is not None:
            kill_group(bench.pid())
        time.sleep(0.02)


def test_a_job_runs_the_sweep_in_its_bundle_and_its_exit_code_is_kept(bench: Bench):
    bench.start(f"{RECORD}; sys.exit(3)")

    state = bench.wait_until_ended()

    words = ["sweep.yaml", "--home", str(bench.job.home), "--no-tracking"]
    words += ["--expect", "sweep-1", "-S", "a.b=c"]
    assert state == JobState("ended", 3, "ended with exit code 3")
    assert bench.ran.read_text() == f"{bench.job.bundle} {words}\n"


def test_a_submission_that_has_become_another_sweep_is_refused_by_its_job(
    bench: Bench, tmp_path: Path, tiny_dataset: Dataset
):
    home_with(tmp_path, tiny_dataset)
    for name, document in (("sweep", SWEEP), ("micro", tiny.recipe_data())):
        (bench.job.bundle / f"{name}.yaml").write_text(to_yaml(document))
    job = Job("micro-0123456789ab", 1, bench.job.home, bench.job.bundle)

    LocalRunner().start(job)
    wait_until(lambda: LocalRunner().state(job).phase == "ended")

    assert LocalRunner().state(job).exit_code == 2
    said = job.log.read_text().splitlines()[1:]
    assert len(said) == 1
    assert said[0].startswith("this submission is sweep micro-")
    assert said[0].endswith("by now (code, data or a recipe has changed); submit it again")
    assert [folder.name for folder in (bench.job.home / "sweeps").iterdir()] == [job.sweep_id]


def test_a_runner_forgets_the_processes_of_jobs_that_have_ended(bench: Bench):
    runner = bench.start(RECORD)
    wait_until(lambda: runner.state(bench.job).phase == "ended")

    assert runner._started == {}


def test_all_that_a_job_says_is_in_the_log_of_its_sweep(bench: Bench):
    bench.start("import sys; print('data'); sys.exit('what went wrong')")

    bench.wait_until_ended()

    assert bench.log() == ["event=attempt number=1", "data", "what went wrong"]


def test_the_number_of_cpus_reaches_the_sweep(bench: Bench):
    bench.start("", LocalRunner(3, (sys.executable, "-c", RECORD)))

    bench.wait_until_ended()

    assert "'--num-cpus', '3'" in bench.ran.read_text()


def test_a_job_that_many_services_start_at_once_runs_once(bench: Bench):
    runners = [runner_of(RECORD) for _ in range(6)]
    threads = [threading.Thread(target=runner.start, args=(bench.job,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    bench.wait_until_ended()
    wait_until(lambda: all(runner.state(bench.job).phase == "ended" for runner in runners))

    assert len(bench.ran.read_text().splitlines()) == 1


def test_an_attempt_that_has_ended_is_not_run_again(bench: Bench):
    bench.start(RECORD)
    bench.wait_until_ended()

    bench.start(RECORD)

    assert LocalRunner().state(bench.job).exit_code == 0
    assert len(bench.ran.read_text().splitlines()) == 1


def test_an_older_attempt_that_comes_late_does_not_run(bench: Bench):
    newer = Job(bench.job.sweep_id, 2, bench.job.home, bench.job.bundle)
    assert JobFiles.of(newer).call_off()

    runner = bench.start(RECORD)
    wait_until(lambda: runner.state(bench.job).phase == "ended")

    assert not bench.ran.exists()


def test_a_killed_job_has_no_exit_code(bench: Bench):
    bench.start(SLEEP)
    bench.wait_until_it_works()

    kill_group(bench.pid())

    state = bench.wait_until_ended()
    assert state.exit_code is None
    assert "killed" in state.message


def test_a_sweep_killed_alone_is_told_from_one_that_failed(bench: Bench):
    bench.start(f"{RECORD}; os.kill(os.getpid(), 9)")

    assert bench.wait_until_ended() == JobState("ended", None, "killed by SIGKILL")


def test_a_job_whose_keeper_was_killed_still_runs_and_can_be_stopped(bench: Bench):
    bench.start(POLITE)
    bench.wait_until_it_works()
    os.kill(bench.pid(), signal.SIGKILL)
    assert running_attempts(bench.job.sweep) == [1]

    runner_of(POLITE).stop(bench.job)

    bench.wait_until_ended()
    assert bench.log()[-1] == "told"


def test_a_job_is_asked_to_end_and_says_its_last_words(bench: Bench):
    bench.start(POLITE)
    bench.wait_until_it_works()

    runner_of(POLITE).stop(bench.job)

    assert bench.wait_until_ended().exit_code == 1
    assert bench.log()[-1] == "told"


def test_a_job_that_does_not_end_is_killed(bench: Bench):
    runner = bench.start("", runner_of(DEAF, stop_s=0.5))
    bench.wait_until_it_works()

    runner.stop(bench.job)
    runner.stop(bench.job)

    assert bench.wait_until_ended().exit_code is None


def test_a_job_that_is_stopped_before_it_begins_never_does(bench: Bench):
    LocalRunner().stop(bench.job)

    bench.start(RECORD)

    assert LocalRunner().state(bench.job) == JobState("ended", None, "stopped before it began")
    assert not bench.ran.exists()


def test_a_bundle_that_is_gone_is_told_in_one_line(bench: Bench):
    bench.job.bundle.rmdir()
    bench.start(RECORD)

    assert bench.wait_until_ended().exit_code == 2
    assert bench.log()[1:] == [f"{bench.job.bundle}: No such file or directory; submit it again"]


def test_a_job_whose_python_does_not_start_is_not_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    runner = bench.start(RECORD)

    wait_until(lambda: runner.state(bench.job).phase == "ended")

    assert "before it began; see" in runner.state(bench.job).message
    assert "Fatal Python error" in bench.job.log.read_text()


def test_a_sweep_is_handed_no_secrets(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    secrets = ("FAIRWAY_TOKEN", "FAIRWAY_WEBHOOK_SECRET", "MY_DATABASE_URL", "PGPASSWORD")
    for name in secrets:
        monkeypatch.setenv(name, "keep this to yourself")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a local job has a Ray of its own
    monkeypatch.setenv("HF_HOME", "/data")

    bench.start("import os; print(*os.environ)")
    bench.wait_until_ended()

    names = set(bench.log()[-1].split())
    assert "HF_HOME" in names
    assert not names & {*secrets, "RAY_ADDRESS"}


def test_an_assignment_is_handed_on_as_it_is(bench: Bench, tmp_path: Path):
    hostile = f"a.b=$(touch {tmp_path}/broken); 'x' --home /"
    job = Job("sweep-1", 1, bench.job.home, bench.job.bundle, ("--home=/", hostile))
    runner_of("import json, sys; print(json.dumps(sys.argv[-4:]))").start(job)

    bench.wait_until_ended()

    assert json.loads(bench.log()[-1]) == ["-S", "--home=/", "-S", hostile]
    assert not (tmp_path / "broken").exists()

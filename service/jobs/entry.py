"""A job's own process: it holds the attempt, runs the sweep as its child, records how that ended.

`python -m service.jobs.entry --home H --bundle B --sweep ID --attempt N [-S a.b=c] [--program P]`
runs `P sweep.yaml --home H --no-tracking --expect ID -S a.b=c` in the bundle, P being
`fairway run` unless told otherwise, which refuses what has become another sweep since it was
queued. An attempt that another process holds or held is left alone, silently: its log is not ours.
What is asked of this process by SIGTERM or SIGINT goes to the child.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from service.jobs.files import JobFiles, Taken
from service.jobs.runner import Job
from trainer.runtime.environment import without_secrets

PROGRAM = (sys.executable, "-m", "service", "run")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def command(
    job: Job, *, num_cpus: int | None = None, program: Sequence[str] = (), python: str | None = None
) -> list[str]:
    """The command line that runs a job; `program` replaces `fairway run`."""
    words = [python or sys.executable, "-m", "service.jobs.entry"]
    words += ["--home", str(job.home), "--bundle", str(job.bundle)]
    words += ["--sweep", job.sweep_id, "--attempt", str(job.attempt)]
    words += [] if num_cpus is None else ["--num-cpus", str(num_cpus)]
    words += [f"-S{assignment}" for assignment in job.assignments]  # in one: it may begin with a -
    return words + (["--program", shlex.join(program)] if program else [])


def run(job: Job, num_cpus: int | None, program: Sequence[str]) -> int:
    """Run a job to its end, unless that is done already; return what the sweep's process did."""
    files = JobFiles.of(job)
    words = [*program, "sweep.yaml", "--home", str(job.home), "--no-tracking"]
    words += ["--expect", job.sweep_id]
    words += [] if num_cpus is None else ["--num-cpus", str(num_cpus)]
    words += [word for assignment in job.assignments for word in ("-S", assignment)]
    try:
        with files.begin() as held:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab", buffering=0) as log:
                log.write(f"event=attempt number={job.attempt}\n".encode())
                code, message = _run_child(words, job.bundle, log, held)
            files.end(code, message)
    except Taken:
        return 0
    return code if code >= 0 else 128 - code


def _run_child(words: list[str], bundle: Path, log: IO[bytes], held: int) -> tuple[int, str]:
    """Its exit code, negative if a signal ended it, and that in words."""
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    for number in _SIGNALS:
        signal.signal(number, pass_on)
    environment = without_secrets() | {"PYTHONUNBUFFERED": "1"}  # or the log lags behind
    try:
        child = subprocess.Popen(
            words,
            cwd=bundle,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(held,),  # the attempt is taken as long as the sweep's process lives
        )
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; submit it again"
        log.write(f"{message}\n".encode())
        return 2, message
    for number in asked[:1]:  # it came before there was a child
        child.send_signal(number)
    code = child.wait()
    if code < 0:
        return code, f"killed by {signal.Signals(-code).name}"
    return code, f"ended with exit code {code}"


def main() -> None:
    """Run the job that the command line names; the exit code is the sweep's."""
    parser = argparse.ArgumentParser(prog="python -m service.jobs.entry", allow_abbrev=False)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--sweep", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--program", type=shlex.split, default=PROGRAM)
    parser.add_argument("-S", action="append", default=[], dest="assignments")
    told = parser.parse_args()
    job = Job(told.sweep, told.attempt, told.home, told.bundle, tuple(told.assignments))
    sys.exit(run(job, told.num_cpus, told.program))


if __name__ == "__main__":
    main()

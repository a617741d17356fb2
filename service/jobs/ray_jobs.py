"""Jobs of a Ray cluster, by its Jobs API: each runs on the head, and outlives us.

The job's files on the shared home tell how it stands. Ray is asked where they cannot: before a
job has begun, and after one that left no word. Ray's client (2.60) sets no time limits, so every
call is made in a thread of its own, under a deadline.
"""

import hashlib
import ipaddress
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from service.jobs.entry import command
from service.jobs.files import JobFiles
from service.jobs.runner import STOP_S, Job, JobState
from trainer.errors import BackendError, UsageError
from trainer.runtime.environment import prepare_for_ray

T = TypeVar("T")
DEADLINE_S = 15.0
_CONNECT_S, _ANSWER_S = 3.0, 10.0
_UNKNOWN = "status code 404"  # how the client tells that there is no such job


class RayJobRunner:
    """Runs jobs on the cluster whose dashboard is at `address`; thread-safe.

    With RAY_AUTH_MODE=token in the environment Ray sends the cluster's token with every request.
    UsageError for an address that is none, or that would be spoken to in the open without one.
    """

    name = "ray"

    def __init__(
        self,
        address: str,
        program: Sequence[str] = (),
        python: str = sys.executable,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """`program` replaces `fairway run`; `python` is the interpreter on the cluster's head;
        `deadline_s` is for one question to Ray."""
        self._deadline_s = deadline_s
        self._address = _checked(address)
        self._program = tuple(program)
        self._python = python
        self._turn = threading.Lock()
        self._client: Any = None

    def check(self) -> None:
        self._ask(lambda client: client.get_version())

    def start(self, job: Job) -> None:
        """Submit a job, unless its files or Ray know it."""
        # An id that is used twice is an error of the server's, so the question comes first.
        if self.state(job).phase != "absent":
            return
        entrypoint = shlex.join(command(job, program=self._program, python=self._python))
        self._ask(
            lambda client: client.submit_job(
                entrypoint=entrypoint,
                submission_id=_id_on_cluster(job),
                runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{STOP_S:.0f}"}},
                metadata={"sweep": job.sweep_id, "attempt": str(job.attempt)},
            )
        )

    def state(self, job: Job) -> JobState:
        """Tell where a job stands by its files, or by Ray where they cannot tell."""
        files = JobFiles.of(job)
        told = files.state()
        if told.phase == "running" or files.is_settled():
            return told
        details = self._details(job)
        if details is None:
            return told
        if not details.status.is_terminal():
            return JobState("running", message=details.message or "")
        told = files.state()  # it may have ended between the two looks
        if told.phase == "absent":
            words = (details.message or f"Ray says {details.status}").splitlines()
            return JobState("ended", message=words[0] if words else "")
        return told

    def stop(self, job: Job) -> None:
        """Call a job off, and have Ray end it if it knows it."""
        files = JobFiles.of(job)
        had_ended = files.is_settled()
        files.call_off()  # one that Ray has still to start will find that it must not
        if not had_ended and self._details(job) is not None:
            self._ask(lambda client: client.stop_job(_id_on_cluster(job)))

    def _details(self, job: Job) -> Any:
        """What Ray knows of a job, None if nothing."""
        try:
            return self._ask(lambda client: client.get_job_info(_id_on_cluster(job)))
        except _NoSuchJob:
            return None

    def _ask(self, question: Callable[[Any], T]) -> T:
        """Put a question to the cluster under the deadline; BackendError if it has no answer."""
        connect = _client_type()  # imports Ray, which takes seconds that are not the cluster's
        answers: list[T] = []
        errors: list[Exception] = []

        def put() -> None:
            try:
                answers.append(question(self._connected(connect)))
            except Exception as error:  # told to whoever waits
                errors.append(error)

        thread = threading.Thread(target=put, name="ask Ray", daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if answers:
            return answers[0]
        if errors and _UNKNOWN in str(errors[0]):
            raise _NoSuchJob(str(errors[0]))
        with self._turn:
            self._client = None  # the next question begins anew
        words = str(errors[0]).splitlines() if errors else [f"no answer in {self._deadline_s:g} s"]
        raise BackendError(
            f"Ray at {self._address}: {words[0] if words else repr(errors[0])}; check that the "
            "head is up and that RAY_AUTH_MODE and its token are the cluster's"
        ) from (errors[0] if errors else None)

    def _connected(self, connect: Callable[[str], Any]) -> Any:
        with self._turn:
            client = self._client
        if client is None:
            client = connect(self._address)
            with self._turn:
                self._client = client
        return client


class _NoSuchJob(Exception):
    """Ray has no job of this id."""


def _id_on_cluster(job: Job) -> str:
    """The job's id, and a mark of its home: another home may run the same sweep there."""
    return f"{job.id}-{hashlib.sha256(str(job.home).encode()).hexdigest()[:8]}"


@cache
def _client_type() -> Callable[[str], Any]:
    prepare_for_ray()
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client with limits of time, so that no thread waits for ever."""

        def _do_request(self, *words: Any, **options: Any) -> Any:
            return super()._do_request(*words, timeout=(_CONNECT_S, _ANSWER_S), **options)

    return Client


def _checked(address: str) -> str:
    """The address as http(s)://host:port."""
    parts = urlsplit(address)
    try:
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port is not None
    except ValueError:
        known = False
    if not known or parts.username is not None or parts.path.strip("/") or parts.query:
        raise UsageError(
            f"{parts.hostname or 'cluster'}: not the address of a Ray dashboard; give it as "
            "http://127.0.0.1:8265 or https://HOST:PORT"
        )
    if parts.scheme == "http" and not _is_loopback(str(parts.hostname)) and not _sends_token():
        raise UsageError(
            f"http://{parts.hostname}:{parts.port}: whoever reaches this cluster may run code "
            "there; set RAY_AUTH_MODE=token on all its nodes and here, and put TLS in front or "
            "use a tunnel to 127.0.0.1"
        )
    return f"{parts.scheme}://{parts.netloc}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sends_token() -> bool:
    prepare_for_ray()
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return is_token_auth_enabled()

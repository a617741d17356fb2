"""Fresh queues for tests: databases, users, sweeps to submit, and a worker that may be killed."""

import hashlib
import itertools
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Engine

from service.queue.database import is_reachable, open_database, writing
from service.queue.queue import Queue
from service.queue.records import (
    Conflict,
    NewSweep,
    QueueEvent,
    Role,
    Summary,
    SweepRecord,
    UnknownSweep,
    User,
    Verb,
)
from service.queue.schema import metadata
from service.states import State

ANN, BEN = User("ann", Role.SUBMITTER), User("ben", Role.SUBMITTER)
READER, ADMIN = User("rae", Role.READER), User("ada", Role.ADMIN)


def new_sweep(label: object = 0, **changes: Any) -> NewSweep:
    """A submission as `planning` would make it, told apart by `label`."""
    digest = hashlib.sha256(f"{label} {sorted(changes.items())}".encode()).hexdigest()
    new = NewSweep(
        sweep_id=f"toy-{label}",
        name="toy",
        recipe="quickstart",
        bundle=digest[:20],
        assignments=("train.iterations=20",),
        digest=digest,
        plan={"label": label, "trainings": 2, "finals": 16, "cap_bytes": 16_000_000},
    )
    return replace(new, **changes)


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'service.db'}"


def replayed(events: list[QueueEvent]) -> dict[str, dict[str, Any]]:
    """What a listener to all events believes of each sweep."""
    believed: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.event == "submitted" and event.facts["is_new"]:
            believed[event.sweep_id] = {"state": "queued", "attempt": 0, "reason": None}
            believed[event.sweep_id] |= {"gangs_held": 0, "restarts": 0}
        if event.event == "changed":
            believed[event.sweep_id] |= event.facts
    return believed


def told(record: SweepRecord) -> dict[str, Any]:
    """A sweep as `replayed` would know it."""
    names = ("state", "attempt", "reason", "gangs_held", "restarts")
    return {name: getattr(record, name) for name in names}


def every(queue: Queue) -> list[SweepRecord]:
    """All sweeps of a queue, page by page."""
    found: list[SweepRecord] = []
    cursor = None
    while True:
        page = queue.page(limit=7, cursor=cursor)
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found


def act_at_random(queue: Queue, chance: random.Random, labels: int) -> tuple[str, Any]:
    """Do one thing that a user or the dispatcher does; return what was acknowledged."""
    label = chance.randrange(labels)
    sweep_id = f"toy-{label}"
    match chance.choice(("submit", "ask", "claim", "advance")):
        case "submit":
            return "submitted", queue.submit(new_sweep(label), ANN, f"key {label}")[0].sweep_id
        case "ask":
            try:
                return "asked", queue.ask(sweep_id, chance.choice(list(Verb)), ANN).sweep_id
            except (Conflict, UnknownSweep):
                return "refused", sweep_id
        case "claim":
            waiting = queue.queued()
            record = queue.claim(chance.choice(waiting).sweep_id, 1) if waiting else None
            return "claimed", record and (record.sweep_id, record.attempt)
    acting = queue.acting()
    if acting:
        record = chance.choice(acting)
        spent = Summary(worker_seconds=record.summary.worker_seconds + 1)
        state = chance.choice([s for s in State if s != State.STARTING])
        queue.advance(record, state=state, reason="by chance", summary=spent)
    return "advanced", None


def kill_at_random(url: str, rounds: int) -> list[tuple[str, Any]]:
    """Let a child work on the queue and kill it amid it, again and again; return what was
    acknowledged to the children. Forks: for a process that does nothing else."""
    chance = random.Random(6)
    acknowledged: list[tuple[str, Any]] = []
    for seed in range(rounds):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _work_until_killed(url, seed, writer)
        os.close(writer)
        with open(reader, encoding="utf-8") as lines:
            first = [lines.readline() for _ in range(chance.randint(1, 25))]
            time.sleep(chance.uniform(0.0, 0.004))  # a transaction takes about as long
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            whole = [line for line in (*first, *lines) if line.endswith("\n")]
        acknowledged += [tuple(json.loads(line)) for line in whole]
    return acknowledged


def _work_until_killed(url: str, seed: int, writer: int) -> None:
    try:
        queue, chance = Queue(open_database(url)), random.Random(seed)
        for label in itertools.count(3 * seed):  # some of the last round's again, then new ones
            queue.submit(new_sweep(label), ANN, f"key {label}")
            os.write(writer, (json.dumps(("submitted", f"toy-{label}")) + "\n").encode())
            for _ in range(6):
                done = act_at_random(queue, chance, label + 1)
                os.write(writer, (json.dumps(done) + "\n").encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def claim_all(url: str, num: int) -> list[str]:
    """Once told to on stdin, try to claim toy-0 to toy-`num`; return which were got."""
    queue = Queue(open_database(url))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    return [f"toy-{label}" for label in range(num) if queue.claim(f"toy-{label}", 1) is not None]


def open_and_close(url: str) -> bool:
    """Open a database, which makes its tables if it has none; whether it then answers."""
    engine = open_database(url)
    answers = is_reachable(engine)
    engine.dispose()
    return answers


def in_another_process(call: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a function of this module in a fresh interpreter; its result is printed as JSON."""
    code = f"import json; from tests import queues; print(json.dumps(queues.{call}(*{arguments})))"
    root = Path(__file__).resolve().parents[1]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=pipe, stdout=pipe, text=True
    )


@dataclass(frozen=True)
class PostgresServer:
    """A throw-away server on a socket in its own folder."""

    folder: Path
    tools: Path
    user: str | None

    def start(self) -> None:
        options = f"-c fsync=off -c listen_addresses='' -c unix_socket_directories='{self.folder}'"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", self._data, "-l", log, "-w", "-t", "300", "-o", options, "start")

    def stop(self) -> None:
        """Stop it as a crash would: nothing is flushed or said goodbye to."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "-t", "300", "stop")

    def create(self) -> None:
        who = ["-U", "fairway", "-A", "trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run("initdb", "-D", self._data, *who)

    def empty_database(self) -> str:
        """Return the address of a database without tables; the one before is gone."""
        engine = sqlalchemy.create_engine(self._url, isolation_level="AUTOCOMMIT")
        with engine.connect() as db:
            db.exec_driver_sql("DROP SCHEMA public CASCADE")
            db.exec_driver_sql("CREATE SCHEMA public")
        engine.dispose()
        return self._url

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    @property
    def _url(self) -> str:
        return f"postgresql+psycopg://fairway@/postgres?host={self.folder}&connect_timeout=240"

    def _run(self, tool: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.tools / tool, *arguments],
            user=self.user,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be kept open by the server
            stderr=subprocess.DEVNULL,
            timeout=400,
        )
        assert done.returncode == 0, f"{tool} failed; its log:\n{self._log()}"

    def _log(self) -> str:
        log = self.folder / "log"
        return log.read_text(encoding="utf-8") if log.exists() else "none"


def empty_tables(engine: Engine) -> None:
    """Take all rows from a PostgreSQL database; cheaper than making its tables anew."""
    with writing(engine) as db:
        db.exec_driver_sql(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")


def postgres_tools() -> Path | None:
    """The folder of PostgreSQL's server programs, the newest there are."""
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    if installed:
        return installed[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@contextmanager
def postgres_server(tools: Path) -> Iterator[PostgresServer]:
    """Run a server; as an ordinary user, because it refuses to be root's."""
    folder = Path(tempfile.mkdtemp(prefix="fairway-pg-"))  # a socket's path has 107 bytes at most
    user = _ordinary_user() if os.geteuid() == 0 else None
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    server = PostgresServer(folder, tools, user)
    try:
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _ordinary_user() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"

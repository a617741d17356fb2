"""Starts the sweeps of the queue, watches their jobs, and passes on what is asked of them.

It keeps nothing that must not be lost: every tick reads the queue, the jobs' files and the
ledgers, and `decisions` says what follows. Whatever was claimed and not started when the service
died is started by the next one, under the same id; what ended meanwhile is told then; a job that
runs although the queue says otherwise is stopped.
"""

import logging
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from service.control import clear_order, read_order, write_order
from service.jobs.decisions import Decision, Progress, Sight, decide, progress_of, summary_of
from service.jobs.files import JobFiles, running_attempts
from service.jobs.runner import Job, JobState, Runner
from service.ledger import SweepView
from service.paths import Paths
from service.queue.order import choose
from service.queue.queue import Queue
from service.queue.quotas import Quotas
from service.queue.records import (
    Conflict,
    Role,
    Summary,
    SweepRecord,
    UnknownSweep,
    User,
    Verb,
    Want,
)
from service.states import State
from service.tails import Tails
from trainer.errors import BackendError, DataError

logger = logging.getLogger(__name__)

TICK_S = 1.0
_STOP_AGAIN_S = 30.0  # a request to stop that had no effect is repeated
_QUOTA = User("quota", Role.ADMIN)  # who pauses the sweeps of those that have spent theirs
_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds until what does not end by itself is stopped, and between two looks for strays."""

    cancel_s: float = 30.0
    """A job that was told to cancel."""
    finish_s: float = 60.0
    """A job whose sweep has finished, as its ledger says."""
    strays_s: float = 60.0


class Dispatcher:
    """The one dispatcher of a home; `trouble` says why nothing moves, None while it does."""

    def __init__(
        self,
        queue: Queue,
        quotas: Quotas,
        runner: Runner,
        paths: Paths,
        tails: Tails,
        slots: int,
    ) -> None:
        """`slots`: how many gangs may run at once."""
        self.patience = Patience()
        self.trouble: str | None = None
        self._queue = queue
        self._quotas = quotas
        self._runner = runner
        self._paths = Paths(paths.home.resolve())
        self._tails = tails
        self._slots = slots
        self._since: dict[tuple[str, str], float] = {}
        """When (monotonic) something was first seen of a job."""
        self._strays_due = 0.0

    def run_forever(self, stop: threading.Event) -> None:
        """Tick every second until told to stop. What is out of reach is tried again."""
        while not stop.is_set():
            try:
                self.tick()
            except BackendError as error:
                if self.trouble != str(error):
                    logger.warning("%s", error)
                self.trouble = str(error)
            except Exception as error:  # a bug: shown, and no reason to leave the queue unattended
                logger.exception("dispatcher")
                self.trouble = f"{type(error).__name__}: {error}; see the service's log"
            stop.wait(TICK_S)

    def tick(self) -> None:
        """Look at everything once and do what follows. BackendError where the jobs or the queue
        are out of reach: all states stay as they were told last."""
        if time.monotonic() >= self._strays_due:
            self._stop_strays()
            self._strays_due = time.monotonic() + self.patience.strays_s
        for record in self._queue.acting():
            self._follow(record)
        self._pause_spenders()
        self._start_queued()
        self.trouble = None

    def _follow(self, record: SweepRecord) -> None:
        """One sweep under way: tell it what is wanted, the queue where it stands."""
        job = self._job(record)
        state = self._runner.state(job)
        sight, summary = self._look(record, job, state)
        decision = decide(sight)
        if state.phase == "running":
            self._tell(record)
        told = self._advance(record, decision, summary)
        if state.phase == "ended":
            self._since = {key: at for key, at in self._since.items() if key[0] != job.id}
        elif told and decision.does == "start":
            self._launch(record)
        elif decision.does == "stop" and self._is_due(job, "stop", _STOP_AGAIN_S):
            self._runner.stop(job)

    def _look(self, record: SweepRecord, job: Job, state: JobState) -> tuple[Sight, Summary | None]:
        """What is seen of a sweep after its job was; and its figures if they have changed."""
        progress, summary, fault = Progress(), None, None
        begun = JobFiles.of(job).begun()
        if begun is not None:
            tail = self._tails.of(record.sweep_id)
            try:
                events = tail.events(after=begun.num_events)

                def read(view: SweepView) -> tuple[Progress, Summary | None]:
                    is_new = view.events != record.summary.num_events
                    return progress_of(view, events), summary_of(view) if is_new else None

                progress, summary = tail.ask(read)
            except DataError as error:
                fault = str(error)
        return (
            Sight(
                record,
                state,
                progress,
                fault,
                _last_line(job.log) if state.phase == "ended" else "",
                state.phase == "running" and self._is_overdue(record, job, progress),
            ),
            summary,
        )

    def _is_overdue(self, record: SweepRecord, job: Job, progress: Progress) -> bool:
        patience = self.patience
        has_finished = progress.ended_as is not None
        return (has_finished and self._lasts(job, "finished", patience.finish_s)) or (
            record.want == Want.CANCEL and self._lasts(job, "cancel", patience.cancel_s)
        )

    def _tell(self, record: SweepRecord) -> None:
        """Write what is wanted where the sweep's driver looks. It forgets what was written before
        it began, so that is written again."""
        sweep = self._paths.sweep(record.sweep_id)
        try:
            order = read_order(sweep)
        except DataError:
            clear_order(sweep)
            order = None
        if record.want == Want.RUN:
            if order is not None:
                clear_order(sweep)
        elif order is None or order.want != record.want:
            write_order(sweep, record.want, record.wanted_by or record.owner)

    def _advance(self, record: SweepRecord, decision: Decision, summary: Summary | None) -> bool:
        """Tell the queue what is new. False if the sweep has moved on there meanwhile."""
        if decision.does == "start" or (
            (decision.state, decision.reason) == (record.state, record.reason)
        ):
            return summary is None or self._queue.advance(record, summary=summary)
        return self._queue.advance(
            record, state=decision.state, reason=decision.reason, summary=summary
        )

    def _launch(self, record: SweepRecord) -> None:
        """Start the job of a claimed sweep, once no earlier attempt is left."""
        sweep = self._paths.sweep(record.sweep_id)
        older = [n for n in running_attempts(sweep) if n != record.attempt]
        for attempt in older:
            self._stop_stray(replace(self._job(record), attempt=attempt))
        if older:
            reason = f"attempt {older[0]} has still to end"
            self._queue.advance(record, state=State.STARTING, reason=reason)
            return
        clear_order(sweep)
        self._runner.start(self._job(record))

    def _start_queued(self) -> None:
        queued = self._queue.queued()
        if not queued:
            return
        acting = self._queue.acting()
        owners = {record.owner for record in (*queued, *acting)}
        quotas = {owner: self._quotas.get(owner) for owner in owners}
        usage = self._queue.usage(time.time())
        for record, verdict in choose(queued, acting, quotas, usage, self._slots):
            if isinstance(verdict, str):
                if (record.state, record.reason) != (State.WAITING, verdict):
                    self._queue.advance(record, state=State.WAITING, reason=verdict)
                continue
            self._runner.check()  # a sweep that cannot start keeps its place
            claimed = self._queue.claim(record.sweep_id, verdict)
            if claimed is not None:
                self._launch(claimed)

    def _pause_spenders(self) -> None:
        """Pause what runs for users who have spent their GPU-hours."""
        acting = [record for record in self._queue.acting() if record.want == Want.RUN]
        if not acting:
            return
        usage = self._queue.usage(time.time())
        for record in acting:
            hours = self._quotas.get(record.owner).gpu_hours
            _, spent_s = usage.get(record.owner, (0, 0.0))
            if hours is not None and spent_s >= hours * 3600.0:
                try:
                    self._queue.ask(record.sweep_id, Verb.PAUSE, _QUOTA)
                except Conflict:
                    continue  # it has just ended, or been told something stronger

    def _stop_strays(self) -> None:
        """Stop jobs that run although the queue says that their sweep or attempt is over."""
        for folder in sorted(self._paths.sweeps.glob("*/jobs")):
            sweep_id = folder.parent.name
            running = running_attempts(self._paths.sweep(sweep_id))
            if not running:
                continue
            try:
                record = self._queue.get(sweep_id)
            except UnknownSweep:
                record = None
            ours = record.attempt if record is not None and record.gangs_held > 0 else None
            for attempt in running:
                if attempt != ours:
                    home = self._paths.home
                    self._stop_stray(Job(sweep_id, attempt, home, home))

    def _stop_stray(self, job: Job) -> None:
        if self._is_due(job, "stop", _STOP_AGAIN_S):
            logger.warning("job %s runs although its sweep or attempt is over: stopped", job.id)
            self._runner.stop(job)

    def _job(self, record: SweepRecord) -> Job:
        limit = f"limits.max_concurrent={record.gangs_held}"
        return Job(
            record.sweep_id,
            record.attempt,
            self._paths.home,
            self._paths.submissions / record.bundle,
            (*record.assignments, limit),
        )

    def _lasts(self, job: Job, what: str, seconds: float) -> bool:
        """Whether something has been so for that long, as far as this process has seen."""
        now = time.monotonic()
        return now - self._since.setdefault((job.id, what), now) >= seconds

    def _is_due(self, job: Job, what: str, every_s: float) -> bool:
        """Whether to do something now that is not to be done again for a while."""
        now = time.monotonic()
        if now - self._since.get((job.id, what), -every_s) < every_s:
            return False
        self._since[job.id, what] = now
        return True


def _last_line(path: Path) -> str:
    """The last line of a log that says something."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")

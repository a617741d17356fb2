"""Starts the sweeps of the queue, watches their jobs, and passes on what is asked of them.

It keeps nothing that must not be lost: every tick reads the queue, the jobs' files and the
ledgers, and `decisions` says what follows. Whatever was claimed and not started when the service
died is started by the next one, under the same id; what ended meanwhile is told then; a job that
runs although the queue says otherwise is stopped.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from service.budget import spent_before, under_way
from service.control import clear_order, read_order, write_order
from service.jobs.decisions import Decision, Progress, Sight, decide, progress_of, summary_of
from service.jobs.files import JobFiles, last_line, running_attempts
from service.jobs.runner import Job, JobState, Runner
from service.ledger import SweepView
from service.paths import Paths
from service.queue.moves import has_got_on
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
from trainer.errors import BackendError, DataError, FairwayError

logger = logging.getLogger(__name__)

TICK_S = 1.0
_STOP_AGAIN_S = 30.0  # a request to stop that had no effect is repeated
_TELL_AGAIN_S = 30.0  # so is an order: a driver whose clock is ahead takes ours for an older run's
_CHECK_S = 15.0  # between two looks whether the jobs are within reach
_QUOTA = User("quota", Role.ADMIN)  # who pauses the sweeps of those that have spent theirs


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds until what does not end by itself is stopped, and between two looks for strays."""

    cancel_s: float = 30.0
    """A job that was told to cancel."""
    finish_s: float = 60.0
    """A job whose sweep has finished, as its ledger says."""
    strays_s: float = 60.0
    restarts_s: tuple[float, ...] = (5.0, 30.0)
    """Before each restart of a sweep whose job was lost."""


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
        self.confirm: Callable[[], None] = lambda: None
        """Asked before every tick: raises where this dispatcher may not dispatch any more."""
        self._queue = queue
        self._quotas = quotas
        self._runner = runner
        self._paths = Paths(paths.home.resolve())
        self._tails = tails
        self._slots = slots
        self._since: dict[tuple[str, str], float] = {}
        """When (monotonic) something was first seen of a job."""
        self._strays_due = 0.0
        self._check_due = 0.0
        self._away: BackendError | None = None
        """Why the jobs are out of reach, by the last look."""
        self._under_way: dict[str, float] = {}
        """Worker-seconds of each acting sweep's stages that have not ended."""
        self._rests: dict[tuple[str, int], float] = {}
        """Until when (monotonic) a sweep rests after the loss of that attempt."""

    def run_forever(self, stop: threading.Event) -> None:
        """Tick every second until told to stop. What is out of reach is tried again."""
        while not stop.is_set():
            try:
                self.tick()
            except (FairwayError, OSError) as error:
                if self.trouble != str(error):
                    logger.warning("%s", error)
                self.trouble = str(error)
            except Exception as error:  # a bug: shown, and no reason to leave the queue unattended
                logger.exception("dispatcher")
                self.trouble = f"{type(error).__name__}: {error}; see the service's log"
            stop.wait(TICK_S)

    def tick(self) -> None:
        """Look at everything once and do what follows. BackendError where the jobs or the queue
        are out of reach: all states stay as they were told last. What cannot be done for one sweep
        is raised, the first of it, once all has been done for the others."""
        self.confirm()
        errors: list[Exception] = []
        if time.monotonic() >= self._check_due:
            self._look_for_jobs()
        if self._away is not None:
            errors.append(self._away)
        if time.monotonic() >= self._strays_due:
            self._stop_strays(errors)
            self._strays_due = time.monotonic() + self.patience.strays_s
        acting = self._queue.acting()
        ids = {record.sweep_id for record in acting}
        self._under_way = {name: s for name, s in self._under_way.items() if name in ids}
        for record in acting:
            with _apart(errors):
                self._follow(record)
        self._pause_spenders()
        if self._away is None:
            self._start_queued(errors)
        if errors:
            raise errors[0]
        self.trouble = None

    def _look_for_jobs(self) -> None:
        """Ask whether jobs are within reach; in every tick while they are not."""
        self._away = None
        try:
            self._runner.check()
        except BackendError as error:
            self._away = error
        else:
            self._check_due = time.monotonic() + _CHECK_S

    def _follow(self, record: SweepRecord) -> None:
        """One sweep under way: tell it what is wanted, the queue where it stands."""
        job = self._job(record)
        state = self._state(job)
        if state is None:
            return
        sight, figures = self._look(record, job, state)
        decision = decide(sight)
        if state.phase == "running":
            self._tell(record)
        told = self._advance(record, decision, figures)
        if told and decision.state == State.QUEUED and decision.reason is not None:  # lost
            pauses = self.patience.restarts_s
            pause_s = pauses[min(sight.record.restarts, len(pauses) - 1)]
            self._rests[record.sweep_id, record.attempt] = time.monotonic() + pause_s
        if state.phase == "ended":
            self._since = {key: at for key, at in self._since.items() if key[0] != job.id}
        elif told and decision.does == "start":
            self._launch(record)
        elif decision.does == "stop" and self._is_due(job, "stop", _STOP_AGAIN_S):
            self._runner.stop(job)

    def _state(self, job: Job) -> JobState | None:
        """Where a job stands; None where only a runner that is out of reach could tell."""
        if self._away is not None:
            files = JobFiles.of(job)
            state = files.state()
            return state if state.phase == "running" or files.is_settled() else None
        try:
            return self._runner.state(job)
        except BackendError:
            self._look_for_jobs()  # or every other sweep would wait for its answer in vain
            raise

    def _look(
        self, record: SweepRecord, job: Job, state: JobState
    ) -> tuple[Sight, "_Figures | None"]:
        """What is seen of a sweep after its job was; and its figures if they have changed."""
        progress, figures, fault = Progress(), None, None
        self._under_way.pop(record.sweep_id, None)
        begun = JobFiles.of(job).begun()
        if begun is not None:
            tail = self._tails.of(record.sweep_id)
            try:
                events = tail.events(after=begun.num_events)

                def read(view: SweepView) -> tuple[Progress, float, _Figures | None]:
                    running_s = under_way(view, time.time(), begun.num_events)
                    if view.events == record.summary.num_events:
                        return progress_of(view, events), running_s, None
                    is_first = record.attempt == 1
                    earlier_s = spent_before(view, begun.num_events) if is_first else 0.0
                    figures = _Figures(summary_of(view), earlier_s)
                    return progress_of(view, events), running_s, figures

                progress, self._under_way[record.sweep_id], figures = tail.ask(read)
            except DataError as error:
                fault = str(error)
        if figures is not None and has_got_on(record.summary, figures.summary):
            record = replace(record, restarts=0)  # as the queue will note
        return (
            Sight(
                record,
                state,
                progress,
                fault,
                last_line(job.log) if state.phase == "ended" else "",
                state.phase == "running" and self._is_overdue(record, job, progress),
            ),
            figures,
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
        elif (
            order is None
            or order.want != record.want
            or abs(time.time() - order.at) >= _TELL_AGAIN_S
        ):
            write_order(sweep, record.want, record.wanted_by or record.owner)

    def _advance(self, record: SweepRecord, decision: Decision, figures: "_Figures | None") -> bool:
        """Tell the queue what is new. False if the sweep has moved on there meanwhile."""
        summary, earlier_s = (figures.summary, figures.earlier_s) if figures else (None, 0.0)
        if decision.does == "start" or (
            (decision.state, decision.reason) == (record.state, record.reason)
        ):
            return summary is None or self._queue.advance(
                record, summary=summary, earlier_s=earlier_s
            )
        return self._queue.advance(
            record,
            state=decision.state,
            reason=decision.reason,
            summary=summary,
            earlier_s=earlier_s,
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

    def _start_queued(self, errors: list[Exception]) -> None:
        now = time.monotonic()
        self._rests = {key: until for key, until in self._rests.items() if until > now}
        queued = [record for record in self._queue.queued() if not self._rests_still(record)]
        if not queued:
            return
        acting = self._queue.acting()
        owners = {record.owner for record in (*queued, *acting)}
        quotas = {owner: self._quotas.get(owner) for owner in owners}
        verdicts = choose(queued, acting, quotas, self._usage(acting), self._slots)
        waits = [(record, verdict) for record, verdict in verdicts if isinstance(verdict, str)]
        self._queue.hold(waits)
        for record, verdict in verdicts:
            if isinstance(verdict, int):
                self._runner.check()  # a sweep that cannot start keeps its place
                claimed = self._queue.claim(record.sweep_id, verdict)
                if claimed is not None:
                    with _apart(errors):
                        self._launch(claimed)

    def _rests_still(self, record: SweepRecord) -> bool:
        """Whether a sweep was lost a moment ago; somebody's word to resume it ends the rest."""
        return record.restarts > 0 and (record.sweep_id, record.attempt) in self._rests

    def _usage(self, acting: Sequence[SweepRecord]) -> dict[str, tuple[int, float]]:
        """What each user holds and has spent, with what runs now."""
        usage = self._queue.usage(time.time())
        for record in acting:
            gangs, spent_s = usage.get(record.owner, (0, 0.0))
            running_s = self._under_way.get(record.sweep_id, 0.0)
            usage[record.owner] = gangs, spent_s + running_s
        return usage

    def _pause_spenders(self) -> None:
        """Pause what runs for users who have spent their GPU-hours."""
        acting = self._queue.acting()
        if not acting:
            return
        usage = self._usage(acting)
        for record in acting:
            if record.want != Want.RUN:
                continue
            hours = self._quotas.get(record.owner).gpu_hours
            _, spent_s = usage.get(record.owner, (0, 0.0))
            if hours is not None and spent_s >= hours * 3600.0:
                try:
                    self._queue.ask(record.sweep_id, Verb.PAUSE, _QUOTA)
                except Conflict:
                    continue  # it has just ended, or been told something stronger

    def _stop_strays(self, errors: list[Exception]) -> None:
        """Stop jobs that run although the queue says that their sweep or attempt is over."""
        for folder in sorted(self._paths.sweeps.glob("*/jobs")):
            with _apart(errors):
                self._stop_strays_of(folder.parent.name)

    def _stop_strays_of(self, sweep_id: str) -> None:
        running = running_attempts(self._paths.sweep(sweep_id))
        if not running:
            return
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


@dataclass(frozen=True, slots=True)
class _Figures:
    """What a ledger says, and how many worker-seconds of it were spent before the first attempt,
    by hand."""

    summary: Summary
    earlier_s: float


@contextmanager
def _apart(errors: list[Exception]) -> Generator[None]:
    """Keep what one sweep raises from the others."""
    try:
        yield
    except Exception as error:
        errors.append(error)

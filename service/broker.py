"""The jobs of a sweep run between those who want them done and the gangs that do them.

A job goes queued → leased to a gang → outcome. `GangPool` runs one Broker as an actor; trials
wait in `run`, rank 0 of a gang asks `take`. A gang whose workers were lost comes back, is given
the job that it had again, and each time counts as a try; one that never gets as far as its first
job is given up. All methods run on one event loop, so none needs a lock. Pure: no Ray, no torch.
"""

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from service.judge import Judge
from service.states import State

Outcome = dict[str, Any]
"""state, reason, tries, occupied_s: what became of a job and what it took."""

ALIKE = ("torch", "device")  # what the ranks of a gang must have in common
SLOW_SHARE = 0.5  # of the median throughput
MAX_SKEW_S = 5.0
MEETING_S = 20.0
ELSEWHERE = "another worker of the gang failed"  # trainer.runtime.distributed


@dataclass
class Job:
    """A job, and how far it is. `leased_at` and `held_s` are monotonic seconds."""

    what: dict[str, Any]
    done: asyncio.Future[Outcome]
    tries: int = 0
    held_s: float = 0.0
    leased_at: float | None = None
    told: tuple[State, str] | None = None
    """That it is to stop, as what, and why."""
    last_fault: str = ""
    is_delivered: bool = False
    rungs: set[int] = field(default_factory=set[int])
    failures: dict[int, str] = field(default_factory=dict[int, str])
    """What each rank of the present try said of its failure."""

    @property
    def id(self) -> str:
        return self.what["id"]

    @property
    def training(self) -> str:
        return self.what.get("for", self.id)

    def seconds(self) -> float:
        """How long gangs have held it so far, all tries together."""
        running = 0.0 if self.leased_at is None else time.monotonic() - self.leased_at
        return self.held_s + running

    def let_go(self) -> None:
        """End the clock of a try."""
        self.held_s, self.leased_at = self.seconds(), None


@dataclass
class Gang:
    """What the broker knows of a gang. `taken` counts the jobs of its present Train run."""

    lease: Job | None = None
    is_up: bool = False
    taken: int = 0
    barren: int = 0
    """Train runs in a row that ended before they had taken a job."""
    is_retired: bool = False
    epoch: int = 0
    """Raised when its workers may be others: Ray leaves the calls of the former ones waiting."""


class Broker:
    """Holds the jobs. `num_gangs` gangs named gang-0, gang-1, … are served."""

    def __init__(
        self,
        num_gangs: int,
        workers: int,
        infra_retries: int,
        judge: Judge | None,
        *,
        one_each: bool,
        idle_s: float,
        meeting_s: float = MEETING_S,
    ) -> None:
        self._gangs = {f"gang-{i}": Gang() for i in range(num_gangs)}
        self._workers = workers
        self._infra_retries = infra_retries
        self._judge = judge
        self._one_each = one_each
        self._idle_s = idle_s
        self._meeting_s = meeting_s
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._seekers: set[str] = set()
        """Gangs that will take a queued job: on their way up, or waiting in `take`."""
        self._events: list[dict[str, Any]] = []
        self._refusal: tuple[State, str] | None = None
        self._drained: tuple[State, str] | None = None
        self._begun: set[str] = set()  # trainings that a gang has worked on, or on their trunks
        self._changed = asyncio.Condition()

    # What trials and the driver ask.

    async def run(self, what: dict[str, Any]) -> Outcome:
        """Have a job done and return its outcome. Asking again while it is under way, or after it
        was done, attaches to it; one that failed or was cancelled is then done again, except a
        trunk that failed: each of its tails asks for it, and all learn the same at no cost."""
        job = self._jobs.get(what["id"])
        if job is not None and job.done.done() and job.is_delivered:
            known = job.done.result()
            if job.what["kind"] == "trunk" and known["state"] == State.FAILED:
                return {**known, "tries": 0, "occupied_s": 0.0}
            job = None if known["state"] in (State.FAILED, State.CANCELLED) else job
        if job is None:
            job = Job(what, asyncio.get_running_loop().create_future())
            self._jobs[job.id] = job
            refusal = self._refusal or (None if job.training in self._begun else self._drained)
            if refusal is not None:
                self._settle(job, *refusal)
            else:
                self._queue.append(job)
                await self._notify()
        outcome = await asyncio.shield(job.done)  # a caller that dies takes nothing with it
        job.is_delivered = True
        return outcome

    async def stop(self, reason: str) -> None:
        """Have running jobs leave at their next step, cancelled; refuse queued and later ones."""
        for job in self._leased():
            job.told = job.told or (State.CANCELLED, reason)
        self._refuse(State.CANCELLED, reason)
        await self._notify()

    async def drain(self, reason: str) -> None:
        """Refuse, as cancelled, the jobs of trainings that no gang has worked on yet."""
        self._drained = self._drained or (State.CANCELLED, reason)
        for job in [job for job in self._queue if job.training not in self._begun]:
            self._queue.remove(job)
            self._settle(job, *self._drained)
        await self._notify()

    async def close(self) -> list[str]:
        """Stop, and return the gangs that have their workers up: these end by themselves."""
        await self.stop("the pool of gangs was closed")
        return [name for name, gang in self._gangs.items() if gang.is_up]

    async def events(self) -> list[dict[str, Any]]:
        """Return what happened since the last call: gang_started and rung as the ledger has them,
        and job_ended, which tells what a job took even where whoever asked for it has died."""
        events, self._events = self._events, []
        return events

    async def running(self) -> dict[str, float]:
        """Return the seconds that each leased job has been held so far."""
        return {job.id: job.seconds() for job in self._leased()}

    # What the pool's thread of a gang asks.

    async def wait_for_work(self, gang: str) -> bool:
        """Wait for a job that no other gang is about to take; False once none will come."""
        it = self._gangs[gang]

        def is_over() -> bool:
            return it.is_retired or self._refusal is not None

        async with self._changed:
            await self._changed.wait_for(
                lambda: is_over() or len(self._queue) > len(self._seekers - {gang})
            )
            if is_over():
                return False
            self._seekers.add(gang)
            it.taken = 0
            return True

    async def gang_ended(
        self, gang: str, fault: str | None, *, unplaced: bool = False, alone: bool = True
    ) -> None:
        """Learn that a gang's Train run is over: as agreed, or for a fault.

        `unplaced`: it never got its place, which is a reason to give up only if it was `alone`:
        no other gang has one.
        """
        it = self._gangs[gang]
        it.is_up = False
        it.epoch += 1
        self._seekers.discard(gang)
        if fault is not None:
            it.barren = 0 if it.taken or unplaced else it.barren + 1
            await self.fault(gang, fault)
            self._put_back(it)
            if unplaced and alone:
                self._refuse(State.FAILED, fault)
            elif not unplaced and it.barren > self._infra_retries:
                self._retire(it, f"{gang}: no worker lived to its first training: {fault}")
        await self._notify()

    # What a gang's workers ask.

    async def clock(self) -> float:
        """The time of the driver's node, Unix seconds."""
        return time.time()

    async def hello(self, gang: str, ranks: list[dict[str, Any]]) -> str | None:
        """Take the fingerprints of a gang that is up; return why it cannot work, if so."""
        self._gangs[gang].epoch += 1
        fault = unlike(ranks)
        if fault is not None:
            await self.unfit(gang, f"{gang}: {fault}")
            return fault
        self._gangs[gang].is_up = True
        nodes = [{k: v for k, v in rank.items() if k != "tflops"} for rank in ranks]
        probe = {"tflops": [rank["tflops"] for rank in ranks], "warnings": doubts(ranks)}
        facts = {"gang": gang, "workers": len(ranks), "nodes": nodes, "probe": probe}
        self._events.append({"event": "gang_started", **facts})
        return None

    async def unfit(self, gang: str, fault: str) -> None:
        """Send a gang home: what it found would be found by every try on its nodes."""
        it = self._gangs[gang]
        if it.lease is not None:
            it.lease.tries -= 1
        self._put_back(it)
        self._retire(it, fault)
        await self._notify()

    async def take(self, gang: str) -> dict[str, Any] | None:
        """Return the gang's next job, or None: it shall end, or has new workers since it asked.

        A lease that is still open is one whose workers were lost: the same job again.
        """
        it = self._gangs[gang]
        if it.lease is not None:
            await self.fault(gang, "a worker was lost")
        if it.lease is None and self._one_each and it.taken:
            return None
        job = it.lease or await self._next(gang)
        if job is None:
            return None
        it.lease = job
        self._begun.add(job.training)
        job.tries += 1
        job.leased_at = time.monotonic()
        job.failures.clear()
        it.taken += 1
        return job.what

    async def _next(self, gang: str) -> Job | None:
        it = self._gangs[gang]
        epoch = it.epoch = it.epoch + 1
        self._seekers.add(gang)
        try:
            async with asyncio.timeout(self._idle_s), self._changed:
                self._changed.notify_all()  # an older call of this gang is to leave
                await self._changed.wait_for(
                    lambda: it.epoch != epoch or self._refusal is not None or self._queue
                )
                is_ours = it.epoch == epoch and it.lease is None
                return self._queue.popleft() if is_ours and self._queue else None
        except TimeoutError:
            return None  # idle for so long: others may have its place
        finally:
            if it.epoch == epoch:  # else its new workers are the ones that seek
                self._seekers.discard(gang)

    async def finish(self, gang: str, job_id: str, state: str, reason: str | None = None) -> None:
        """Settle a gang's job. One that left because it was told to ends as what it was told."""
        it = self._gangs[gang]
        job = it.lease
        if job is None or job.id != job_id:
            return  # settled already: another rank was first
        if state == State.STOPPED and job.told is not None:
            state, reason = job.told
        it.lease = None
        self._settle(job, State(state), reason)
        await self._notify()

    async def fault(self, gang: str, fault: str) -> None:
        """Learn that a try was lost. The job stays the gang's own until its tries are used up."""
        it = self._gangs[gang]
        it.is_up = False
        it.epoch += 1
        await self._notify()
        job = it.lease
        if job is None:
            return
        if job.leased_at is not None:
            job.last_fault = fault
        job.let_go()
        if job.told is not None and job.told[0] == State.CANCELLED:
            it.lease = None
            self._settle(job, *job.told)
        elif job.tries > self._infra_retries:
            it.lease = None
            times = f"{job.tries} time{'s' if job.tries > 1 else ''}"
            logs = f"{job.what['folder']}/rank*.log"
            reason = f"workers failed {times}, last: {job.last_fault}; see {logs}"
            self._settle(job, State.FAILED, reason)

    async def failed(self, gang: str, job_id: str, rank: int, reason: str) -> bool:
        """Learn from each rank that a job failed, and settle it once all have said so.

        False if only new workers help: some rank never says it, left inside a collective, or all
        only heard of it, from one that raised what is no fault of the job, so nothing is settled.
        """
        job, it = self._jobs[job_id], self._gangs[gang]
        epoch = it.epoch
        job.failures[rank] = reason
        await self._notify()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._meeting_s), self._changed:
                await self._changed.wait_for(
                    lambda: it.epoch != epoch or len(job.failures) == self._workers
                )
        # A rank that only heard of the failure knows less than the one that had it.
        own = [text for text in job.failures.values() if not text.startswith(ELSEWHERE)]
        if it.epoch != epoch or not own:
            return False
        await self.finish(gang, job_id, State.FAILED, own[0])
        return len(job.failures) == self._workers

    async def steer(self, job_id: str, step: int, val_bpb: float | None) -> str | None:
        """Return why a job is to stop, None if it goes on. A validation is put to the judge."""
        job = self._jobs[job_id]
        if val_bpb is not None and self._judge is not None and job.what["kind"] == "training":
            reason = self._judge.ask(job_id, step, val_bpb)
            if step not in job.rungs:  # a resumed training asks again
                job.rungs.add(step)
                verdict = "go" if reason is None else "stop"
                rung = {"event": "rung", "training": job_id, "step": step, "val_bpb": val_bpb}
                self._events.append({**rung, "verdict": verdict, "reason": reason})
            if reason is not None and job.told is None:
                job.told = State.STOPPED, reason
        return None if job.told is None else job.told[1]

    def _leased(self) -> list[Job]:
        return [gang.lease for gang in self._gangs.values() if gang.lease is not None]

    def _settle(self, job: Job, state: State, reason: str | None) -> None:
        job.let_go()
        paid = {"tries": job.tries, "occupied_s": job.held_s}
        self._events.append({"event": "job_ended", "job": job.id, **paid})
        job.done.set_result({"state": str(state), "reason": reason, **paid})

    def _put_back(self, gang: Gang) -> None:
        job, gang.lease = gang.lease, None
        if job is not None and self._refusal is not None:
            self._settle(job, *self._refusal)
        elif job is not None:
            job.let_go()
            self._queue.appendleft(job)

    def _retire(self, gang: Gang, fault: str) -> None:
        gang.is_retired = True
        if all(other.is_retired for other in self._gangs.values()):
            self._refuse(State.FAILED, fault)

    def _refuse(self, state: State, reason: str) -> None:
        """Settle what is queued, and whatever comes, with the first reason that was given."""
        self._refusal = self._refusal or (state, reason)
        while self._queue:
            self._settle(self._queue.popleft(), *self._refusal)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def unlike(ranks: list[dict[str, Any]]) -> str | None:
    """Say how a rank differs from rank 0 in what must be the same everywhere, None if none does."""
    first = ranks[0]
    for rank, other in enumerate(ranks):
        for what in ALIKE:
            if other[what] != first[what]:
                return (
                    f"its ranks differ in {what}: rank 0 has {first[what]}, rank {rank} has "
                    f"{other[what]}; give the nodes the same image, or name one kind of device"
                )
    return None


def doubts(ranks: list[dict[str, Any]]) -> list[str]:
    """What is no reason to refuse a gang but should be seen: a slow rank, a clock that is off."""
    found = []
    median = sorted(rank["tflops"] for rank in ranks)[len(ranks) // 2]
    for number, rank in enumerate(ranks):
        if rank["tflops"] < SLOW_SHARE * median:
            found.append(
                f"rank {number} reaches {rank['tflops']:.3g} TFLOP/s, the median is {median:.3g}"
            )
        if abs(rank["skew_s"]) > MAX_SKEW_S:
            found.append(f"rank {number}'s clock is {rank['skew_s']:+.1f} s off the driver's")
    return found

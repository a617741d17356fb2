"""Which sweeps start next, and why the others wait: a pure function of what the queue knows."""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence

from service.queue.records import Quota, SweepRecord


def choose(
    queued: Sequence[SweepRecord],
    acting: Sequence[SweepRecord],
    quotas: Mapping[str, Quota],
    usage: Mapping[str, tuple[int, float]],
    slots: int,
) -> list[tuple[SweepRecord, int | str]]:
    """Return every queued sweep in its fair order, with the gangs that it may start with now or
    the reason why it waits.

    The order is priority, then the owner who holds fewer gangs (those given here included), then
    the owner who has used fewer worker-seconds, then submission. A sweep gets the gangs that it
    asks for, or as many as there are `slots` or its owner may hold. One that has no room keeps
    all after it waiting, so that small sweeps never starve a wide one; one whose owner's quota is
    used up keeps nobody.
    """
    held = Counter[str]()
    for record in acting:
        held[record.owner] += record.gangs_held
    chosen: list[tuple[SweepRecord, int | str]] = []
    used, is_blocked = held.total(), False
    for priority in sorted({record.priority for record in queued}, reverse=True):
        level = _Turns([record for record in queued if record.priority == priority], held, usage)
        while level:
            record = level.next()
            quota = quotas.get(record.owner, Quota(record.owner))
            given = _given(record, quota, slots)
            verdict = _over_quota(quota, held[record.owner], given, _spent(usage, record.owner))
            if verdict is None and is_blocked:
                verdict = "others are ahead, which need more gangs than are free"
            if verdict is None and (given < 1 or used + given > slots):
                verdict = f"{used} of {slots} gangs are in use"
                is_blocked = True
            if verdict is None:
                held[record.owner] += given
                used += given
            chosen.append((record, given if verdict is None else verdict))
            level.put_back(record.owner)
    return chosen


class _Turns:
    """The sweeps of one priority; whose turn it is depends on what each owner holds by then."""

    def __init__(
        self,
        records: Sequence[SweepRecord],
        held: Mapping[str, int],
        usage: Mapping[str, tuple[int, float]],
    ) -> None:
        self._held = held
        self._usage = usage
        self._lines: defaultdict[str, deque[SweepRecord]] = defaultdict(deque)
        for record in sorted(records, key=lambda record: record.seq):
            self._lines[record.owner].append(record)
        self._heap: list[tuple[int, float, int, str]] = []
        for owner in self._lines:
            self.put_back(owner)

    def __bool__(self) -> bool:
        return bool(self._heap)

    def next(self) -> SweepRecord:
        """Take the sweep whose turn it is; its owner has no other until they are put back."""
        owner = heapq.heappop(self._heap)[-1]
        return self._lines[owner].popleft()

    def put_back(self, owner: str) -> None:
        """Give the owner a turn for the next of their sweeps."""
        line = self._lines[owner]
        if line:
            turn = (self._held.get(owner, 0), _spent(self._usage, owner), line[0].seq, owner)
            heapq.heappush(self._heap, turn)


def _spent(usage: Mapping[str, tuple[int, float]], owner: str) -> float:
    return usage.get(owner, (0, 0.0))[1]


def _given(record: SweepRecord, quota: Quota, slots: int) -> int:
    most = slots if quota.max_gangs is None else min(slots, quota.max_gangs)
    return min(record.gangs, most)


def _over_quota(quota: Quota, held: int, given: int, spent_s: float) -> str | None:
    if quota.max_gangs is not None and held + max(given, 1) > quota.max_gangs:
        return f"{quota.user} holds {held} of {quota.max_gangs} gangs"
    if quota.gpu_hours is not None and spent_s >= 3600 * quota.gpu_hours:
        return f"{quota.user} has used {spent_s / 3600:.1f} of {quota.gpu_hours:g} GPU-hours"
    return None

"""Where a search's next stage comes from: a plan made beforehand, or what is known so far. Pure."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from service.tpe import Told
from tune_spaces.space import Point

Stage = TypeVar("Stage")
Stage_co = TypeVar("Stage_co", covariant=True)

# A space that is nearly used up gives known points again and again.
_MAX_ATTEMPTS = 50


class Source(Protocol[Stage_co]):
    """Hands out stages until there are none."""

    def next(self) -> Stage_co | None:
        """The next stage to run, None when the search is over."""
        ...


class Planned(Generic[Stage]):
    """Stages that were known before the search began, in their order."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self._left = deque(stages)

    def next(self) -> Stage | None:
        """The next of the plan."""
        return self._left.popleft() if self._left else None


class Proposed(Generic[Stage]):
    """Stages of points that are chosen one by one.

    `history` tells of all known points, those under way included; `propose` chooses from it, the
    attempt's number making one choice differ from the last; `expand` gives the stages of a new
    point, none for one that is known or not allowed. `first` are stages of known points that an
    earlier run of the sweep left open: part of them is paid for.
    """

    def __init__(
        self,
        num: int,
        first: Sequence[Stage],
        history: Callable[[], Sequence[Told]],
        propose: Callable[[Sequence[Told], int], Point],
        expand: Callable[[Point], Sequence[Stage]],
    ) -> None:
        self._num = num
        self._history = history
        self._propose = propose
        self._expand = expand
        self._ready = deque(first)

    def next(self) -> Stage | None:
        """The next stage of a known point, else the first of a new one."""
        if not self._ready:
            self._ready.extend(self._of_next_point())
        return self._ready.popleft() if self._ready else None

    def _of_next_point(self) -> Sequence[Stage]:
        history = self._history()
        if len(history) >= self._num:
            return ()
        for attempt in range(_MAX_ATTEMPTS):
            stages = self._expand(self._propose(history, attempt))
            if stages:
                return stages
        return ()


class InTurn(Generic[Stage]):
    """Several sources, a stage of each in turn, so that none waits for another to end."""

    def __init__(self, sources: Iterable[Source[Stage]]) -> None:
        self._sources = deque(sources)

    def next(self) -> Stage | None:
        """A stage of the source that waited longest and has one."""
        while self._sources:
            source = self._sources.popleft()
            stage = source.next()
            if stage is not None:
                self._sources.append(source)
                return stage
        return None


class LookAhead(Generic[Stage]):
    """Stages with one looked at ahead, so that Ray is not brought up for nothing."""

    def __init__(self, take: Callable[[], Stage | None]) -> None:
        self._take = take
        self._ahead = take()

    def is_over(self) -> bool:
        """Whether there was not even a first one."""
        return self._ahead is None

    def next(self) -> Stage | None:
        """The one looked at, then the others."""
        stage, self._ahead = self._ahead, None
        return self._take() if stage is None else stage

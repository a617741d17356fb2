"""What sweeps' ledgers tell, worked out once for each state that a ledger was in.

Shared by threads. An answer is to be read, never changed.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from service.api.documents import Told, detail_document, is_live, told_by
from service.ledger import SweepView, replay
from service.paths import Paths
from service.queue.records import SweepRecord
from service.states import State
from service.tails import Tails
from trainer.errors import DataError
from trainer.runtime.files import read_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
Question = Callable[[SweepView, Sequence[dict[str, Any]]], T]
"""Of a view and the events that it adds up from."""
KEPT_ANSWERS = 512
KEPT_PAGES = 4  # each about 5 MB
KEPT_LISTS = 64  # each up to 150 kB


class _Answer:
    """The last answer to one question, and the state of affairs that it was true for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.of: Any = None
        self.value: Any = None


class _Answers:
    """The `keep` last used answers."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._answers: OrderedDict[Any, _Answer] = OrderedDict()

    def get(self, key: Any) -> _Answer:
        with self._lock:
            answer = self._answers.setdefault(key, _Answer())
            self._answers.move_to_end(key)
            while len(self._answers) > self._keep:
                self._answers.popitem(last=False)
            return answer


class Views:
    """The ledgers of a home's sweeps, for the routes."""

    def __init__(self, tails: Tails, paths: Paths) -> None:
        self._tails = tails
        self._paths = paths
        self._answers = _Answers(KEPT_ANSWERS)
        self._pages = _Answers(KEPT_PAGES)
        self._lists = _Answers(KEPT_LISTS)

    def ask(self, sweep_id: str, question: Question[T]) -> T:
        """Answer a question about a sweep, again only when its ledger has news."""
        tail = self._tails.of(sweep_id)
        answer = self._answers.get((sweep_id, question))
        with answer.lock:  # who asks the same meanwhile waits instead of working it out too
            if answer.of != tail.ask(lambda view: view.events):
                events = tail.events()
                answer.value = tail.ask(lambda view: question(view, events))
                answer.of = len(events)
            return answer.value

    def listed(self, asked: Any, of: int, make: Callable[[], bytes]) -> bytes:
        """A page of the list as it is sent, made again when the queue has a newer event than `of`,
        which every change of a sweep writes."""
        answer = self._lists.get(asked)
        with answer.lock:
            if answer.of != of:
                answer.value, answer.of = make(), of
            return answer.value

    def detail(self, record: SweepRecord) -> dict[str, Any]:
        """One sweep in full, as `shapes.SweepDetail` has it. Of a damaged ledger nothing is told:
        the row's reason may be that very damage, and a verb that was obeyed must say so."""
        try:
            told = self.ask(record.sweep_id, told_by)
        except DataError as error:
            logger.warning("%s: %s", record.sweep_id, error)
            told = Told(None, {}, [], None)
        return detail_document(record, told, self.tracking(record.sweep_id))

    def tracking(self, sweep_id: str) -> dict[str, Any]:
        """Where MLflow has a sweep: its tracking.json, empty without one."""
        path = self._paths.sweep(sweep_id).tracking
        return read_json(path) if path.is_file() else {}

    def page(self, record: SweepRecord) -> str:
        """The sweep's report as HTML; also of a sweep that has not begun. Takes seconds."""
        from service.report_page import report_html  # plotly

        ledger = self._paths.sweep(record.sweep_id).ledger
        num_events = self._tails.of(record.sweep_id).ask(lambda view: view.events)
        answer = self._pages.get(record.sweep_id)
        standing = (num_events, is_live(record))
        with answer.lock:
            if answer.of != standing:
                # A view of its own: nobody waits for the drawing.
                view = replay(ledger) if num_events else SweepView()
                if view.state == State.RUNNING and not is_live(record):
                    view.state = State(record.state)
                    view.running.clear()
                answer.value, answer.of = report_html(view, self._paths), standing
            return answer.value

"""Notices of what a sweep has come to, posted to the webhooks of a service's settings.

    ledger -notices_of-> notices -Deliveries-> a row for each webhook -post-> the receiver

A notice follows from a ledger's events, or the queue's where a sweep ended without a word in its
ledger. It has a key of its own, so a service that starts again derives the same ones. A row is
tried, with pauses that grow, until the receiver answers 2xx or the notice is a day old.

A receiver gets each notice once by its `Fairway-Delivery`: a service that dies after the answer
and before it has noted it posts the notice again, with the same id and the same body, which the
receiver is to drop. Of one sweep the notices arrive in the ledger's order. Each webhook has a
thread of its own, so one that is slow or dead delays neither the others nor the service.
"""

import hashlib
import hmac
import json
import logging
import math
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from service.budget import Account, spent
from service.confirmed import confirmed_document, counts
from service.ends import QueueEnds
from service.labels import run_name
from service.ledger import SweepView, last_event
from service.paths import Paths
from service.queue.deliveries import Deliveries, Delivery
from service.queue.queue import Queue
from service.queue.records import QueueEvent
from service.report import best, status_document
from service.specs import Budget
from service.states import State
from service.tails import LedgerTail, Tails
from trainer.codec import parse
from trainer.errors import BackendError, DataError

logger = logging.getLogger(__name__)

BUDGET_SHARE = 0.8
POLL_S = 1.0
TIMEOUT_S = 10.0
MAX_PAUSE_S = 3_600.0
GIVE_UP_S = 86_400.0
"""Age at which a notice is of no use any more: older ones are neither made nor tried again."""
_MOST_ROWS = 1_000  # of one webhook that are looked at together
_OF_QUEUE = ""  # whose cursor is the queue's: no sweep has this id
_KEEP = 64  # ledgers that stay folded


@dataclass(frozen=True, slots=True)
class Notice:
    """One fact worth telling. `key` is unique in its sweep; kind: new_best, illegal, budget or
    done; `at`: Unix seconds of the event that it follows from."""

    key: str
    kind: str
    sweep: str
    at: float
    text: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """What has been told of a sweep: its best, and the budgets (worker-seconds) that were near
    their end. `spent_s`: worker-seconds so far."""

    spent_s: float = 0.0
    best: str | None = None
    bpb: float = math.inf
    is_confirmed: bool = False
    budgets: frozenset[float] = frozenset()


def notices_of(view: SweepView, event: dict[str, Any], told: Told) -> tuple[list[Notice], Told]:
    """What the last `event` of a view makes worth telling after what was `told`. Pure."""
    found: list[Notice] = []
    match event["event"]:
        case "final_scored" if view.finals[event["final"]] is event:
            found, told = _of_final(view, event, told)
        case "sweep_finished" if view.order != "pause":  # it goes on
            found = [_done(view, event)]
        case _:
            pass
    if event.get("occupied_s"):
        near, told = _of_budget(view, event, told)
        found += near
    return found, told


def _of_final(view: SweepView, event: dict[str, Any], told: Told) -> tuple[list[Notice], Told]:
    if event["state"] == State.ILLEGAL:
        return [_illegal(view, event)], told
    if not counts(view, event):
        return [], told
    is_confirmation = event.get("phase") == "confirm"
    if not is_confirmation and (told.is_confirmed or _bpb(event) >= told.bpb):
        return [], told  # luck of the search does not beat what is confirmed
    top = best(view)
    is_confirmed = top is not None and top.get("phase") == "confirm"
    if top is None or (top["final"], is_confirmed) == (told.best, told.is_confirmed):
        return [], told
    before = None if told.best is None else told.bpb
    now = replace(told, best=top["final"], bpb=_bpb(top), is_confirmed=is_confirmed)
    return [_new_best(view, event, top, before)], now


def _new_best(
    view: SweepView, event: dict[str, Any], top: dict[str, Any], before: float | None
) -> Notice:
    is_confirmed, num_bytes = top.get("phase") == "confirm", top["result"]["artifact_bytes"]
    name = run_name(_varying(view, top), top["final"])
    words = "confirmed best" if is_confirmed else "new best"
    return _notice(
        view, event, f"{'confirmed' if is_confirmed else 'best'}:{top['final']}", "new_best",
        f"{words} {_bpb(top):.4f} bpb in {num_bytes:,} bytes, {name}",
        {
            "final": top["final"],
            "training": top["training"],
            "seed": top["seed"],
            "point": _varying(view, top),
            "val_bpb": _bpb(top),
            "previous_bpb": before,
            "artifact_bytes": num_bytes,
            "cap_bytes": view.started.get("cap_bytes"),
            "confirmed": confirmed_document(view) if is_confirmed else None,
        },
    )  # fmt: skip


def _illegal(view: SweepView, event: dict[str, Any]) -> Notice:
    result = event["result"] or {}
    return _notice(
        view, event, f"illegal:{event['final']}", "illegal",
        f"illegal: {run_name(_varying(view, event), event['final'])}: {event['reason']}",
        {
            "final": event["final"],
            "training": event["training"],
            "seed": event["seed"],
            "point": _varying(view, event),
            "reason": event["reason"],
            "val_bpb": (result.get("score") or {}).get("val_bpb"),
            "artifact_bytes": result.get("artifact_bytes"),
        },
    )  # fmt: skip


def _done(view: SweepView, event: dict[str, Any]) -> Notice:
    key = f"done:{event['seq']}:{event['at']}"
    return _ended(view.started["sweep_id"], key, event["at"], status_document(view))


def _done_by_queue(tail: LedgerTail, end: QueueEvent) -> Notice:
    """The end of a sweep whose ledger does not tell of it, with what the ledger has."""
    try:
        status = tail.ask(status_document)
    except (DataError, OSError):  # which may be why it ended
        status = status_document(SweepView())
    status |= {"state": end.facts["state"], "reason": end.facts["reason"]}
    return _ended(end.sweep_id, f"done:queue:{end.id}", end.at, status)


def _ended(sweep: str, key: str, at: float, status: dict[str, Any]) -> Notice:
    words = status["state"] + (f": {status['reason']}" if status["reason"] else "")
    if status["best"] is not None:
        top = status["best"]
        words += f"; best {top['val_bpb']:.4f} bpb in {top['artifact_bytes']:,} bytes"
    kept = ("state", "reason", "trainings", "finals", "worker_seconds", "gpu_seconds", "usd")
    facts = {key: status[key] for key in (*kept, "best", "confirmed")}
    return Notice(key, "done", sweep, at, f"{sweep}: {words}", facts)


def _of_budget(view: SweepView, event: dict[str, Any], told: Told) -> tuple[list[Notice], Told]:
    spec = view.started.get("spec") or {}
    workers = (spec.get("resources") or {}).get("workers", 1)
    spent_s = told.spent_s + sum(spent(SweepView(paid=[event]), workers).values())
    told = replace(told, spent_s=spent_s)
    written = spec.get("budget")
    limit_s = None if not written else Account(parse(Budget, written, "budget"), 0.0).limit_s
    if limit_s is None or limit_s in told.budgets or spent_s < BUDGET_SHARE * limit_s:
        return [], told
    words = f"{spent_s / 3_600:.3g} of {limit_s / 3_600:.3g} GPU-hours of its budget are spent"
    facts = {"spent_worker_s": spent_s, "limit_worker_s": limit_s, "share": spent_s / limit_s}
    notice = _notice(view, event, f"budget:{BUDGET_SHARE}:{limit_s}", "budget", words, facts)
    return [notice], replace(told, budgets=told.budgets | {limit_s})


def _notice(
    view: SweepView, event: dict[str, Any], key: str, kind: str, words: str, facts: dict[str, Any]
) -> Notice:  # fmt: skip
    sweep = view.started["sweep_id"]
    return Notice(key, kind, sweep, event["at"], f"{sweep}: {words}", facts)


def _varying(view: SweepView, event: dict[str, Any]) -> dict[str, Any]:
    return {
        path: event["point"][path] for path in view.started["varying"] if path in event["point"]
    }


def _bpb(event: dict[str, Any]) -> float:
    return event["result"]["score"]["val_bpb"]


class Webhook:
    """One receiver: what it is called in the queue, and how a notice is posted to it."""

    def __init__(self, url: str, secret: str | None) -> None:
        self._url, self._secret = url, secret
        self.host = urlsplit(url).hostname or "?"
        """For the log: the path of a webhook is often a secret."""
        self.key_start = hashlib.sha256(url.encode()).hexdigest()[:16] + ":"
        self._http = httpx2.Client(timeout=TIMEOUT_S, follow_redirects=False)

    def row(self, notice: Notice) -> tuple[str, str, dict[str, Any]]:
        """Key, kind and body of a notice for this receiver; the body's id is its alone."""
        key = self.key_start + notice.key
        name = hashlib.sha256(f"{notice.sweep}\n{key}".encode()).hexdigest()[:32]
        facts = asdict(notice)
        del facts["key"]
        return key, notice.kind, {"id": name, **facts}

    def post(self, body: dict[str, Any]) -> str | None:
        """Post a notice; None if it has arrived, else why not."""
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Fairway-Delivery": body["id"]}
        if self._secret is not None:
            digest = hmac.new(self._secret.encode(), content, hashlib.sha256).hexdigest()
            headers["Fairway-Signature"] = f"sha256={digest}"
        try:
            # The answer's status is all that counts: its body, of whatever length, is not read.
            with self._http.stream("POST", self._url, content=content, headers=headers) as answer:
                return None if answer.is_success else f"answered {answer.status_code}"
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            return f"{type(error).__name__}: {error}".replace(self._url, self.host)


@dataclass
class _Fold:
    """A ledger folded as far as its notices are made."""

    view: SweepView = field(default_factory=SweepView)
    told: Told = field(default_factory=Told)


class Notices:
    """Makes and posts the notices of a home's sweeps."""

    def __init__(
        self,
        paths: Paths,
        queue: Queue,
        deliveries: Deliveries,
        tails: Tails,
        webhooks: Sequence[str],
        secret: str | None = None,
    ) -> None:
        self._paths, self._deliveries, self._tails = paths, deliveries, tails
        self._webhooks = [Webhook(url, secret) for url in dict.fromkeys(webhooks)]
        self._ends = QueueEnds(queue, tails)
        self._sizes: dict[str, int] = {}
        self._folds: OrderedDict[str, _Fold] = OrderedDict()
        self._has_cleared = False
        self._random = random.Random()
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs addresses as a whole

    def step(self) -> None:
        """Make the notices of what has happened, and try all that are due, one after the other."""
        self.collect()
        for webhook in self._webhooks:
            self.post_due(webhook, threading.Event())

    def run_forever(self, stop: threading.Event) -> None:
        """Do so until told to stop, with a thread for each webhook. An answer that is awaited then
        is not waited for: the notice is posted again at the next start."""
        for webhook in self._webhooks:
            work = (stop, lambda webhook=webhook: self.post_due(webhook, stop))
            threading.Thread(target=_repeat, args=work, daemon=True).start()
        _repeat(stop, self.collect)

    def collect(self) -> None:
        """Put in the queue what follows from the events that are new; BackendError where the
        database is out of reach."""
        if not self._has_cleared:
            self._clear()
            self._has_cleared = True
        if not self._webhooks:
            return
        seen = self._deliveries.seen(_OF_QUEUE)
        ends, upto = self._ends.after(seen)  # before the ledgers, whose notices come first
        for path in self._paths.sweeps.glob("*/events.jsonl"):
            sweep_id = path.parent.name
            with suppress(FileNotFoundError):  # deleted meanwhile
                size = path.stat().st_size
                if size != self._sizes.get(sweep_id):
                    self._take_in(sweep_id, path, is_shorter=size < self._sizes.get(sweep_id, 0))
                    self._sizes[sweep_id] = size
        for end in ends:
            self._take_in_end(end)
        if upto > seen:
            self._deliveries.add_all(_OF_QUEUE, upto, [])

    def _take_in_end(self, end: QueueEvent) -> None:
        """Make the notice of an end that the ledger does not tell of."""
        if end.at < time.time() - GIVE_UP_S or self._ends.is_in_ledger(end):
            return
        notice = _done_by_queue(self._tails.of(end.sweep_id), end)
        for webhook in self._webhooks:
            self._deliveries.add(end.sweep_id, *webhook.row(notice))

    def _take_in(self, sweep_id: str, path: Path, *, is_shorter: bool) -> None:
        # Kept again only if all goes well: its notices are then in the database.
        fold = self._folds.pop(sweep_id, None)
        if is_shorter:
            fold = None
        try:
            fold = self._fold(sweep_id, path, fold)
        except (BackendError, FileNotFoundError):
            raise
        except Exception as error:  # one sweep's trouble, whatever it is, is not the others'
            logger.error("%s: no notices: %s: %s", sweep_id, type(error).__name__, error)
            return
        if fold is not None:
            self._folds[sweep_id] = fold
        while len(self._folds) > _KEEP:
            self._folds.popitem(last=False)

    def _fold(self, sweep_id: str, path: Path, fold: _Fold | None) -> _Fold | None:
        """Fold in what is new and make its notices; None where the sweep is over."""
        seen, oldest_at = 0, time.time() - GIVE_UP_S
        if fold is None:
            seen, last = self._deliveries.seen(sweep_id), last_event(path)
            if last and (last["seq"] == seen or last["at"] < oldest_at):
                return None
            if last and last["seq"] < seen:  # the ledger was begun anew; known keys stay known
                seen = 0
            fold = _Fold()
        found: list[Notice] = []
        for event in self._tails.of(sweep_id).events(fold.view.events):
            fold.view.apply(event)
            new, fold.told = notices_of(fold.view, event, fold.told)
            if event["seq"] > seen and event["at"] >= oldest_at:
                found += new
        rows = [webhook.row(notice) for notice in found for webhook in self._webhooks]
        self._deliveries.add_all(sweep_id, fold.view.events, rows)
        return None if fold.view.state.is_final() else fold

    def _clear(self) -> None:
        """Give up what waits for a webhook that is no longer in the settings."""
        starts = [webhook.key_start for webhook in self._webhooks]
        reason = "its webhook is not in the settings"
        if num := self._deliveries.give_up_others(starts, reason):
            logger.warning("notices: %d given up: %s", num, reason)

    def post_due(self, webhook: Webhook, stop: threading.Event) -> None:
        """Try what is due of one webhook; of each sweep nothing before what came earlier."""
        now = time.time()
        while rows := self._deliveries.due(now, _MOST_ROWS, key_start=webhook.key_start):
            for row in rows:
                if stop.is_set():
                    return
                self._try(webhook, row)

    def _try(self, webhook: Webhook, row: Delivery) -> None:
        """Post a notice, and write down how that went."""
        error, now = webhook.post(row.payload), time.time()
        if error is None:
            self._deliveries.delivered(row.id, now)
            return
        name = f"{row.sweep_id}: {row.kind} to {webhook.host}"
        if now - row.created_at > GIVE_UP_S:
            self._deliveries.failed(row.id, error, None)
            logger.error("%s: given up after a day: %s", name, error)
            return
        pause_s = min(MAX_PAUSE_S, 2.0 ** min(row.attempts, 16)) * self._random.uniform(0.5, 1)
        self._deliveries.failed(row.id, error, now + pause_s)
        logger.warning("%s: %s; next try in %.0f s", name, error, pause_s)


def _repeat(stop: threading.Event, work: Callable[[], None]) -> None:
    while not stop.is_set():
        try:
            work()
        except BackendError as error:
            logger.warning("%s", error)
        except Exception:  # a thread that ended would not be missed
            logger.exception("notices")
        stop.wait(POLL_S)

"""A sweep of a service as it runs: a live page on a terminal, a line per event otherwise."""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.client import Client, Event
from service.labels import knob_names, short_value
from service.talk import Talk
from trainer.errors import BackendError, FairwayError

REFRESH_S = 1.0
SHOWN_FINALS = 10
_BAR_WIDTH = 32
_STYLES = {
    "succeeded": "bold green",
    "running": "cyan",
    "finalizing": "cyan",
    "failed": "bold red",
    "lost": "bold red",
    "infeasible": "yellow",
    "illegal": "yellow",
}


def watch(client: Client, ref: str, console: Console, talk: Talk) -> dict[str, Any]:
    """Show a sweep until it has ended or is paused; return it as it then stands."""
    if not console.is_terminal:
        for event in client.events_until_rest(ref):
            talk.say(event.data.get("event", event.name), **_facts(event))
        return client.sweep(ref)
    return _live(client, ref, console)


def _live(client: Client, ref: str, console: Console) -> dict[str, Any]:
    """Redraw when something has happened, and once a second for what only time changes."""
    detail = client.sweep(ref)
    sweep_id, finals = detail["id"], list[dict[str, Any]]()
    stream = _Stream(client, sweep_id)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            is_over = stream.wait(REFRESH_S)
            with suppress(BackendError):  # the stream knows when it is away for too long
                detail = client.sweep(sweep_id)
                finals = list(islice(client.finals(sweep_id, per_page=SHOWN_FINALS), SHOWN_FINALS))
            live.update(render(detail, finals, time.time()), refresh=True)
            if is_over:
                return detail
            time.sleep(REFRESH_S / 2)  # a replay brings events by the hundred


class _Stream:
    """A sweep's events, read by a thread; says when there was one and when the last has come."""

    def __init__(self, client: Client, ref: str) -> None:
        self._has_news = threading.Event()
        self._error: FairwayError | None = None
        self._is_over = False
        threading.Thread(
            target=self._read, args=(client.again(), ref), name="watch", daemon=True
        ).start()

    def wait(self, seconds: float) -> bool:
        """Wait for news, at most so long; tell whether the stream is over."""
        self._has_news.wait(seconds)
        self._has_news.clear()
        if self._error is not None:
            raise self._error
        return self._is_over

    def _read(self, client: Client, ref: str) -> None:
        try:
            with client:
                for _ in client.events_until_rest(ref):
                    self._has_news.set()
        except FairwayError as error:
            self._error = error
        self._is_over = True
        self._has_news.set()


def render(
    detail: Mapping[str, Any], finals: Sequence[Mapping[str, Any]], now: float
) -> RenderableType:
    """Draw a sweep (the service's detail document) with its best finals; `now` in Unix seconds."""
    parts: list[RenderableType] = [_headline(detail, now)]
    reason = detail.get("waiting") or detail.get("reason")
    if reason:
        parts.append(Text(f"  {reason}", style="yellow"))
    parts.append(_progress(detail))
    if finals:
        parts.append(_finals(detail, finals))
    return Group(*parts)


def _headline(detail: Mapping[str, Any], now: float) -> Text:
    state = str(detail["state"])
    line = Text.assemble(
        (str(detail["id"]), "bold"),
        "  ",
        (state, _STYLES.get(state, "")),
        f"  by {detail['owner']}",
    )
    started = detail.get("started_at")
    if started is not None:
        line.append(f"  {_duration((detail.get('ended_at') or now) - started)}")
    if detail.get("attempt", 0) > 1:
        line.append(f"  attempt {detail['attempt']}")
    return line


def _progress(detail: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=11)
    progress = detail["progress"]
    for name in ("trainings", "finals"):
        done, total = progress[f"{name}_done"], progress[f"{name}_total"]
        bar = ProgressBar(total=max(total, 1), completed=done, width=_BAR_WIDTH)
        table.add_row(f"  {name}", bar, f"{done} of {total}")
    budget = detail.get("budget")
    if budget:
        spent, limit = budget["spent_worker_s"], budget["limit_worker_s"]
        bar = ProgressBar(total=limit, completed=min(spent, limit), width=_BAR_WIDTH)
        table.add_row("  budget", bar, f"{spent / 3600:.2f} of {limit / 3600:.2f} GPU-hours")
    else:
        table.add_row("  spent", f"{detail['worker_seconds'] / 3600:.2f} worker-hours", "")
    best, cap = detail.get("best"), detail.get("cap_bytes")
    if best:
        of_cap = f" of {cap:,}" if cap else ""
        words = f"{best['val_bpb']:.4f} bpb in {best['artifact_bytes']:,}{of_cap} bytes"
        table.add_row("  best", Text(words, style="bold green"), "")
    return table


def _finals(detail: Mapping[str, Any], finals: Sequence[Mapping[str, Any]]) -> Table:
    names = knob_names(detail.get("varying") or ())
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in (*names.values(), "val_bpb", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, overflow="ellipsis")
    for final in finals:
        point = final.get("point") or {}
        knobs = [short_value(point[path]) if path in point else "-" for path in names]
        bpb, size = final.get("val_bpb"), final.get("artifact_bytes")
        table.add_row(
            *map(Text, knobs),
            "-" if bpb is None else f"{bpb:.4f}",
            "-" if size is None else f"{size:,}",
            Text(str(final["state"])),
            style="dim" if final["state"] != "succeeded" else None,
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _facts(event: Event) -> dict[str, Any]:
    """What of an event fits into a line: plain values, not the documents that it carries."""
    data = {**event.data, **(event.data.get("facts") or {})}
    skipped = {"event", "facts", "seq", "id", "at"}
    kept = {k: v for k, v in data.items() if k not in skipped and isinstance(v, str | int | float)}
    result = data.get("result")
    if isinstance(result, dict):
        score = result.get("score") or {}
        kept |= {"val_bpb": score.get("val_bpb"), "artifact_bytes": result.get("artifact_bytes")}
    return kept

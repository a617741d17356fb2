"""The service under load on loopback: reads of a long list, and many listeners of one sweep.

    python benchmarks/service_load.py --out /tmp/service [--sweeps 1000] [--rate 200] [--seconds 30]
                                 [--listeners 100] [--events 300]

Starts the real `fairway serve` on a fresh home with so many sweeps in its queue, each with a ledger
of its own. Reads: an open loop at a fixed rate over the list, a later page, one sweep, its finals
and its tree; a request's time counts from the moment that it was due, so that a stalled service
cannot hide behind a client that waits. Beside it the same client reads /healthz of the same process
at the same rate: what the HTTP stack takes by itself. Listeners: so many event streams on a sweep
while its ledger grows; each must get each event once and in order, a tenth of them across
reconnections.

It prints requests, failures, p50, p90, p99 and the maximum in milliseconds; for the streams the
events received, missing and repeated, and how late they came.
"""

import argparse
import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

from service.paths import Paths
from service.queue.database import default_url, open_database
from service.queue.queue import Queue
from service.queue.records import NewSweep, Role, Summary, User
from service.states import State

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.ledgers import Sweep

START_S = 60.0
WATCHED = "watched-0000000000"


def main() -> None:
    """Fill a home, serve it, load it, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder to work in")
    parser.add_argument("--sweeps", type=int, default=1_000)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--listeners", type=int, default=100)
    parser.add_argument("--events", type=int, default=300)
    given = parser.parse_args()
    home = given.out / "home"
    shutil.rmtree(home, ignore_errors=True)
    ids = fill(home, given.sweeps)
    with Served(home) as served:
        print(f"{given.sweeps} sweeps; {os.cpu_count()} CPUs; service {served.cpu_s():.1f} s CPU")
        bare = asyncio.run(load(served.address, ["/healthz"], given.rate, given.seconds / 3))
        print(line("healthz", bare))
        before = served.cpu_s()
        reads = asyncio.run(load(served.address, read_paths(ids), given.rate, given.seconds))
        print(line("reads", reads))
        print(f"  service {(served.cpu_s() - before) / given.seconds:.0%} of one CPU")
        print(asyncio.run(listen(served.address, home, given.listeners, given.events)))


def fill(home: Path, num_sweeps: int) -> list[str]:
    """Put sweeps into the queue of a fresh home, ended ones with a summary; one has a ledger that
    will grow. Returns their ids, the oldest first."""
    paths = Paths(home)
    home.mkdir(parents=True)
    queue = Queue(open_database(default_url(paths)))
    user = User("bench", Role.ADMIN)
    ids = []
    for number in range(num_sweeps - 1):
        sweep_id = f"sweep-{number:010x}"
        Sweep(home, sweep_id=sweep_id).write()
        record, _ = queue.submit(new_sweep(sweep_id), user)
        claimed = queue.claim(record.sweep_id, 1)
        assert claimed is not None
        summary = Summary(
            trainings_total=2, trainings_done=2, finals_total=16, finals_done=16,
            num_events=22, best_final="f" * 20, best_bpb=1.13, best_bytes=15_800_000,
        )  # fmt: skip
        queue.advance(claimed, state=State.SUCCEEDED, summary=summary)
        ids.append(sweep_id)
    queue.submit(new_sweep(WATCHED), user)
    queue.ask(WATCHED, "pause", user)  # type: ignore[arg-type]  # or the service would start it
    return [*ids, WATCHED]


def new_sweep(sweep_id: str) -> NewSweep:
    return NewSweep(
        sweep_id, sweep_id.rpartition("-")[0], "pr414", "none", (), sweep_id, {"finals": 16}
    )


def read_paths(ids: list[str]) -> list[str]:
    """What a team's pages and scripts ask for."""
    some = ids[:: max(1, len(ids) // 20)]
    each = [f"/api/v1/sweeps/{i}{part}" for i in some for part in ("", "/finals", "/tree")]
    return ["/api/v1/sweeps", "/api/v1/sweeps?limit=200", "/api/v1/sweeps?state=succeeded", *each]


async def load(address: str, paths: list[str], rate: float, seconds: float) -> list[float]:
    """Send requests when they are due; seconds from due to answered, infinity for a failure."""
    times: list[float] = []
    limits = httpx2.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=30) as client:

        async def one(path: str, due: float) -> None:
            try:
                response = await client.get(path)
                failed = response.is_error
            except httpx2.HTTPError:
                failed = True
            times.append(float("inf") if failed else time.perf_counter() - due)

        start, tasks = time.perf_counter() + 0.2, []
        for number in range(int(rate * seconds)):
            due = start + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(paths[number % len(paths)], due)))
        await asyncio.gather(*tasks)
    return times


def line(name: str, times: list[float]) -> str:
    ordered = sorted(times)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    failed = sum(t == float("inf") for t in times)
    marks = "  ".join(f"p{int(q * 100)} {at(q) * 1e3:.1f}" for q in (0.5, 0.9, 0.99))
    return (
        f"{name}: {len(times)} requests, {failed} failed; {marks}  max {ordered[-1] * 1e3:.1f} ms"
    )


async def listen(address: str, home: Path, listeners: int, events: int) -> str:
    """Let everybody listen while the ledger grows; say what was missing, repeated and late."""
    got: list[list[int]] = [[] for _ in range(listeners)]
    late: list[float] = []
    limits = httpx2.Limits(max_connections=listeners + 10)
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=60) as client:
        tasks = [
            asyncio.create_task(follow(client, seen, late, events, is_restless=n % 10 == 0))
            for n, seen in enumerate(got)
        ]
        await asyncio.sleep(2.0)
        writer = threading.Thread(target=write_events, args=(home, events))
        writer.start()
        await asyncio.wait_for(asyncio.gather(*tasks), timeout=180)
        writer.join()
    expected = list(range(1, events + 1))
    missing = sum(len(set(expected) - set(seen)) for seen in got)
    repeated = sum(len(seen) - len(set(seen)) for seen in got)
    disordered = sum(seen != sorted(seen) for seen in got)
    late.sort()
    return (
        f"streams: {listeners} listeners x {events} events: {sum(map(len, got))} received, "
        f"{missing} missing, {repeated} repeated, {disordered} listeners out of order; late by "
        f"p50 {late[len(late) // 2] * 1e3:.0f}  p99 {late[int(0.99 * len(late))] * 1e3:.0f} ms"
    )


async def follow(
    client: httpx2.AsyncClient,
    seen: list[int],
    late: list[float],
    events: int,
    *,
    is_restless: bool,
) -> None:
    """Read a sweep's stream to its last event; a restless one hangs up every 50 events."""
    after: str | None = None
    while not seen or seen[-1] < events:
        headers = {} if after is None else {"Last-Event-ID": after}
        since = 0
        async with client.stream(
            "GET", f"/api/v1/sweeps/{WATCHED}/events", headers=headers
        ) as response:
            response.raise_for_status()
            async for message in httpx2.EventSource(response):
                after = message.id or after
                if message.event != "ledger":
                    continue
                data: Any = message.json()
                seen.append(data["seq"])
                late.append(time.time() - data["at"])
                since += 1
                if seen[-1] >= events or (is_restless and since >= 50):
                    break


def write_events(home: Path, events: int) -> None:
    """Append to the watched sweep's ledger at about 30 events a second."""
    from service.ledger import Ledger

    with Ledger(Paths(home).sweep(WATCHED).ledger) as ledger:
        for number in range(events):
            ledger.append("rung", training="t", step=number, val_bpb=1.2, verdict="go", reason=None)
            time.sleep(0.03)


class Served:
    """`fairway serve` as a process of its own, on a free port."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._log = (home.parent / "serve.log").open("wb")
        command = [sys.executable, "-m", "service", "serve", "--home", str(home)]
        command += ["--port", str(port), "--requests-per-second", "100000"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def __enter__(self) -> "Served":
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx2.get(f"{self.address}/healthz", trust_env=False).is_success:
                    return self
            except httpx2.HTTPError:
                time.sleep(0.2)
        raise SystemExit(f"the service did not start; see {self._log.name}")

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        self._log.close()

    def cpu_s(self) -> float:
        """CPU-seconds of the service's process so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()

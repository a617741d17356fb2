"""A service's home with sweeps in every stage of life, for tests of what the API shows of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.api.services import Services
from service.jobs.decisions import summary_of
from service.queue.records import NewSweep, Role, SweepRecord, User
from service.states import State
from tests.ledgers import CLIP, WARMDOWN, Sweep
from trainer.runtime.files import write_text

ANN = User("ann", Role.SUBMITTER)
OVER_CAP = 17_500_000
PLAN: dict[str, Any] = {
    "sweep_id": "",
    "recipe": "pr414",
    "trunks": 0,
    "trainings": 2,
    "finals": 4,
    "gang": "8 workers",
    "cap_bytes": 16_000_000,
    "constraints": [],
    "space": {WARMDOWN: [2500, 3500], CLIP: ["none", "p5"]},
}
SPACE: dict[str, list[Any]] = {WARMDOWN: [2500, 3500], CLIP: ["none", "p5"]}


@dataclass(frozen=True)
class Home:
    """A home and the ids of its sweeps."""

    services: Services
    done: str = "warmdown-3f9a2c"
    over: str = "toolarge-77aa01"
    running: str = "warmdown-11bb22"
    queued: str = "later-000001"

    @property
    def ids(self) -> tuple[str, ...]:
        return self.done, self.over, self.running, self.queued

    def sweep(self, sweep_id: str) -> Sweep:
        size = OVER_CAP if sweep_id == self.over else 15_600_000
        return Sweep(self.services.paths.home, sweep_id=sweep_id, mean_bytes=size, space=SPACE)

    def log(self, sweep_id: str, text: str) -> Path:
        """Write what the driver of a sweep said."""
        path = self.services.paths.sweep(sweep_id).logs / "driver.log"
        write_text(path, text)
        return path


def filled(services: Services) -> Home:
    """Fill a home: a sweep that has succeeded, one whose finals are all too large, one that runs
    with its first training under way, one in the queue."""
    home = Home(services)
    home.sweep(home.done).write()
    home.sweep(home.over).write()
    running = home.sweep(home.running)
    with running.open() as ledger:
        running.start(ledger)
        running.begin(ledger, running.train_points()[0])
    for sweep_id in home.ids:
        enqueue(services, sweep_id)
    advance(services, home.done, State.SUCCEEDED)
    advance(services, home.over, State.SUCCEEDED)
    advance(services, home.running, State.RUNNING)
    home.log(home.done, "event=attempt number=1\nsweep_finished\n")
    return home


def enqueue(services: Services, sweep_id: str) -> SweepRecord:
    """Put a sweep into the queue as planning would have made it."""
    new = NewSweep(
        sweep_id=sweep_id,
        name=sweep_id.rpartition("-")[0],
        recipe="pr414",
        bundle=f"bundle-{sweep_id}",
        assignments=(),
        digest=f"{sweep_id:0<64}",
        plan={**PLAN, "sweep_id": sweep_id},
    )
    write_text(services.paths.submissions / new.bundle / "sweep.yaml", f"name: {new.name}\n")
    return services.queue.submit(new, ANN)[0]


def advance(services: Services, sweep_id: str, state: State, reason: str | None = None) -> None:
    """Bring a sweep to a state as the dispatcher would, with its ledger's figures."""
    record = services.queue.get(sweep_id)
    if record.gangs_held == 0:
        claimed = services.queue.claim(sweep_id, 1)
        assert claimed is not None
        record = claimed
    summary = services.tails.of(sweep_id).ask(summary_of)
    assert services.queue.advance(record, state=state, reason=reason, summary=summary)

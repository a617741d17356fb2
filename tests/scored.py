"""A home with a scored sweep, made without Ray: real stages, a real ledger, real sheets.

Trunks and trainings run in this process and finals as a worker runs them; the recorder writes down
what it would hear from Ray Tune.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from service.facts import environment, write_facts
from service.identity import inputs_of
from service.ledger import Ledger, SweepView, replay
from service.paths import Paths
from service.plan import Final, Plan, Training, make_plan
from service.recorder import Recorder
from service.sheet import Sheet, Sheets
from service.store import Store
from service.sweep import Sweep, load_sweep
from service.talk import Talk
from service.tasks import run_final
from service.tree import Trunk
from service.worker_facts import worker_facts
from tests import tiny
from trainer.codec import dump, to_yaml
from trainer.data.shards import Dataset
from trainer.run import grow_trunk, train
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import write_text

SWEEP = """\
name: scored
recipe: {recipe}
space:
  final.quantize.clip: {{values: [none, p5]}}
seeds: {{search: [7]}}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
"""


@dataclass(frozen=True)
class Scored:
    """A home, the sweep that was scored in it, and its data."""

    paths: Paths
    sweep_id: str
    dataset: Dataset

    def view(self) -> SweepView:
        return replay(self.paths.sweep(self.sweep_id).ledger)

    def finals(self) -> list[str]:
        """The finals in the order in which they were scored."""
        return list(self.view().finals)

    def sheet(self, final: str) -> Path:
        return self.paths.store / "finals" / final / "sheet.json"


def scored_home(
    root: Path, text: str = SWEEP, values: dict[str, Any] | None = None, *, sheets: bool = True
) -> Scored:
    """Score a sweep of the micro recipe in a new home under `root`."""
    paths = Paths(root / "home")
    paths.data("").mkdir(parents=True)
    dataset = tiny.dataset(paths.data(""))
    recipe = root / "micro.yaml"
    write_text(recipe, to_yaml(tiny.recipe({"train.iterations": 6, **(values or {})})))
    file = root / "sweep.yaml"
    write_text(file, text.format(recipe=recipe))
    sweep = load_sweep(file)
    plan = make_plan(sweep, inputs_of(dataset), str(file))
    store = Store(paths.store)
    with Ledger(paths.sweep(plan.sweep_id).ledger) as ledger:
        recorder = Recorder(
            ledger, store, Talk(Console(file=io.StringIO())), sweep.constraints, sweep.clocks
        )
        recorder.sheets = Sheets(paths, dataset) if sheets else None
        _start(ledger, sweep, plan, dataset)
        for trunk in plan.trunks:
            _grow(store, trunk, dataset)
        for training in plan.trainings:
            recorder.expect(training)
            recorder.training_started(training)
            recorder.training_finished(training, _trained(store, training, dataset))
        for final in plan.finals:
            recorder.expect(final)
            recorder.final_ended(_final(store, final, dataset))
        recorder.sweep_finished("succeeded", None)
    return Scored(paths, plan.sweep_id, dataset)


def _start(ledger: Ledger, sweep: Sweep, plan: Plan, dataset: Dataset) -> None:
    ledger.append(
        "sweep_started",
        sweep_id=plan.sweep_id,
        name=sweep.spec.name,
        recipe=sweep.spec.recipe,
        spec=dump(sweep.spec),
        effective_recipe=sweep.recipe,
        varying=list(plan.varying),
        num_trainings=plan.num_trainings,
        num_finals=plan.num_finals,
        cap_bytes=sweep.cap_bytes,
        facts={**environment(dataset), "spec_digest": plan.sweep_id},
    )


def _grow(store: Store, trunk: Trunk, dataset: Dataset) -> None:
    states = [(state.departure, store.folder("states", state.id)) for state in trunk.states]
    for _, folder in states:
        write_facts(folder, worker_facts(Ranks().device))
    start = trunk.parent and store.folder("states", trunk.parent)
    grow_trunk(trunk.task, dataset, states, states[-1][1], Ranks(), start=start)


def _trained(store: Store, training: Training, dataset: Dataset) -> dict[str, Any]:
    folder = store.folder("trainings", training.id)
    write_facts(folder, worker_facts(Ranks().device))
    start = training.branch and store.folder("states", training.branch)
    train(training.task, dataset, folder, Ranks(), start=start)
    result = store.find("trainings", training.id)
    return {"state": "succeeded", "reason": None, "cached": False, "result": result}


def _final(store: Store, final: Final, dataset: Dataset) -> dict[str, Any]:
    job = {
        "store": str(store.root),
        "data": str(dataset.folder),
        "training": final.training,
        "final": final.id,
        "artifact": final.artifact,
        "hessians": final.hessians,
        "task": dump(final.task),
        "cpus": 1,
        "device": "cpu",
    }
    return {"final": final.id, "kind": "final", **run_final(job)}


def on_final(sheet: Sheet, **facts: Any) -> Sheet:
    """The sheet of a final that was computed with other things."""
    assert sheet.final_worker is not None
    return replace(sheet, final_worker=replace(sheet.final_worker, **facts))


def on_both(sheet: Sheet, **facts: Any) -> Sheet:
    """The same of a final whose training was, too."""
    assert sheet.train_worker is not None
    return replace(on_final(sheet, **facts), train_worker=replace(sheet.train_worker, **facts))

"""What a sweep is going to write to its store, as far as it does not lie there yet. Light.

An estimate: tensors are counted as float32, artifacts at the high end of their forecast. Hessians
of finals that are yet to be made, by a TPE or to confirm, are left out.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from service.attention import EVALUATE_FIELD, TRAIN_FIELD, Kernel
from service.plan import DECAY, Plan, first_point
from service.store import Store
from service.sweep import Sweep
from trainer.blueprint import blueprint
from trainer.errors import UsageError
from trainer.sizes import tensor_sizes
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe
from trainer.specs.task import TrainTask, train_task
from tune_spaces.space import Point

_FLOAT = 4  # bytes
_CHECKPOINTS = 3  # of a training under way: two are kept, and a third is whole before one goes


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by what they hold. Checkpoints are those of the trainings under way: they go when a
    training is done."""

    banks: int
    states: int
    checkpoints: int
    hessians: int
    artifacts: int

    @property
    def total(self) -> int:
        return self.banks + self.states + self.checkpoints + self.hessians + self.artifacts


def example(sweep: Sweep, plan: Plan | None = None) -> Recipe:
    """The recipe of one point of the sweep: what all points have in common, it has.

    The first of its `plan`, where that has points; UsageError if `where` drops every one.
    """
    return _recipe_at(sweep, _example_point(sweep, plan))


def _example_point(sweep: Sweep, plan: Plan | None) -> Point:
    finals = () if plan is None else plan.finals
    return finals[0].point if finals else first_point(sweep, f"sweep {sweep.spec.name}")


def _recipe_at(sweep: Sweep, point: Point) -> Recipe:
    return sweep.recipe_at(point, sweep.spec.seeds.search[0], f"sweep {sweep.spec.name}")


def kernels(sweep: Sweep, plan: Plan | None = None) -> tuple[Kernel, ...]:
    """The attention kernels that the sweep's points name, each once: an example's, the plan's, and
    what the space allows where a search is yet to make points."""
    recipes = [example(sweep, plan)]
    if plan is None or len(plan.finals) < plan.num_finals:
        recipes += _with_other_kernels(sweep, plan)
    named = [(TRAIN_FIELD, one.train.attention) for one in recipes]
    named += [(EVALUATE_FIELD, one.evaluate.attention) for one in recipes]
    if plan is not None:
        named += [(TRAIN_FIELD, each.task.train.attention) for each in plan.trainings]
        named += [(EVALUATE_FIELD, each.task.evaluate.attention) for each in plan.finals]
    return tuple(Kernel(*each) for each in dict.fromkeys(named) if each[1] is not None)


def _with_other_kernels(sweep: Sweep, plan: Plan | None) -> list[Recipe]:
    """The example with each choice of kernels that the space has."""
    point, recipes = _example_point(sweep, plan), []
    axes = {
        path: axis.values
        for path, axis in sweep.spec.space.items()
        if path.startswith((TRAIN_FIELD, EVALUATE_FIELD)) and axis.values is not None
    }
    for values in product(*axes.values()):
        with suppress(UsageError):  # a kernel and itself as its substitute: no point has both
            recipes.append(_recipe_at(sweep, {**point, **dict(zip(axes, values, strict=True))}))
    return recipes


def footprint(sweep: Sweep, plan: Plan, store: Store) -> Footprint:
    """Estimate what is still to be written; the confirming trainings are counted at an example's
    size, and so are those whose points a search is yet to make."""
    one = _example_task(sweep, plan)
    open_trainings = [t for t in plan.trainings if not _is_done(store, "trainings", t.id)]
    confirming = len(sweep.spec.seeds.confirm) * sweep.spec.search.confirm.top
    more = plan.num_trainings - len(plan.trainings) + confirming
    banks = [_bank_bytes(t.task) for t in open_trainings] + more * [_bank_bytes(one)]
    states = [
        _state_bytes(trunk.task)
        for trunk in plan.trunks
        for state in trunk.states
        if not _is_done(store, "states", state.id)
    ]
    at_once = min(sweep.spec.limits.max_concurrent or 1, len(banks))
    models = {t.id: t.task.model for t in plan.trainings}
    hessians = {f.hessians: models[f.training] for f in plan.finals if f.hessians is not None}
    artifacts = {final.artifact for final in plan.finals}
    num_open = sum(not _is_done(store, "artifacts", artifact) for artifact in artifacts)
    num_unknown = plan.num_finals - len(plan.finals) + confirming
    return Footprint(
        banks=sum(banks),
        states=sum(states),
        checkpoints=at_once * _CHECKPOINTS * _state_bytes(one),
        hessians=sum(
            _hessians_bytes(model)
            for key, model in hessians.items()
            if not _is_done(store, "hessians", key)
        ),
        artifacts=(num_open + num_unknown) * plan.forecast["weights_bytes_interval"][1],
    )


def _is_done(store: Store, kind: str, stage_id: str) -> bool:
    return (store.folder(kind, stage_id) / "result.json").is_file()


def _example_task(sweep: Sweep, plan: Plan) -> TrainTask:
    """The training of an example, every decay of the space in its bank."""
    task, axis = train_task(example(sweep, plan)), sweep.spec.space.get(DECAY)
    if axis is None or axis.values is None:
        return task
    averages = replace(task.train.averages, ema_bank=tuple(map(float, axis.values)))
    return replace(task, train=replace(task.train, averages=averages))


def _bank_bytes(task: TrainTask) -> int:
    averages = task.train.averages
    entries = 1 + len(averages.decays()) + (averages.swa is not None)
    return _FLOAT * sum(_sizes(task.model).values()) * entries


def _state_bytes(task: TrainTask) -> int:
    """Weights, their averages, Muon's momentum of the matrices, Adam's two moments of the rest."""
    sizes = _sizes(task.model)
    optimizers = sum(num * (1 if role == "matrix" else 2) for role, num in sizes.items())
    return _bank_bytes(task) + _FLOAT * optimizers


@lru_cache(maxsize=64)
def _sizes(model: ModelSpec) -> dict[str, int]:
    """Parameters by role."""
    sizes: dict[str, int] = {}
    for tensor in tensor_sizes(blueprint(model)):
        sizes[tensor.role] = sizes.get(tensor.role, 0) + tensor.numel
    return sizes


def _hessians_bytes(model: ModelSpec) -> int:
    """One square of its input width for each matrix and for the token table."""
    matrices = [t for t in tensor_sizes(blueprint(model)) if t.role in ("matrix", "embed", "head")]
    return _FLOAT * sum(tensor.shape[-1] ** 2 for tensor in matrices)

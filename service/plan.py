"""What a sweep would run, with ids, costs and forecast sizes. Pure: no GPU, no Ray, no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from service.forecast import forecast_cost, forecast_sizes
from service.identity import (
    Inputs,
    artifact_id,
    device_of,
    final_id,
    fit_digest,
    fit_id,
    hessians_id,
    rank_id,
    state_id,
    sweep_id,
    training_id,
)
from service.specs import Resources
from service.sweep import Sweep
from service.tree import Trunk, grow_tree
from trainer.codec import fingerprint, with_values
from trainer.errors import UsageError
from trainer.optim.schedule import check_late_parts
from trainer.sizes import forecast_weights_bytes, num_params
from trainer.specs.recipe import Recipe
from trainer.specs.task import (
    FinalTask,
    TrainTask,
    artifact_task,
    final_task,
    fit_task,
    hessians_task,
    train_task,
)
from tune_spaces.axes import Value
from tune_spaces.expressions import knobs_read
from tune_spaces.space import Point, grid, of_phase, sample, when_of

DECAY, AVERAGE = "train.averages.ema_decay", "final.average"


@dataclass(frozen=True, slots=True)
class Training:
    """A training to run: its identity, the point and seed it stands for, its task.

    `branch` is the state of a trunk that it starts from; None where it runs from step 0.
    """

    id: str
    point: Point
    seed: int
    task: TrainTask
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class Final:
    """A final to run on a training's bank. Finals that differ in their evaluation share an
    artifact; artifacts that differ in their rounding share Hessians, if they have any."""

    id: str
    training: str
    artifact: str
    hessians: str | None
    rank: str
    """The id of its score on held-out training shards."""
    point: Point
    seed: int
    task: FinalTask


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a sweep runs."""

    sweep_id: str
    trunks: tuple[Trunk, ...]
    """In an order in which each comes after the one it starts from."""
    trainings: tuple[Training, ...]
    finals: tuple[Final, ...]
    varying: tuple[str, ...]
    forecast: dict[str, Any]
    num_trainings: int
    """How many trainings and finals there will be, with those whose points are yet to be made."""
    num_finals: int


def make_plan(
    sweep: Sweep, inputs: Inputs, where: str, *, seconds_per_step: float | None = None
) -> Plan:
    """Expand a sweep into trunks, trainings and finals, each distinct one once.

    A TPE makes its points as it goes: of those there are none here, but one example is checked
    and costed for all of them. `seconds_per_step`: what a step takes, where that is known.
    """
    search, seeds = sweep.spec.search, len(sweep.spec.seeds.search)
    is_known = search.train.method != "tpe"
    # Who may be stopped is compared with others at the steps where it validates. A tail does so
    # only after its departure, so trainings that are judged on the way run from step 0.
    branches = is_known and search.train.stop is None
    straight = _plan_trainings(sweep, inputs, where)
    times = 1 if is_known else seeds * (search.train.num or 1)
    tree = grow_tree(
        {training.id: training.task for training in straight if branches},
        partial(state_id, inputs=inputs, resources=sweep.spec.resources),
    )
    trainings = tuple(
        _branched(training, tree.branches.get(training.id), inputs, sweep.spec.resources)
        for training in straight
    )
    dropped = _count_dropped(sweep, trainings, where)
    finals = _plan_finals(sweep, inputs, trainings, where)
    num_finals = len(finals)
    if search.final.method == "tpe":
        num_finals = len(trainings) * (search.final.per_bank or 1)
    cost = forecast_cost(
        [(training.task, training.branch) for training in trainings],
        tree.trunks,
        times=times,
        workers=sweep.spec.resources.workers,
        seconds_per_step=seconds_per_step,
    )
    models = {training.id: training.task.model for training in trainings}
    sizes = forecast_sizes({(models[final.training], final.task.final) for final in finals})
    is_made = is_known and search.final.method != "tpe"
    return Plan(
        sweep_id=sweep_id(sweep, inputs),
        trunks=tree.trunks,
        trainings=trainings if is_known else (),
        finals=finals if is_made else (),
        varying=tuple(sweep.spec.space),
        forecast={**cost, **sizes, "dropped_points": dropped},
        num_trainings=len(trainings) * times,
        num_finals=num_finals * times,
    )


def _plan_trainings(sweep: Sweep, inputs: Inputs, where: str) -> tuple[Training, ...]:
    """Every training, run from step 0; an example of those that a TPE is to make."""
    seeds = sweep.spec.seeds.search
    if sweep.spec.search.train.method == "tpe":
        seeds = seeds[:1]
    trainings: dict[str, Training] = {}
    for point in _train_points(sweep, where).kept:
        for seed in seeds:
            training = plan_training(sweep, inputs, point, seed, where)
            trainings.setdefault(training.id, training)
    return tuple(trainings.values())


def plan_training(sweep: Sweep, inputs: Inputs, point: Point, seed: int, where: str) -> Training:
    """The training of one point and seed, from step 0."""
    at = f"{where}: point {_words(point)}"
    recipe = sweep.recipe_at(point, seed, at)
    _check_training(recipe, sweep, inputs, at)
    averages = _bank_values(sweep, AVERAGE, recipe.final.average, point, where)
    for average in averages or {"raw"}:  # what has no final must not fail either
        check_late_parts(recipe.train, str(average), at)
    decays = _banked_decays(sweep, recipe.train.averages.ema_decay, point, where)
    task = _with_bank(train_task(recipe), decays)
    return Training(training_id(task, inputs, sweep.spec.resources), point, seed, task)


def _branched(
    training: Training, branch: str | None, inputs: Inputs, resources: Resources
) -> Training:
    """The training as it starts from a state. Its id says so where its bits may differ: on a CPU
    a schedule by steps and without a clock ends in the same bank either way."""
    if branch is None:
        return training
    train = training.task.train
    is_same = not (resources.gpus_per_worker or train.compile or train.max_clock_s is not None)
    if is_same and train.schedule.basis == "steps":
        return replace(training, branch=branch)
    own = training_id(training.task, inputs, resources, branch=branch)
    return replace(training, id=own, branch=branch)


def _plan_finals(
    sweep: Sweep, inputs: Inputs, trainings: tuple[Training, ...], where: str
) -> tuple[Final, ...]:
    """Every final; one example for each training where a TPE is to make them."""
    finals = [
        plan_final(sweep, inputs, training, point, where)
        for training in trainings
        for point in final_points(sweep, where, training.point)
    ]
    return tuple({final.id: final for final in finals}.values())


def _check_training(recipe: Recipe, sweep: Sweep, inputs: Inputs, where: str) -> None:
    """Refuse what would fail only once a gang is up, or only after it has trained."""
    train, workers = recipe.train, sweep.spec.resources.workers
    sequences = train.batch_tokens // train.seq_len
    if sequences % workers:
        raise UsageError(
            f"{where}: train.batch_tokens={train.batch_tokens} is {sequences} sequences, which "
            f"resources.workers={workers} do not share evenly"
        )
    if recipe.model.vocab_size < inputs.vocab_size:
        raise UsageError(
            f"{where}: model.vocab_size={recipe.model.vocab_size} is below the "
            f"{inputs.vocab_size} tokens of the data; set model.vocab_size={inputs.vocab_size}"
        )


def _with_bank(task: TrainTask, decays: tuple[float, ...]) -> TrainTask:
    averages = task.train.averages
    if decays:
        averages = replace(averages, ema_bank=decays)
    return replace(task, train=replace(task.train, averages=averages))


def _banked_decays(sweep: Sweep, own: float | None, bank: Point, where: str) -> tuple[float, ...]:
    """Every EMA decay that a final of a training asks a bank for, ascending; the recipe's `own`
    is among them only where a final lacks the axis. Without an axis none: the recipe's bank will
    do."""
    axis = sweep.spec.space.get(DECAY)
    if axis is None:
        return ()
    if sweep.spec.search.final.method == "tpe" and axis.values is None:
        raise UsageError(
            f"{where}: space.{DECAY}: a training keeps every decay that a final may ask for; list "
            "values for a search by tpe"
        )
    decays = _bank_values(sweep, DECAY, own, bank, where)
    return tuple(sorted(float(decay) for decay in decays if decay is not None))


def _bank_values(
    sweep: Sweep, path: str, own: Value | None, bank: Point, where: str
) -> set[Value | None]:
    """Every value of a knob of the bank that the finals on the bank of a training's point may
    have; the recipe's `own` is that of a final without the axis."""
    axis = sweep.spec.space.get(path)
    if axis is None:
        return {own}
    if sweep.spec.search.final.method != "tpe":
        return {point.get(path, own) for point in final_points(sweep, where, bank)}
    values = {value for value in axis.values or () if sweep.accepts({**bank, path: value})}
    when = when_of(path, axis, where)
    if when is None:
        return {*values}
    later = of_phase(sweep.spec.space, "bank", "final", "eval").keys()
    if knobs_read(when.paths) & later:
        return {*values, own}
    return {*values} if when.holds(with_values(sweep.recipe, bank.items())) else {own}


class _Points(NamedTuple):
    kept: list[Point]
    num_dropped: int


def _train_points(sweep: Sweep, where: str) -> _Points:
    search, axes = sweep.spec.search.train, of_phase(sweep.spec.space, "train")
    if search.method == "grid":
        return _kept(grid(axes, sweep.recipe, where), sweep.accepts)
    at, num = f"{where}: search.train.num", search.num or 1
    points = sample(axes, sweep.recipe, num, search.seed, at, sweep.accepts)
    return _Points(points if search.method == "random" else points[:1], 0)


def first_point(sweep: Sweep, where: str) -> Point:
    """A point of the sweep, with the values of its training and of its final; an example where a
    TPE makes them. UsageError if `where` drops every one."""
    for bank in _train_points(sweep, where).kept:
        for point in final_points(sweep, where, bank):
            return {**bank, **point}
    raise UsageError(f"{where}: where drops every point of the space; allow some")


def final_points(sweep: Sweep, where: str, bank: Point) -> list[Point]:
    """The points of the final search on the bank of a training's point; one example for a TPE."""
    return _final_points(sweep, where, bank).kept


def _final_points(sweep: Sweep, where: str, bank: Point) -> _Points:
    search = sweep.spec.search.final
    axes = of_phase(sweep.spec.space, "bank", "final", "eval")
    recipe = with_values(sweep.recipe, bank.items())

    def accepts(point: Point) -> bool:
        return sweep.accepts({**bank, **point})

    if search.method == "grid":
        return _kept(grid(axes, recipe, where), accepts)
    at, num = f"{where}: search.final.per_bank", search.per_bank or 1
    points = sample(axes, recipe, num, search.seed, at, accepts)
    return _Points(points if search.method == "random" else points[:1], 0)


def _kept(points: list[Point], accepts: Callable[[Point], bool]) -> _Points:
    kept = [point for point in points if accepts(point)]
    return _Points(kept, len(points) - len(kept))


def _count_dropped(sweep: Sweep, trainings: tuple[Training, ...], where: str) -> dict[str, int]:
    """How many points of a grid `where` drops; UsageError if that leaves none."""
    if not sweep.spec.where:
        return {"train": 0, "final": 0}
    banks = {fingerprint(training.point): training.point for training in trainings}
    finals = [_final_points(sweep, where, bank) for bank in banks.values()]
    if not any(points.kept for points in finals):
        raise UsageError(f"{where}: where drops every point of the space; allow some")
    return {
        "train": _train_points(sweep, where).num_dropped,
        "final": sum(points.num_dropped for points in finals),
    }


def plan_final(sweep: Sweep, inputs: Inputs, training: Training, point: Point, where: str) -> Final:
    """The final of one bank at one point."""
    full = {**training.point, **point}
    recipe = sweep.recipe_at(full, training.seed, f"{where}: point {_words(full)}")
    task = final_task(recipe)
    made = artifact_task(task)
    hessians = hessians_task(made)
    device = device_of(sweep.spec.resources)
    return Final(
        id=final_id(task, training.id, inputs, device),
        training=training.id,
        artifact=artifact_id(made, training.id, inputs, device),
        hessians=hessians and hessians_id(hessians, training.id, inputs, device),
        rank=rank_id(task, training.id, inputs, device),
        point=full,
        seed=training.seed,
        task=task,
    )


def fitted_final(final: Final, sweep: Sweep, inputs: Inputs) -> Final:
    """The final of the same point whose clips and bits are chosen so that it fits the sweep's cap.
    Points that differ only in what is chosen have the same one."""
    assert sweep.cap_bytes is not None  # or nothing would be over it
    task, device = fit_task(final.task), device_of(sweep.spec.resources)
    own = fit_id(task, sweep.cap_bytes, fit_digest(), final.training, inputs, device)
    return replace(final, id=own)


def _words(point: Point) -> str:
    return " ".join(f"{path}={value}" for path, value in point.items()) or "(the recipe)"


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """What the catalogue shows of a recipe."""
    return {
        "recipe": recipe.name,
        "num_params": num_params(recipe.model),
        "forecast_bytes": forecast_weights_bytes(recipe.model, recipe.final),
    }

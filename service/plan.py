"""What a sweep would run, with ids, costs and forecast sizes. Pure: no GPU, no Ray, no torch.

A stage's id is the sha256 of everything that can change its bytes, and of nothing else: never
a path, a name or a resource that only says where it runs.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from service.sweep import Resources, Sweep
from trainer.codec import dump, fingerprint
from trainer.data.shards import Dataset
from trainer.errors import UsageError
from trainer.finalize.code import code_digest
from trainer.optim.schedule import check_late_parts
from trainer.protocol import SPEC_VERSION
from trainer.sizes import (
    flops_per_token,
    forecast_interval,
    forecast_weights_bytes,
    num_params,
)
from trainer.specs.recipe import Recipe
from trainer.specs.task import (
    ArtifactTask,
    FinalTask,
    HessiansTask,
    TrainTask,
    artifact_task,
    final_task,
    hessians_task,
    train_task,
)
from tune_spaces.space import Point, grid, of_phase, sample

ID_LENGTH = 20
DECAY = "train.averages.ema_decay"


@dataclass(frozen=True, slots=True)
class Training:
    """A training to run: its identity, the point and seed it stands for, its task."""

    id: str
    point: Point
    seed: int
    task: TrainTask


@dataclass(frozen=True, slots=True)
class Final:
    """A final to run on a training's bank. Finals that differ in their evaluation share an
    artifact; artifacts that differ in their rounding share Hessians, if they have any."""

    id: str
    training: str
    artifact: str
    hessians: str | None
    point: Point
    seed: int
    task: FinalTask


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a sweep runs."""

    sweep_id: str
    trainings: tuple[Training, ...]
    finals: tuple[Final, ...]
    varying: tuple[str, ...]
    forecast: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What identity needs beyond the sweep: the data and the code that is counted."""

    data_digest: str
    code_digest: str
    vocab_size: int


def inputs_of(dataset: Dataset) -> Inputs:
    """The inputs of a sweep on this data, with the code as it is here."""
    return Inputs(dataset.digest, code_digest(), dataset.vocab_size)


def make_plan(sweep: Sweep, inputs: Inputs, where: str) -> Plan:
    """Expand a sweep into trainings and finals, each distinct one once."""
    trainings = _plan_trainings(sweep, inputs, where)
    finals = tuple(
        plan_final(sweep, inputs, training, point, where)
        for training in trainings
        for point in _final_points(sweep, where)
    )
    distinct = tuple({final.id: final for final in finals}.values())
    return Plan(
        sweep_id=sweep_id(sweep, inputs),
        trainings=trainings,
        finals=distinct,
        varying=tuple(sweep.spec.space),
        forecast=_forecast(trainings, [final.task for final in distinct]),
    )


def _plan_trainings(sweep: Sweep, inputs: Inputs, where: str) -> tuple[Training, ...]:
    axes, search = of_phase(sweep.spec.space, "train"), sweep.spec.search.train
    if search.method == "grid":
        points = grid(axes, where)
    else:
        points = sample(axes, search.num or 1, search.seed, f"{where}: search.train.num")
    decays = _banked_decays(sweep, where)
    trainings: dict[str, Training] = {}
    for point in points:
        for seed in sweep.spec.seeds.search:
            recipe = sweep.recipe_at(point, seed, f"{where}: point {_words(point)}")
            task = _with_bank(train_task(recipe), decays)
            _check_training(recipe, sweep, inputs, f"{where}: point {_words(point)}")
            key = training_id(task, inputs, sweep)
            trainings.setdefault(key, Training(key, point, seed, task))
    return tuple(trainings.values())


def _banked_decays(sweep: Sweep, where: str) -> tuple[float, ...]:
    """Every EMA decay that a final of the sweep asks a bank for."""
    points = _final_points(sweep, where)
    return tuple({float(p[DECAY]) for p in points if DECAY in p})


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
    check_late_parts(train, recipe.final.average, where)


def _with_bank(task: TrainTask, decays: tuple[float, ...]) -> TrainTask:
    averages = task.train.averages
    if decays:  # the axis replaces the recipe's own decay: nothing asks for that one
        averages = replace(averages, ema_bank=tuple(sorted(decays)))
    return replace(task, train=replace(task.train, averages=averages))


def _final_points(sweep: Sweep, where: str) -> list[Point]:
    axes, search = of_phase(sweep.spec.space, "bank", "final", "eval"), sweep.spec.search.final
    if search.method == "grid":
        return grid(axes, where)
    return sample(axes, search.per_bank or 1, search.seed, f"{where}: search.final.per_bank")


def plan_final(sweep: Sweep, inputs: Inputs, training: Training, point: Point, where: str) -> Final:
    """The final of one bank at one point."""
    full = {**training.point, **point}
    recipe = sweep.recipe_at(full, training.seed, f"{where}: point {_words(full)}")
    task = final_task(recipe)
    made = artifact_task(task)
    hessians = hessians_task(made)
    device = _device(sweep.spec.resources)
    return Final(
        id=final_id(task, training.id, inputs, device),
        training=training.id,
        artifact=artifact_id(made, training.id, inputs, device),
        hessians=hessians and hessians_id(hessians, training.id, inputs, device),
        point=full,
        seed=training.seed,
        task=task,
    )


def sweep_id(sweep: Sweep, inputs: Inputs) -> str:
    """A sweep's name and what it asks for: the same file on the same data and code is the same."""
    asked = {"spec": dump(sweep.spec), "recipe": sweep.recipe, **asdict(inputs)}
    return f"{sweep.spec.name}-{fingerprint(asked)[:10]}"


def training_id(task: TrainTask, inputs: Inputs, sweep: Sweep) -> str:
    """Identity of a training. World size and device set the order of sums, so they count."""
    resources = sweep.spec.resources
    described = dump(task)
    described.pop("observe")  # what is written down on the way changes no weight
    return _id(
        "training",
        task=described,
        data=inputs.data_digest,
        world_size=resources.workers,
        attention="sdpa",
        **_device(resources),
    )


def _device(resources: Resources) -> dict[str, Any]:
    """What sets the order of sums on one worker."""
    if resources.gpus_per_worker:
        return {"device": "cuda"}
    return {"device": "cpu", "threads": resources.cpus_per_worker}


def final_id(task: FinalTask, training: str, inputs: Inputs, device: dict[str, Any]) -> str:
    """Identity of a final. The code is part of the artifact, so its digest counts."""
    return _id("final", task=dump(task), training=training, code=inputs.code_digest, **device)


def artifact_id(task: ArtifactTask, training: str, inputs: Inputs, device: dict[str, Any]) -> str:
    """Identity of an artifact, its code included."""
    return _id("artifact", task=dump(task), training=training, code=inputs.code_digest, **device)


def hessians_id(task: HessiansTask, training: str, inputs: Inputs, device: dict[str, Any]) -> str:
    """Identity of a bank entry's Hessians. The forward that they come from is code, too."""
    return _id("hessians", task=dump(task), training=training, code=inputs.code_digest, **device)


def parity_id(training: str) -> str:
    """Identity of a bank's parity check."""
    return _id("parity", training=training)


def _id(kind: str, **facts: Any) -> str:
    return fingerprint({"kind": kind, "spec_version": SPEC_VERSION, **facts})[:ID_LENGTH]


def _forecast(trainings: tuple[Training, ...], finals: list[FinalTask]) -> dict[str, Any]:
    """Steps, tokens, FLOPs, and the span of forecast weights bytes, alone and with their
    intervals."""
    steps = sum(training.task.train.iterations for training in trainings)
    tokens = sum(t.task.train.iterations * t.task.train.batch_tokens for t in trainings)
    flops = sum(
        3
        * flops_per_token(t.task.model, t.task.train.seq_len)
        * t.task.train.iterations
        * t.task.train.batch_tokens
        for t in trainings
    )
    models = {t.task.model for t in trainings}
    weights = [forecast_interval(model, task.final) for model in models for task in finals]
    return {
        "steps": steps,
        "tokens": tokens,
        "train_flops": flops,
        "num_params": sorted({num_params(model) for model in models}),
        "weights_bytes": [min(f.point for f in weights), max(f.point for f in weights)]
        if weights
        else None,
        "weights_bytes_interval": [min(f.low for f in weights), max(f.high for f in weights)]
        if weights
        else None,
    }


def _words(point: Point) -> str:
    return " ".join(f"{path}={value}" for path, value in point.items()) or "(the recipe)"


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """What the catalogue shows of a recipe."""
    return {
        "recipe": recipe.name,
        "num_params": num_params(recipe.model),
        "forecast_bytes": forecast_weights_bytes(recipe.model, recipe.final),
    }

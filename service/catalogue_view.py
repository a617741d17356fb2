"""What the planning verbs show: recipes, a plan in numbers. No torch, no Ray."""

from typing import Any

from service.paths import Paths
from service.plan import Plan, describe_recipe
from service.sweep import Sweep
from trainer.codec import parse
from trainer.data.prepare import EMBEDDED_NAME, prepare_embedded
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import UsageError
from trainer.specs.recipe import DataSpec, Recipe
from tune_spaces.catalogue import card, describe, load_recipe, names


def data_of(paths: Paths, data: DataSpec) -> Dataset:
    """Open a sweep's dataset, making the embedded one where it is missing."""
    folder = paths.data(data.name)
    if folder.is_dir():
        dataset = load_dataset(folder)  # damaged is an error, never made again in silence
    elif data.name == EMBEDDED_NAME:
        dataset = prepare_embedded(folder)
    else:
        raise UsageError(
            f"{folder}: no dataset {data.name!r}; make it with `fairway data prepare` or get a "
            "published one with `fairway data fetch`"
        )
    if data.digest is not None and data.digest != dataset.digest:
        raise UsageError(
            f"{folder}: data.digest is {data.digest}, but the files have {dataset.digest}; "
            "prepare the data the sweep was written for, or change the digest"
        )
    return dataset


def plan_document(sweep: Sweep, plan: Plan) -> dict[str, Any]:
    """A plan in numbers: what runs, what it costs, what size it predicts."""
    return {
        "sweep_id": plan.sweep_id,
        "recipe": sweep.spec.recipe,
        "trunks": len(plan.trunks),
        "trainings": plan.num_trainings,
        "finals": plan.num_finals,
        "gang": f"{sweep.spec.resources.workers} workers",
        **plan.forecast,
        "cap_bytes": sweep.cap_bytes,
        "constraints": [str(constraint) for constraint in sweep.constraints],
        "space": {
            path: list(axis.values) if axis.values else [axis.min, axis.max]
            for path, axis in sweep.spec.space.items()
        },
    }


def recipe_rows(name: str | None) -> Any:
    """One line a shipped recipe, or one recipe in full."""
    if name is not None:
        return load_recipe(name, "recipes")
    rows = []
    for known in names("recipes"):
        recipe = parse(Recipe, load_recipe(known, "recipes"), known)
        # The verdict opens the card's bullet; the sentences after it give the reasons.
        verdict = card(known)["legal"].partition(". ")[0].removesuffix(".")
        rows.append({**describe_recipe(recipe), "legal": verdict, "description": describe(known)})
    return rows

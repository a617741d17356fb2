"""All checks of a recipe, in the order of what is worth knowing first."""

import tempfile
from pathlib import Path

from trainer.liveness.artifact import artifact_rules
from trainer.liveness.parts import flags
from trainer.liveness.probe import not_checked
from trainer.liveness.scoring import causality, coverage, normalisation
from trainer.liveness.training import compiled_rules, step_rules
from trainer.results import Rule
from trainer.specs.recipe import Recipe
from trainer.specs.task import train_task


def check_recipe(recipe: Recipe) -> tuple[Rule, ...]:
    """Run every liveness check on a recipe's real parts, on the CPU in float32.

    A model with an orphan parameter cannot be built for training: then that rule comes alone.
    """
    task = train_task(recipe)
    steps = step_rules(task)
    if len(steps) == 1:
        return tuple(steps)
    with tempfile.TemporaryDirectory(prefix="fairway-liveness-") as folder:
        artifact = artifact_rules(recipe.model, recipe.final, Path(folder))
    return (
        *steps,
        flags(recipe.model),
        causality(recipe.model),
        normalisation(recipe.model),
        coverage(recipe.evaluate),
        *artifact,
        *compiled_rules(task),
        not_checked("test-time-training", "no recipe adapts while it is scored"),
    )

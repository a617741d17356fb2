"""`python -m trainer RECIPE.yaml`: one training, its final and its score, without the service.

Works alone and under torchrun. A finished training in the output folder is kept. Given an
artifact's folder instead of a recipe, it scores that:
`python code.pyz artifact --data DATA -S window=2048 -S stride=64`.
"""

import argparse
import json
import sys
from pathlib import Path

from trainer.artifacts import collect, make_artifact
from trainer.codec import dump, parse, parse_assignment, read_recipe, to_yaml, with_values
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import FairwayError, InfeasibleError, UsageError
from trainer.kernels.chosen import kernels_of_score
from trainer.optim.schedule import check_late_parts
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.results import FinalResult, Score
from trainer.run import (
    check_parity,
    finalize,
    is_trained,
    score_artifact,
    train,
)
from trainer.runtime.distributed import Ranks, from_torchrun
from trainer.runtime.files import write_text
from trainer.runtime.logs import configure
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.recipe import Recipe
from trainer.specs.task import artifact_task, final_task, hessians_task, train_task


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a recipe file, or an artifact to score")
    parser.add_argument("-S", dest="overrides", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("-o", "--out", type=Path, default=Path("out"), help="output folder")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of prepared shards; default: OUT/data/NAME, made for `embedded`",
    )
    return parser.parse_args(argv)


def _dataset(folder: Path, name: str, ranks: Ranks) -> Dataset:
    if name == "embedded" and ranks.is_first and not folder.is_dir():
        # The artifact's code has no text to prepare: it is given a folder.
        from trainer.data.prepare import prepare_embedded

        prepare_embedded(folder)
    ranks.barrier()
    return load_dataset(folder)


def run(arguments: argparse.Namespace, ranks: Ranks) -> FinalResult | None:
    """Walk the line once and return the final's result, on the first rank."""
    values = [parse_assignment(text) for text in arguments.overrides]
    data = with_values(read_recipe(arguments.recipe), values)
    recipe = parse(Recipe, data, str(arguments.recipe))
    check_late_parts(recipe.train, recipe.final.average, str(arguments.recipe))
    kernels_of_score(recipe.evaluate, ranks.device, recipe.train.dtype)  # before the training
    out: Path = arguments.out
    dataset = _dataset(arguments.data or out / "data" / recipe.data.name, recipe.data.name, ranks)
    if ranks.is_first:
        write_text(out / "effective.yaml", to_yaml(recipe))
    training = out / "training"
    task = train_task(recipe)
    if not is_trained(task, dataset, training, ranks):
        train(task, dataset, training, ranks)
    if not ranks.is_first:
        return None
    alone = Ranks(device=ranks.device)
    parity = check_parity(training, dataset, out / "parity", alone)
    final = final_task(recipe)
    made, hessians = artifact_task(final), None
    if (needed := hessians_task(made)) is not None:
        hessians = out / "hessians"
        collect(needed, training, dataset, hessians, alone)
    make_artifact(made, training, dataset, out / "made", hessians, alone)
    return finalize(final, training, out / "made", dataset, out / "final", parity.rule, alone)


def score(arguments: argparse.Namespace, ranks: Ranks) -> Score | None:
    """Score an artifact's folder on the val split of --data; -S sets window, stride, variant."""
    if not ranks.is_first:
        return None
    if arguments.data is None:
        raise UsageError("--data: give the folder of prepared shards to score on")
    values = [parse_assignment(text) for text in arguments.overrides]
    spec = parse(EvaluateSpec, with_values({}, values), "-S")
    alone = Ranks(device=ranks.device)
    dataset = load_dataset(arguments.data)
    return score_artifact(arguments.recipe, dataset, spec, alone, dtype="float32")


def require_submittable(result: FinalResult) -> None:
    """Raise InfeasibleError for an artifact over the challenge's cap or a failed audit."""
    over = result.artifact_bytes - ARTIFACT_BYTES_CAP
    if over > 0:
        raise InfeasibleError(
            f"artifact: {result.artifact_bytes:,} bytes, {over:,} over the cap of "
            f"{ARTIFACT_BYTES_CAP:,}; prune more, use fewer bits or a smaller model"
        )
    for rule in result.audit:
        if rule.verdict == "fail":
            raise InfeasibleError(f"audit {rule.id}: {rule.detail}")


def main(argv: list[str] | None = None) -> int:
    """Run one recipe; the result goes to stdout, a fault to stderr as one line and an exit code."""
    arguments = _arguments(argv)
    with from_torchrun() as ranks:
        configure(ranks.rank)
        try:
            is_artifact = arguments.recipe.is_dir()
            result = score(arguments, ranks) if is_artifact else run(arguments, ranks)
        except FairwayError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
    if result is None:
        return 0
    sys.stdout.write(json.dumps(dump(result), indent=1) + "\n")
    try:
        if isinstance(result, FinalResult):
            require_submittable(result)
    except InfeasibleError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

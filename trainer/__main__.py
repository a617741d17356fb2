"""`python -m trainer RECIPE.yaml`: one training, its final and its score, without the service.

Works alone and under torchrun. Finished stages in the output folder are kept.
"""

import argparse
import json
import sys
from pathlib import Path

from trainer.codec import dump, parse, parse_assignment, read_recipe, to_yaml, with_values
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import FairwayError, InfeasibleError
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.results import FinalResult
from trainer.run import check_parity, finalize, is_trained, train
from trainer.runtime.distributed import Ranks, from_torchrun
from trainer.runtime.files import write_text
from trainer.runtime.logs import configure
from trainer.specs.recipe import Recipe
from trainer.specs.task import final_task, train_task


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a recipe file")
    parser.add_argument("-S", dest="overrides", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("-o", "--out", type=Path, default=Path("out"), help="output folder")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of prepared shards; default: DATA/NAME beside OUT, made for `embedded`",
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
    out: Path = arguments.out
    dataset = _dataset(arguments.data or out / "data" / recipe.data.name, recipe.data.name, ranks)
    if ranks.is_first:
        write_text(out / "effective.yaml", to_yaml(recipe))
    training = out / "training"
    task = train_task(recipe)
    if not is_trained(task, dataset, training):
        train(task, dataset, training, ranks)
    if not ranks.is_first:
        return None
    alone = Ranks(device=ranks.device)
    parity = check_parity(training, dataset, out / "parity", alone)
    final = final_task(recipe)
    return finalize(final, training, dataset, out / "final", parity.rule, alone)


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
            result = run(arguments, ranks)
        except FairwayError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
    if result is None:
        return 0
    sys.stdout.write(json.dumps(dump(result), indent=1) + "\n")
    try:
        require_submittable(result)
    except InfeasibleError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

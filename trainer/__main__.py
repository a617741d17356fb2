"""`python -m trainer RECIPE.yaml`: one training, its final and its score, without the service.

Works alone and under torchrun. Finished stages in the output folder are kept.
"""

import argparse
import json
import sys
from pathlib import Path

from trainer.codec import dump, parse, parse_assignment, read_recipe, to_yaml, with_values
from trainer.data.prepare import prepare_embedded
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import FairwayError
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
        prepare_embedded(folder)
    ranks.barrier()
    return load_dataset(folder)


def run(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, object]:
    """Walk the line once and return the final's result as plain data."""
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
        return {}
    alone = Ranks(device=ranks.device)
    parity = check_parity(training, dataset, out / "parity", alone)
    final = final_task(recipe)
    result = finalize(final, training, dataset, out / "final", parity.rule, alone)
    return dump(result)


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
    if ranks.is_first:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

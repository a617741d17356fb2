"""A bank by its training's id or as an import's folder, with the settings of its final.

Owns how BANK, --entry, --recipe and -S are understood, and which text may be read to choose by.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, get_num_threads

from service.catalogue_view import data_of
from service.facts import write_facts
from service.identity import hessians_id, inputs_of
from service.paths import Paths
from service.scored_text import read_tokens
from service.store import Store
from service.worker_facts import worker_facts
from trainer.artifacts import collect, load_training
from trainer.choosing import probe_stream
from trainer.codec import (
    dump,
    parse,
    parse_assignment,
    read_recipe,
    with_values,
)
from trainer.data.shards import Dataset, TokenStream, load_dataset
from trainer.errors import DataError, UsageError
from trainer.finalize.calibration import generated_batches, training_batches
from trainer.finalize.hessians import collect_hessians, load_hessians
from trainer.importer.folder import is_imported_bank, load_bank
from trainer.model.build import build, load_state
from trainer.model.gpt import GPT
from trainer.protocol import UNKNOWN_TOKENIZER
from trainer.runtime.distributed import Ranks, current
from trainer.runtime.files import read_json, sha256_file
from trainer.runtime.tensors import load_tensors, saved_names
from trainer.specs.final import FinalSpec
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import DataSpec, Recipe
from trainer.specs.task import ArtifactTask, final_task, hessians_task
from tune_spaces.catalogue import load_recipe


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which bank entry, and how its final is set: as the command line has it."""

    bank: str
    entry: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    data: str | None = None
    train_tokens: Path | None = None
    tokenizer: Path | None = None
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """An entry of a bank with the settings of its final. `dataset` is what it was trained on.

    `shares_stages`: it is a training of the store, in the dtype that is asked for.
    """

    where: str
    file: Path
    model: ModelSpec
    state: dict[str, Tensor]
    entry: str
    final: FinalSpec
    window: int
    tokenizer_sha256: str
    dataset: Dataset | None
    dtype: str
    shares_stages: bool = False

    def built(self) -> GPT:
        """The model on this machine's device, without what only training uses."""
        model = build(self.model.exported(), dtype=self.dtype)
        return model.to(current().device).eval()

    def on_device(self) -> dict[str, Tensor]:
        """The state where its finals are computed: on this machine's device."""
        return {name: tensor.to(current().device) for name, tensor in self.state.items()}

    def exported(self) -> dict[str, Tensor]:
        """The parameters that the built model has."""
        names = [name for name, _ in build(self.model.exported()).named_parameters()]
        return {name: self.state[name] for name in names}


def open_bank(paths: Paths, wanted: Wanted) -> Bank:
    """Find a bank and read an entry. UsageError where nothing or more than one fits."""
    recipe = None if wanted.recipe is None else _recipe(wanted.recipe)
    folder = Path(wanted.bank)
    if wanted.bank and folder.is_dir() and is_imported_bank(folder):
        return _imported(paths, folder, recipe, wanted)
    return _trained(paths, _training(paths, wanted.bank), recipe, wanted)


def _recipe(name: str) -> Recipe:
    return parse(Recipe, load_recipe(name, "--recipe"), name)


def _imported(paths: Paths, folder: Path, recipe: Recipe | None, wanted: Wanted) -> Bank:
    model, state = load_bank(folder)
    if wanted.entry not in (None, "raw"):
        raise UsageError(f"--entry {wanted.entry}: {folder} holds only raw")
    path = folder / "recipe.yaml"
    own = parse(Recipe, read_recipe(path), str(path))
    dataset = None if wanted.data is None else data_of(paths, DataSpec(name=wanted.data))
    if dataset is not None and dataset.vocab_size > model.vocab_size:
        raise UsageError(
            f"--data {wanted.data}: {dataset.vocab_size} tokens, but the model's vocab_size is "
            f"{model.vocab_size}; name data of its own tokenizer"
        )
    tokenizer = wanted.tokenizer if dataset is None else dataset.tokenizer_path
    return Bank(
        where=str(folder),
        file=folder / "bank" / "raw.pt",
        model=model,
        state=state,
        entry="raw",
        final=_final((recipe or own).final, wanted.overrides),
        window=own.evaluate.window,
        tokenizer_sha256=UNKNOWN_TOKENIZER if tokenizer is None else _sha256(tokenizer),
        dataset=dataset,
        dtype=wanted.dtype,
    )


def _sha256(tokenizer: Path) -> str:
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: no such file; give the model's SentencePiece model")
    return sha256_file(tokenizer)


def _training(paths: Paths, ref: str) -> Path:
    if not ref:
        raise UsageError("'': give a training's id, or the folder of an import")
    if (Path(ref) / "bank" / "index.json").is_file():
        return Path(ref)
    finished = sorted((paths.store / "trainings").glob("*/result.json"))
    matching = [path.parent for path in finished if path.parent.name.startswith(ref)]
    if len(matching) != 1:
        raise UsageError(
            f"{ref}: no folder of an import, and {len(matching)} trainings in {paths.store} start "
            "so; give a training's id as `fairway best` prints it"
        )
    return matching[0]


def _trained(paths: Paths, folder: Path, recipe: Recipe | None, wanted: Wanted) -> Bank:
    task, _ = load_training(folder)
    entries = saved_names(folder / "bank")
    asked = wanted.entry or (None if recipe is None else final_task(recipe).entry)
    entry = asked or entries[0]
    if (asked is None and len(entries) > 1) or entry not in entries:
        raise UsageError(f"{folder}: say which entry of the bank: --entry {' | '.join(entries)}")
    dataset = _dataset(paths, folder, wanted.data)
    return Bank(
        where=str(folder),
        file=folder / "bank" / f"{entry}.pt",
        model=task.model,
        state=load_tensors(folder / "bank", entry),
        entry=entry,
        final=_final(FinalSpec() if recipe is None else recipe.final, wanted.overrides),
        window=task.parity_window,
        tokenizer_sha256=sha256_file(dataset.tokenizer_path),
        dataset=dataset,
        dtype=wanted.dtype,
        shares_stages=task.train.dtype == wanted.dtype
        and folder.resolve().parent == (paths.store / "trainings").resolve(),
    )


def _dataset(paths: Paths, folder: Path, name: str | None) -> Dataset:
    """The data that a training read, told by its digest."""
    digest = read_json(folder / "inputs.json")["data"]
    places = [paths.data(name)] if name else sorted((paths.home / "data").glob("*"))
    for place in places:
        if place.is_dir() and (dataset := load_dataset(place)).digest == digest:
            return dataset
    raise UsageError(
        f"{folder}: was trained on data {digest[:19]}, which is not at "
        f"{places[0] if name else paths.home / 'data'}; prepare that data there, or name it: --data"
    )


def _final(final: FinalSpec, overrides: tuple[str, ...]) -> FinalSpec:
    values = [parse_assignment(text) for text in overrides]
    for path, _ in values:
        if not path.startswith("final."):
            raise UsageError(f"-S {path}: a bank is trained already; set values of final.…")
    data = with_values({"final": dump(final)}, values)
    return parse(FinalSpec, data["final"], "-S final")


class _Tokens(TokenStream):
    """A stream over ids in memory."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._shards, self._ends = [tokens], [len(tokens)]  # type: ignore[list-item]


def training_text(bank: Bank, wanted: Wanted, *, held_out: bool) -> TokenStream | None:
    """Text that choices may be made on: a file, or a split of the bank's data that is not val.

    None where neither is there.
    """
    if wanted.train_tokens is not None:
        tokens = read_tokens(wanted.train_tokens)
        largest = int(tokens.max())
        if largest >= bank.model.vocab_size:
            raise DataError(
                f"{wanted.train_tokens}: token id {largest}, but the model's vocab_size is "
                f"{bank.model.vocab_size}; give tokens of its own tokenizer"
            )
        return _Tokens(tokens)
    if bank.dataset is None:
        return None
    return probe_stream(bank.dataset) if held_out else bank.dataset.stream("train")


def hessians_for(paths: Paths, bank: Bank, wanted: Wanted) -> dict[str, Tensor] | None:
    """Collect the Hessians that the bank's final asks for, or find those of a training of the
    store; None where it asks for none."""
    gptq, ranks = bank.final.quantize.gptq, current()
    if gptq is None:
        return None
    if bank.shares_stages and bank.dataset is not None and wanted.train_tokens is None:
        return _stored_hessians(Store(paths.store), bank, bank.dataset, ranks)
    model = bank.built()
    load_state(model, bank.exported())
    if gptq.calibration == "generated":
        return collect_hessians(model, generated_batches(model, gptq, ranks), ranks)
    stream = training_text(bank, wanted, held_out=False)
    if stream is None:
        raise UsageError(
            "final.quantize.gptq: needs training text; give --train-tokens, or set "
            "final.quantize.gptq.calibration=generated"
        )
    return collect_hessians(model, training_batches(stream, gptq, ranks), ranks)


def _stored_hessians(
    store: Store, bank: Bank, dataset: Dataset, ranks: Ranks
) -> dict[str, Tensor] | None:
    """Collect Hessians as the finals of a sweep do, and for them too."""
    training = bank.file.parent.parent
    task = hessians_task(ArtifactTask(entry=bank.entry, final=bank.final))
    if task is None:
        return None
    is_cpu = ranks.device.type == "cpu"
    device = {"device": ranks.device.type} | ({"threads": get_num_threads()} if is_cpu else {})
    key = hessians_id(task, training.name, inputs_of(dataset), device)

    def build(folder: Path) -> None:
        write_facts(folder, worker_facts(ranks.device))
        collect(task, training, dataset, folder, ranks)

    store.compute("hessians", key, build)
    return load_hessians(store.folder("hessians", key), ranks.device)

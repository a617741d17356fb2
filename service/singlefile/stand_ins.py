"""What a lone file has in place of parts of the trainer, and why that is the same here."""

# Only read as text, and cut into one file with the rest; `program.REPLACED` says what each one
# replaces.

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from service.singlefile.recipe import FINAL, TRAIN
from trainer.codec import dump
from trainer.data.manifest import MANIFEST_FILE, Manifest, Shard, Split, Tokenizer
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.finalize import coder
from trainer.finalize.artifact import _File, _open
from trainer.finalize.gptq import walk_block
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import read_json
from trainer.specs.model import ModelSpec
from trainer.specs.task import TrainTask
from trainer.train.departures import IsBeyond
from trainer.train.state import TrainState

CODE_FILE = "train_gpt.py"


def read_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest; DataError names the file and the fault."""
    path = folder / MANIFEST_FILE
    data = read_json(path)
    try:
        splits = {
            name: Split(**(split | {"shards": tuple(Shard(**shard) for shard in split["shards"])}))
            for name, split in data["splits"].items()
        }
        return Manifest(**(data | {"tokenizer": Tokenizer(**data["tokenizer"]), "splits": splits}))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a dataset's manifest ({error}); prepare it again") from error


def parse_own_model(claims: Any, num_tensors: int, where: str) -> ModelSpec:
    """Return the model of this file, if it is what a weights file says that it holds."""
    model = TRAIN.model.exported()
    if claims != dump(model):
        raise DataError(f"{where}: holds another model than this file's; score it with its own")
    return model


def open_own(path: Path) -> _File:
    """Open a weights file of the one kind that this file writes."""
    file = _open(path)
    if file.kind != FINAL.final.compress.kind:
        raise DataError(f"{path}: written by {file.kind}; score it with the file that wrote it")
    return file


def range_coder() -> Any:
    """Our own coder, whose library no file of another kind needs."""
    return SimpleNamespace(
        Shape=coder.Shape, Integers=coder.Integers, encode=coder.encode, decode=coder.decode
    )


def walk_plainly(device: torch.device) -> Callable[..., None]:
    """The walk that needs no Triton: some seconds slower on a GPU, and of the same result."""
    return walk_block


def write_code(folder: Path, form: str) -> Path:
    """Put this file beside the weights: it is the code that is counted."""
    path = folder / CODE_FILE
    shutil.copyfile(sys.argv[0], path)
    return path


def no_kin(task: TrainTask, dataset: Dataset, ranks: Ranks) -> str:
    """Who could share this training's trunk: nobody, it starts at step 0."""
    return ""


def nothing_to_take_up(
    state: TrainState, kin: str, folder: Path, starts: Sequence[Path], is_beyond: IsBeyond | None
) -> bool:
    """Go on from nothing: the driver begins in a folder without a training."""
    return False


def require_fresh(folder: Path) -> None:
    """Refuse a folder that holds an earlier training, whose journal would be gone on with."""
    if (folder / "metrics.jsonl").exists():
        raise UsageError(f"--out: {folder} holds an earlier training; name another folder")


class Unsteered:
    """Nobody is asked whether the training goes on."""

    def __init__(self, steer: None, ranks: Ranks) -> None:
        pass

    def ask(self, step: int, val_bpb: float | None = None) -> None:
        """Go on."""

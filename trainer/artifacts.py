"""From a trained bank on disk to an artifact on disk, by way of its Hessians.

Each reads a frozen task and the folder of a training, and leaves a folder whose result.json,
written last, means done. Scoring what lies there is `trainer.run`'s.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.codec import dump, parse
from trainer.data.shards import Dataset
from trainer.finalize.calibration import calibration_batches
from trainer.finalize.hessians import FILE as HESSIANS_FILE
from trainer.finalize.hessians import collect_hessians, load_hessians, save_hessians
from trainer.finalize.pipeline import FinalReport
from trainer.finalize.pipeline import finalize as write_artifact
from trainer.model.build import build, load_state
from trainer.results import ArtifactResult, HessiansResult, TrainResult
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import read_json, sha256_file, write_json
from trainer.runtime.tensors import load_tensors
from trainer.sizes import forecast_weights_bytes, num_params
from trainer.specs.model import ModelSpec
from trainer.specs.task import ArtifactTask, HessiansTask, TrainTask


def load_training(folder: Path) -> tuple[TrainTask, TrainResult]:
    """Read what a finished training in `folder` was told and what it returned."""
    task = parse(TrainTask, read_json(folder / "task.json"), str(folder / "task.json"))
    result = parse(TrainResult, read_json(folder / "result.json"), str(folder / "result.json"))
    return task, result


def collect(
    task: HessiansTask, training: Path, dataset: Dataset, folder: Path, ranks: Ranks
) -> HessiansResult:
    """Run a bank entry over its calibration text and leave its Hessians in `folder`."""
    trained_as, _ = load_training(training)
    started = time.monotonic()
    model = build(trained_as.model.exported(), dtype=trained_as.train.dtype)
    names = {name for name, _ in model.named_parameters()}
    state = load_tensors(training / "bank", task.entry)
    load_state(model, {name: tensor for name, tensor in state.items() if name in names})
    model.to(ranks.device).eval()
    batches = calibration_batches(model, task.gptq, dataset, ranks)
    hessians = collect_hessians(model, batches, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    save_hessians(folder, hessians)
    result = HessiansResult(
        names=tuple(hessians),
        tokens=task.gptq.sequences * task.gptq.seq_len,
        clock_s=time.monotonic() - started,
    )
    write_json(folder / "result.json", dump(result))
    return result


def make_artifact(
    task: ArtifactTask,
    training: Path,
    dataset: Dataset,
    folder: Path,
    hessians: Path | None,
    ranks: Ranks,
) -> ArtifactResult:
    """Turn one bank entry into an artifact under `folder`, with the Hessians that it asks for.

    Leaves artifact/, tensors.json and, last, result.json.
    """
    started = time.monotonic()
    of = open_entry(task, training, dataset, hessians, ranks)
    place = make_room(folder)
    report = write_artifact(of.state, of.model, task.final, place, of.tokenizer_sha256, of.hessians)
    return leave_artifact(task, of, report, folder, time.monotonic() - started)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An entry of a bank and what finalizing it takes."""

    state: dict[str, Tensor]
    model: ModelSpec
    tokenizer_sha256: str
    hessians: dict[str, Tensor] | None
    calibration_clock_s: float | None


def open_entry(
    task: ArtifactTask, training: Path, dataset: Dataset, hessians: Path | None, ranks: Ranks
) -> Entry:
    """Read the entry that a task names onto the device, and the Hessians of the folder that is
    given. Finals that follow one another in a process share what they read: nobody changes it."""
    trained_as, _ = load_training(training)
    bank, device = training / "bank", ranks.device
    return Entry(
        state=_state.read(
            bank / f"{task.entry}.pt", device, lambda: _on(device, load_tensors(bank, task.entry))
        ),
        model=trained_as.model,
        tokenizer_sha256=sha256_file(dataset.tokenizer_path),
        hessians=hessians
        and _hessians.read(
            hessians / f"{HESSIANS_FILE}.pt", device, lambda: load_hessians(hessians, device)
        ),
        calibration_clock_s=hessians and read_json(hessians / "result.json")["clock_s"],
    )


class _Latest:
    """The tensors that were read last; they go before others are read, and stay until then."""

    def __init__(self) -> None:
        self._key: object = None
        self._tensors: dict[str, Tensor] = {}

    def read(
        self, path: Path, device: torch.device, read: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what `read` makes of a file; one that was written over is read anew."""
        status = path.stat() if path.is_file() else None
        key = path, device, status and (status.st_mtime_ns, status.st_size)
        if key != self._key:
            self._key, self._tensors = None, {}
            self._tensors = read()
            self._key = key
        return self._tensors


_state = _Latest()
_hessians = _Latest()


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def make_room(folder: Path) -> Path:
    """Return where an artifact goes; what is left there would be counted."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "artifact", ignore_errors=True)
    return folder / "artifact"


def leave_artifact(
    task: ArtifactTask, of: Entry, report: FinalReport, folder: Path, clock_s: float
) -> ArtifactResult:
    """Write down what was written: tensors.json and, last, result.json."""
    gptq = task.final.quantize.gptq
    result = ArtifactResult(
        entry=task.entry,
        num_params=num_params(of.model.exported()),
        artifact_bytes=report.artifact_bytes,
        weights_bytes=report.weights_bytes,
        code_bytes=report.code_bytes,
        forecast_bytes=forecast_weights_bytes(of.model, task.final) + report.code_bytes,
        weights_sha256=report.weights_sha256,
        finalize_clock_s=clock_s,
        calibration=gptq and gptq.calibration,
        calibration_clock_s=of.calibration_clock_s,
    )
    write_json(folder / "tensors.json", [dump(tensor) for tensor in report.tensors])
    write_json(folder / "result.json", dump(result))
    return result

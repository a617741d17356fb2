"""Everything that a training needs to go on exactly where it stopped."""

import copy
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from trainer.kernels.chosen import kernels_of
from trainer.model.build import build
from trainer.model.fake_quant import FakeQuants
from trainer.optim.averages import AverageBank
from trainer.optim.groups import Optimizers
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import save_tensors
from trainer.specs.task import TrainTask

logger = logging.getLogger(__name__)
NUM_CHECKPOINTS_KEPT = 2  # the older one covers for a newer that is found damaged
PHASES = ("setup", "warmup", "train", "validate", "checkpoint", "bank")


class TrainState:
    """Weights, optimizer state, averages, QAT switch, step and clock. The loader needs only the
    step.

    What has not begun to act leaves no trace in what is saved, but for zeros that an optimizer
    begins with: a training that has it yet to come and one that has it not go on the same.
    """

    def __init__(self, task: TrainTask, ranks: Ranks, clock: Clock) -> None:
        self.spec = spec = task.train
        kernels = kernels_of(
            spec.attention,
            ranks.device,
            spec.dtype,
            "train.attention",
            fused=spec.fused,
            documents=spec.documents,
        )
        model = build(task.model, seed=spec.seed, dtype=spec.dtype, kernels=kernels)
        self.model = model.to(ranks.device)
        self.fake_quants = None if spec.qat is None else FakeQuants(self.model, spec.qat)
        alone_on_cuda = ranks.device.type == "cuda" and ranks.world_size == 1
        captured = spec.compile and alone_on_cuda
        self.optimizers = Optimizers(self.model, spec.optimizer, captured=captured)
        self.averages = AverageBank(self.model, spec.averages)
        self.ranks = ranks
        self.clock = clock
        self.step = 0
        self.untrained_val_bpb = math.nan
        self.loss = math.nan
        """The gang's mean loss of the last step, in nats, as far as it was asked for."""
        self.lr_scale = 1.0
        """Of the last step."""

    def never_came(self) -> list[str]:
        """Say what was to act late in the training and has not."""
        missed = []
        if self.fake_quants is not None and self.fake_quants.start_step is None:
            missed.append("train.qat.start never came")
        if self.averages.spec.swa is not None and not self.averages.swa_count:
            missed.append("train.averages.swa took no snapshot")
        return missed

    def slowest_clock_s(self) -> dict[str, float]:
        """Return the slowest rank's seconds by phase; every rank asks at once."""
        seconds = self.clock.seconds
        return {phase: self.ranks.max(seconds.get(phase, 0.0)) for phase in PHASES}

    def snapshot(self) -> dict[str, Any]:
        """Return a deep copy of everything but the step and the clock."""
        return copy.deepcopy(self._tensors())

    def restore(self, tensors: dict[str, Any]) -> None:
        """Put a snapshot back. The tensors that there are stay the same objects."""
        self.model.load_state_dict(tensors["model"])
        self.optimizers.load_state_dict(tensors["optimizers"])
        self.averages.load_state_dict(tensors["averages"])
        if self.fake_quants is not None:
            self.fake_quants.load_state_dict(tensors["fake_quants"])

    def save(self, folder: Path, **more: Any) -> dict[str, float]:
        """Write everything, and `more` beside it, to `folder`; all ranks call, the first writes.

        Returns the clock that was written, the slowest rank's.
        """
        clock_s = self.slowest_clock_s()
        if self.ranks.is_first:
            progress = {
                "step": self.step,
                "clock_s": clock_s,
                "untrained_val_bpb": self.untrained_val_bpb,
                "loss": self.loss,
                "lr_scale": self.lr_scale,
            }
            save_tensors(folder, {"state": self._tensors(), "progress": progress, **more})
        return clock_s

    def load(self, progress: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Take up what was saved."""
        self.restore(tensors)
        self.step = progress["step"]
        self.untrained_val_bpb = progress["untrained_val_bpb"]
        self.loss = progress["loss"]
        self.lr_scale = progress["lr_scale"]
        self.clock.seconds.update(progress["clock_s"])

    def _tensors(self) -> dict[str, Any]:
        quants = self.fake_quants
        return {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "averages": self.averages.state_dict(),
            "fake_quants": {"start_step": None} if quants is None else quants.state_dict(),
        }


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a training's folder, oldest first, each named by its step."""
    return sorted(path.parent for path in folder.glob("checkpoint/*/index.json"))


def save_checkpoint(state: TrainState, folder: Path) -> None:
    """Write a checkpoint and drop all but the newest; every rank at once."""
    state.save(folder / "checkpoint" / f"{state.step:08d}")
    if state.ranks.is_first:
        for old in checkpoints(folder)[:-NUM_CHECKPOINTS_KEPT]:
            shutil.rmtree(old)
    state.ranks.barrier()  # or the others would wait on their train clocks


def discard_checkpoints(folder: Path) -> None:
    """Remove a finished run's checkpoints: what it leaves is kept."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)

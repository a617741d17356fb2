"""Everything that a training needs to go on exactly where it stopped."""

import copy
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.model.build import build
from trainer.model.fake_quant import FakeQuants
from trainer.optim.averages import AverageBank
from trainer.optim.groups import Optimizers
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors, save_tensors
from trainer.specs.task import TrainTask

logger = logging.getLogger(__name__)
NUM_CHECKPOINTS_KEPT = 2  # the older one covers for a newer that is found damaged


class TrainState:
    """Weights, optimizer state, averages, QAT switch, step and clock. The loader needs only the
    step.
    """

    def __init__(self, task: TrainTask, ranks: Ranks, clock: Clock) -> None:
        spec = task.train
        self.model = build(task.model, seed=spec.seed, dtype=spec.dtype).to(ranks.device)
        self.fake_quants = None if spec.qat is None else FakeQuants(self.model, spec.qat)
        self.optimizers = Optimizers(self.model, spec.optimizer)
        self.averages = AverageBank(self.model, spec.averages)
        self.clock = clock
        self.step = 0
        self.untrained_val_bpb = math.nan

    def never_came(self) -> list[str]:
        """Say what was to act late in the training and has not."""
        missed = []
        if self.fake_quants is not None and self.fake_quants.start_step is None:
            missed.append("train.qat.start never came")
        if self.averages.spec.swa is not None and not self.averages.swa_count:
            missed.append("train.averages.swa took no snapshot")
        return missed

    def snapshot(self) -> dict[str, Any]:
        """Return a deep copy of everything but the step and the clock."""
        return copy.deepcopy(self._tensors())

    def restore(self, tensors: dict[str, Any]) -> None:
        """Put a snapshot back. The model's and the averages' tensors stay the same objects."""
        self.model.load_state_dict(tensors["model"])
        self.optimizers.load_state_dict(tensors["optimizers"])
        self.averages.load_state_dict(tensors["averages"])
        if self.fake_quants is not None:
            self.fake_quants.load_state_dict(tensors["fake_quants"])

    def save(self, folder: Path) -> None:
        """Write `folder/<step>` and drop all but the newest checkpoints."""
        progress = {
            "step": self.step,
            "clock_s": dict(self.clock.seconds),
            "untrained_val_bpb": self.untrained_val_bpb,
        }
        save_tensors(folder / f"{self.step:08d}", {"state": self._tensors(), "progress": progress})
        for old in _checkpoints(folder)[:-NUM_CHECKPOINTS_KEPT]:
            shutil.rmtree(old)

    def resume(self, folder: Path) -> bool:
        """Take up the newest intact checkpoint under `folder`; return whether there was one."""
        for path in reversed(_checkpoints(folder)):
            try:
                progress, tensors = load_tensors(path, "progress"), load_tensors(path, "state")
            except DataError as error:
                logger.warning("%s; falling back to an older checkpoint", error)
                continue
            self.restore(tensors)
            self.step = progress["step"]
            self.untrained_val_bpb = progress["untrained_val_bpb"]
            self.clock.seconds.update(progress["clock_s"])
            return True
        return False

    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "averages": self.averages.state_dict(),
        }
        if self.fake_quants is not None:
            tensors["fake_quants"] = self.fake_quants.state_dict()
        return tensors


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("*/index.json"))

"""The training loop, and what it leaves behind.

`Loop` takes a run up where it stands, warms up off the clock and steps through it; `train` goes
to the end, scores and writes the bank. In `folder`: metrics.jsonl while it runs, checkpoint/ for
a restart, bank/ at the end. The caller writes result.json, which is what makes the training
count as done.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from trainer.codec import fingerprint
from trainer.data.shards import Dataset
from trainer.errors import Stopped, TrainingError
from trainer.model.build import load_state
from trainer.optim.schedule import lr_scale, progress
from trainer.results import TrainResult
from trainer.rows import typical_deviations
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import save_tensors
from trainer.sizes import forecast_interval
from trainer.specs.task import TrainTask
from trainer.specs.train import ema_entry
from trainer.train.departures import IsBeyond, kin_of, take_up
from trainer.train.journal import Journal
from trainer.train.late_qat import LateQat
from trainer.train.memo import Memo
from trainer.train.memory import memory_watched
from trainer.train.runner import StepRunner
from trainer.train.state import TrainState, save_checkpoint
from trainer.train.steering import Steer, Steering
from trainer.train.validator import Validator

logger = logging.getLogger(__name__)

# How far a fresh process may land from the trainer's own score (design 9).
PARITY_TOLERANCE_CPU = 1e-6
PARITY_TOLERANCE_DEVICE = 1e-3


def train(
    task: TrainTask,
    dataset: Dataset,
    folder: Path,
    ranks: Ranks,
    *,
    start: Path | None = None,
    steer: Steer | None = None,
    memo: Memo | None = None,
) -> TrainResult:
    """Train on `dataset` and leave a bank in `folder`; go on from the checkpoint there, or from
    `start`, a trunk's state.

    Called on every rank of the gang with the same arguments; rank 0 writes and asks `steer`.
    TrainingError when the loss stops being finite, OutOfMemory when it does not fit, Stopped
    when `steer` has a reason.
    """
    with memory_watched(task.train, ranks):
        loop = Loop(task, dataset, folder, ranks, Steering(steer, ranks), memo or Memo())
        with closing(loop):
            loop.begin([] if start is None else [start])
            with loop.clock.phase("train"):
                loop.run_to_the_end()
            return loop.finish()


class Loop:
    """One run over the steps of a task, with everything it works on."""

    def __init__(
        self,
        task: TrainTask,
        dataset: Dataset,
        folder: Path,
        ranks: Ranks,
        steering: Steering,
        memo: Memo,
    ) -> None:
        self.task = task
        self.dataset = dataset
        self.folder = folder
        self.ranks = ranks
        self.steering = steering
        self.memo = memo
        on_cpu = ranks.device.type == "cpu"
        self.clock = Clock(settle=(lambda: None) if on_cpu else torch.cuda.synchronize)
        self.kin = kin_of(task, dataset, ranks)
        self.state = TrainState(task, ranks, self.clock)
        self.validator = Validator(task, dataset, ranks, memo)
        self._begun = ExitStack()
        self.loss: torch.Tensor | None = None
        """This rank's loss of the last step, until the gang's is asked for."""

    def begin(self, starts: Sequence[Path], is_beyond: IsBeyond | None = None) -> None:
        """Take up what is there and not `is_beyond`, and get ready for the first step."""
        state, ranks = self.state, self.ranks
        resumed = ranks.together(lambda: take_up(state, self.kin, self.folder, starts, is_beyond))
        if ranks.max(state.step) != -ranks.max(-state.step):
            raise TrainingError(f"{self.folder}: the workers read different checkpoints; run again")
        self.first_step = state.step
        self.journal = ranks.together(lambda: self._journal(starts))
        self.runner = self._begun.enter_context(
            closing(StepRunner(self.task, self.dataset, state, ranks))
        )
        self.late_qat = LateQat(self.task.train.qat, state, self.runner, self.journal)
        with self.clock.phase("validate"):
            if not resumed:
                state.untrained_val_bpb = self.validator.score_untrained(state.model)
                self.journal.write(0, {"val/bpb": state.untrained_val_bpb})
        with self.clock.phase("warmup"):
            if self._is_cold():
                self.runner.warm_up()
            ranks.barrier()

    def close(self) -> None:
        """End what runs beside the steps, after any end of the run."""
        self._begun.close()

    def _is_cold(self) -> bool:
        """Whether a step would do more than its work: always, unless this process has run such
        steps, eagerly and on a CPU."""
        spec, warmed = self.task.train, self.memo.warmed
        shape = [self.runner.rows_per_micro, spec.seq_len, spec.dtype]
        key = fingerprint([self.task.model, spec.qat, *shape])
        is_cold = spec.compile or self.ranks.device.type != "cpu" or warmed.get(key) is None
        warmed.keep(key, True)
        return bool(self.ranks.max(float(is_cold)))

    def _journal(self, starts: Sequence[Path]) -> Journal:
        journal = Journal(self.folder / "metrics.jsonl", writes=self.ranks.is_first)
        for path in starts:
            journal.take_over(path / "metrics.jsonl")
        return journal

    def run_to_the_end(self) -> None:
        """Step until the iterations or the clock are used up."""
        is_over = self.is_over()
        if is_over:  # taken up there: what its last step has left to tell
            self.observe(is_over=True, goes_on=False)
        while not is_over:
            self.step()
            is_over = self.is_over()
            self.observe(is_over=is_over, goes_on=not is_over)

    def is_over(self) -> bool:
        """Whether no step is left, for all ranks alike."""
        return self.state.step >= self.task.train.iterations or self.runner.is_out_of_time

    def step(self) -> None:
        """Run one step and fold its weights into the averages."""
        spec, state, runner = self.task.train, self.state, self.runner
        scale = lr_scale(spec, state.step, runner.elapsed_s)
        share_done = progress(spec, state.step, runner.elapsed_s)
        self.late_qat.turn_on_if_due(scale, share_done)
        self.loss = runner.step(state.step, scale)
        state.step, state.lr_scale = state.step + 1, scale
        state.averages.update(state.step, scale, share_done)
        runner.read_clock()

    def observe(self, *, is_over: bool, goes_on: bool) -> None:
        """Log and score what is due after a step, everything where the task `is_over`; if it
        `goes_on`, ask and save too.

        Stopped, after a checkpoint, where there is a reason not to go on.
        """
        step, observe, clock = self.state.step, self.task.observe, self.clock
        reason, scores = None, is_over or _is_due(step, observe.validate_every)
        if is_over or _is_due(step, observe.log_every):
            self.journal.write(step, self.runner.metrics(self.settle_loss(), self.state.lr_scale))
            with clock.phase("validate"):
                reason = self.steering.ask(step) if goes_on and not scores else None
        if scores:
            with clock.phase("validate"):
                val_bpb = _finite("val/bpb", self.validator.score(self.state.model), step)
                sizes = _sizes(self.task, self.state.model)
                self.journal.write(step, {"val/bpb": val_bpb, **sizes})
                reason = self.steering.ask(step, val_bpb) if goes_on else None
        if reason is not None or (goes_on and _is_due(step, observe.checkpoint_every)):
            with clock.phase("checkpoint"):
                self.settle_loss()
                save_checkpoint(self.state, self.folder)
        if reason is not None:
            raise Stopped(reason)

    def settle_loss(self) -> float:
        """Return the gang's loss of the last step; TrainingError unless it is a number."""
        if self.loss is not None:
            loss = self.runner.gang_mean(self.loss)
            self.state.loss, self.loss = _finite("loss", loss, self.state.step), None
        return self.state.loss

    def finish(self) -> TrainResult:
        """Write the bank and score what a fresh process will be held against."""
        task, state, ranks = self.task, self.state, self.ranks
        for missed in state.never_came():
            logger.warning("%s in %d steps: the training is as without it", missed, state.step)
        with self.clock.phase("bank"):
            entries = state.averages.entries()
            if ranks.is_first:
                files = {name: _on_cpu(entry) for name, entry in entries.items()}
                save_tensors(self.folder / "bank", files)
        decays = task.train.averages.decays()
        parity_entry = ema_entry(decays[0]) if decays else "raw"
        with self.clock.phase("validate"):
            load_state(state.model, entries[parity_entry])
            parity_bpb = self.validator.score(state.model)
        self.clock.stop()
        clock_s = state.slowest_clock_s()
        on_cpu = ranks.device.type == "cpu"
        return TrainResult(
            steps=state.step,
            steps_computed=state.step - self.first_step,
            num_params=sum(parameter.numel() for parameter in state.model.parameters()),
            tokens=state.step * task.train.batch_tokens,
            world_size=ranks.world_size,
            train_clock_s=clock_s["train"],
            clock_s=clock_s,
            final_train_loss=state.loss,
            untrained_val_bpb=state.untrained_val_bpb,
            entries=tuple(entries),
            parity_entry=parity_entry,
            parity_bpb=parity_bpb,
            parity_tolerance=PARITY_TOLERANCE_CPU if on_cpu else PARITY_TOLERANCE_DEVICE,
            qat_start_step=None if state.fake_quants is None else state.fake_quants.start_step,
        )


def _finite(name: str, value: float, step: int) -> float:
    if not math.isfinite(value):
        raise TrainingError(
            f"training diverged: {name} {value} at step {step}; lower the learning rates or set "
            "train.optimizer.grad_clip"
        )
    return value


def _sizes(task: TrainTask, model: torch.nn.Module) -> dict[str, float]:
    """Forecast the weights file that the weights as they stand would make, with its interval."""
    if task.observe.forecast is None:
        return {}
    stds = typical_deviations({name: p.detach() for name, p in model.named_parameters()})
    size = forecast_interval(task.model, task.observe.forecast, stds)
    return {
        "size/forecast_bytes": size.point,
        "size/forecast_low_bytes": size.low,
        "size/forecast_high_bytes": size.high,
    }


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _on_cpu(entry: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in entry.items()}

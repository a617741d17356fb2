"""The training loop, and what it leaves behind.

`train` reads top-down: build or resume, warm up off the clock, step until done, score itself,
write the bank. In `folder`: metrics.jsonl while it runs, checkpoint/ for a restart, bank/ at
the end. The caller writes result.json, which is what makes the training count as done.
"""

import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from trainer.data.bytecount import ByteTable
from trainer.data.loader import Loader
from trainer.data.shards import Dataset
from trainer.errors import TrainingError, UsageError
from trainer.evaluate.bpb import bits_per_byte
from trainer.evaluate.sliding import score_stream
from trainer.model.build import load_state
from trainer.optim.schedule import lr_scale
from trainer.results import TrainResult
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import save_tensors
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.task import TrainTask
from trainer.specs.train import ema_entry
from trainer.train.journal import Journal
from trainer.train.state import TrainState

# How far a fresh process may land from the trainer's own score (design 9).
PARITY_TOLERANCE_CPU = 1e-6
PARITY_TOLERANCE_DEVICE = 1e-3


def train(task: TrainTask, dataset: Dataset, folder: Path, ranks: Ranks) -> TrainResult:
    """Train on `dataset`, resuming from `folder` if it holds a checkpoint; leave a bank there.

    Called on every rank of the gang with the same arguments; rank 0 writes. TrainingError when
    the loss stops being finite.
    """
    spec, observe = task.train, task.observe
    on_cpu = ranks.device.type == "cpu"
    clock = Clock(settle=(lambda: None) if on_cpu else torch.cuda.synchronize)
    state = TrainState(task, ranks, clock)
    resumed = ranks.together(lambda: state.resume(folder / "checkpoint"))
    if ranks.max(state.step) != -ranks.max(-state.step):
        raise TrainingError(f"{folder}: the workers read different checkpoints; run again")
    first_step = state.step
    journal = ranks.together(lambda: Journal(folder / "metrics.jsonl", writes=ranks.is_first))
    judge = Validator(task, dataset, ranks)
    runner = StepRunner(task, dataset, state, ranks)
    with clock.phase("validate"):
        if not resumed:
            state.untrained_val_bpb = judge.score(state.model)
            journal.write(0, {"val/bpb": state.untrained_val_bpb})
    with clock.phase("warmup"):
        runner.warm_up()
        ranks.barrier()

    loss, done = math.nan, state.step >= spec.iterations
    with clock.phase("train"):
        while not done:
            scale = lr_scale(spec, state.step, runner.elapsed_s)
            loss_tensor = runner.step(state.step, scale)
            state.step += 1
            state.averages.update(state.step, scale)
            done = state.step >= spec.iterations or runner.is_out_of_time()
            if done or state.step % observe.log_every == 0:
                loss = _finite("loss", runner.gang_mean(loss_tensor), state.step)
                journal.write(state.step, runner.metrics(loss, scale))
            if done or _is_due(state.step, observe.validate_every):
                with clock.phase("validate"):
                    val_bpb = _finite("val/bpb", judge.score(state.model), state.step)
                    journal.write(state.step, {"val/bpb": val_bpb})
            if not done and _is_due(state.step, observe.checkpoint_every):
                with clock.phase("checkpoint"):
                    _checkpoint(state, folder, ranks)

    with clock.phase("bank"):
        entries = state.averages.entries()
        if ranks.is_first:
            save_tensors(folder / "bank", {name: _on_cpu(entry) for name, entry in entries.items()})
    decays = spec.averages.decays()
    parity_entry = ema_entry(decays[0]) if decays else "raw"
    with clock.phase("validate"):
        load_state(state.model, entries[parity_entry])
        parity_bpb = judge.score(state.model)
    seconds = clock.stop()
    return TrainResult(
        steps=state.step,
        steps_computed=state.step - first_step,
        num_params=sum(parameter.numel() for parameter in state.model.parameters()),
        tokens=state.step * spec.batch_tokens,
        world_size=ranks.world_size,
        train_clock_s=ranks.max(seconds.get("train", 0.0)),
        clock_s={phase: ranks.max(seconds.get(phase, 0.0)) for phase in PHASES},
        final_train_loss=loss,
        untrained_val_bpb=state.untrained_val_bpb,
        entries=tuple(entries),
        parity_entry=parity_entry,
        parity_bpb=parity_bpb,
        parity_tolerance=PARITY_TOLERANCE_CPU if on_cpu else PARITY_TOLERANCE_DEVICE,
    )


PHASES = ("setup", "warmup", "train", "validate", "checkpoint", "bank")


def _finite(name: str, value: float, step: int) -> float:
    if not math.isfinite(value):
        raise TrainingError(
            f"training diverged: {name} {value} at step {step}; lower the learning rates or set "
            "train.optimizer.grad_clip"
        )
    return value


def _checkpoint(state: TrainState, folder: Path, ranks: Ranks) -> None:
    if ranks.is_first:
        state.save(folder / "checkpoint")
    ranks.barrier()  # or the others would wait on their train clocks


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _on_cpu(entry: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in entry.items()}


def discard_checkpoints(folder: Path) -> None:
    """Remove a finished training's checkpoints: its bank is what is kept."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


class StepRunner:
    """One optimizer step over the global batch: micro-batches, one reduction, one update."""

    def __init__(self, task: TrainTask, dataset: Dataset, state: TrainState, ranks: Ranks) -> None:
        self.spec = task.train
        self.state = state
        self.ranks = ranks
        # The slowest rank's clock, agreed on after each step: a wall-clock schedule must give
        # every rank the same learning rate.
        self.elapsed_s = ranks.max(state.clock.elapsed_s("train"))
        self.loader = Loader(
            dataset.stream("train"),
            seq_len=self.spec.seq_len,
            batch_tokens=self.spec.batch_tokens,
            order=self.spec.order,
            seed=self.spec.seed,
        )
        # Reading a share also refuses workers that do not divide the batch.
        local = len(self.loader.rows(state.step, ranks.rank, ranks.world_size))
        micro = (self.spec.micro_batch_tokens or local * self.spec.seq_len) // self.spec.seq_len
        if local % micro:
            raise UsageError(
                f"train.micro_batch_tokens={micro * self.spec.seq_len} does not divide a worker's "
                f"share of the batch, {local * self.spec.seq_len} tokens on {ranks.world_size}"
            )
        self.rows_per_micro = micro
        model = torch.compile(state.model, fullgraph=True) if self.spec.compile else state.model
        self.forward = (
            DistributedDataParallel(model, broadcast_buffers=False)
            if ranks.world_size > 1
            else model
        )

    def step(self, step: int, scale: float) -> torch.Tensor:
        """Run step `step`; return this rank's mean loss in nats as a 0-dim tensor."""
        rows = torch.from_numpy(self.loader.rows(step, self.ranks.rank, self.ranks.world_size))
        micros = rows.to(self.ranks.device).split(self.rows_per_micro)
        total = torch.zeros((), device=self.ranks.device)
        for i, micro in enumerate(micros):
            is_last = i == len(micros) - 1
            with nullcontext() if is_last or self.ranks.world_size == 1 else self.forward.no_sync():  # type: ignore[operator]
                loss = self.forward(micro[:, :-1], micro[:, 1:]).mean() / len(micros)
                loss.backward()
            total += loss.detach()
        self.state.optimizers.step(step, scale)
        return total

    def warm_up(self) -> None:
        """Run real steps and roll them back, so that nothing is built on the clock."""
        if not self.spec.warmup_steps:
            return
        before = self.state.snapshot()
        for step in range(self.spec.warmup_steps):
            self.step(step, 1.0)
            self.state.averages.update(step + 1, 1.0)
        self.state.restore(before)

    def is_out_of_time(self) -> bool:
        """Whether any rank's clock has reached the cap: all ranks stop after the same step."""
        cap_s = self.spec.max_clock_s
        if cap_s is None:
            return False
        self.elapsed_s = self.ranks.max(self.state.clock.elapsed_s("train"))
        return self.elapsed_s >= cap_s

    def gang_mean(self, loss: torch.Tensor) -> float:
        """Average a rank's loss over the gang."""
        return float(self.ranks.sum(loss.clone())) / self.ranks.world_size

    def metrics(self, loss: float, scale: float) -> dict[str, float]:
        """What one line of the journal says of a step."""
        clock_s = self.state.clock.elapsed_s("train")
        tokens = self.state.step * self.spec.batch_tokens
        return {
            "train/loss": loss,
            "train/lr_scale": scale,
            "train/clock_s": round(clock_s, 3),
            "train/tokens_per_s": round(tokens / max(clock_s, 1e-9), 1),
        }


class Validator:
    """The trainer's own score: blocks without overlap over the validation split."""

    def __init__(self, task: TrainTask, dataset: Dataset, ranks: Ranks) -> None:
        self.spec = EvaluateSpec(window=task.parity_window, stride=task.parity_window)
        stream = dataset.stream("val")
        self.tokens = stream.read(0, len(stream))
        self.table = ByteTable.load(dataset.tokenizer_path, task.model.vocab_size)
        self.ranks = ranks

    def score(self, model: torch.nn.Module) -> float:
        """Return val bpb of the model as it stands."""
        return bits_per_byte(
            score_stream(model, self.tokens, self.table, self.spec, self.ranks)  # type: ignore[arg-type]
        )

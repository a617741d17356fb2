"""One step of a training: its batch, its gradients, its update, and what it costs."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from trainer.data.loader import Loader
from trainer.data.shards import Dataset
from trainer.errors import UsageError
from trainer.runtime.distributed import Ranks
from trainer.specs.task import TrainTask
from trainer.train.prefetch import Prefetcher
from trainer.train.recompiles import MOST_GRAPHS, graphs_built, refuse_graphs_built_since
from trainer.train.state import TrainState


class StepRunner:
    """One optimizer step over the global batch: micro-batches, one reduction, one update."""

    def __init__(self, task: TrainTask, dataset: Dataset, state: TrainState, ranks: Ranks) -> None:
        self.spec = task.train
        self.state = state
        self.ranks = ranks
        # The slowest rank's clock, agreed on after each step: a wall-clock schedule must give
        # every rank the same learning rate.
        self.elapsed_s = ranks.max(state.clock.elapsed_s("train"))
        self.paced_from = state.step, state.clock.elapsed_s("train")
        self.loader = Loader(
            dataset.stream("train"),
            seq_len=self.spec.seq_len,
            batch_tokens=self.spec.batch_tokens,
            order=self.spec.order,
            seed=self.spec.seed,
        )
        # Reading a share also refuses workers that do not divide the batch.
        share = self.loader.rows(state.step, ranks.rank, ranks.world_size).shape
        local = share[0]
        micro = (self.spec.micro_batch_tokens or local * self.spec.seq_len) // self.spec.seq_len
        if local % micro:
            raise UsageError(
                f"train.micro_batch_tokens={micro * self.spec.seq_len} does not divide a worker's "
                f"share of the batch, {local * self.spec.seq_len} tokens on {ranks.world_size}"
            )
        self.rows_per_micro = micro
        # On a CPU a thread would only take turns with the steps.
        self.prefetcher = None
        if ranks.device.type != "cpu":
            read = partial(_read, self.loader, ranks)
            self.prefetcher = Prefetcher(read, share, ranks.device)
        self.is_warm = False
        """Whether all graphs that the steps need have been built."""
        model: torch.nn.Module = state.model
        if self.spec.compile:
            # Steps have one shape; for a second one, a score's, torch would build in between.
            model = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
        self.forward = (
            DistributedDataParallel(model, broadcast_buffers=False)
            if ranks.world_size > 1
            else model
        )

    def close(self) -> None:
        """End what runs beside the steps."""
        if self.prefetcher is not None:
            self.prefetcher.close()

    def step(self, step: int, scale: float) -> torch.Tensor:
        """Run step `step`; return this rank's mean loss in nats as a 0-dim tensor.

        TrainingError if it compiled anything after the warm-up, or after the first step of a
        training without one.
        """
        if not self.spec.compile:
            return self._step(step, scale)
        if not self.is_warm:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                total = self._step(step, scale)
            self.is_warm = not self.spec.warmup_steps
            return total
        built = graphs_built()
        total = self._step(step, scale)
        refuse_graphs_built_since(built, step, self.spec.warmup_steps)
        return total

    def _step(self, step: int, scale: float) -> torch.Tensor:
        micros = self._micros(step)
        total = torch.zeros((), device=self.ranks.device)
        for i, micro in enumerate(micros):
            is_last = i == len(micros) - 1
            with nullcontext() if is_last else self._unreduced():
                loss = self.forward(micro[:, :-1], micro[:, 1:]).mean() / len(micros)
                loss.backward()
            total += loss.detach()
        self.state.optimizers.step(step, scale)
        return total

    def probe(self, step: int) -> float:
        """Return the gang's mean loss on the first micro-batch of step `step`; nothing moves.

        Gradients are recorded, though none is taken: a compiled forward without them would be
        another graph than the one that trains.
        """
        micro = self._micros(step)[0]
        with self._unreduced():
            loss = self.forward(micro[:, :-1], micro[:, 1:]).mean()
        return self.gang_mean(loss.detach())

    def _micros(self, step: int) -> tuple[torch.Tensor, ...]:
        """This rank's share of step `step`, in micro-batches of rows [b, T + 1]."""
        if self.prefetcher is not None:
            return self.prefetcher.take(step).split(self.rows_per_micro)
        rows = self.loader.rows(step, self.ranks.rank, self.ranks.world_size)
        return torch.from_numpy(rows).split(self.rows_per_micro)

    def _unreduced(self) -> AbstractContextManager[None]:
        """Inside, a backward keeps its gradients to this rank."""
        return nullcontext() if self.ranks.world_size == 1 else self.forward.no_sync()  # type: ignore[operator]

    def warm_up(self) -> None:
        """Run real steps and roll them back, so that nothing is built on the clock."""
        if not self.spec.warmup_steps:
            return
        before = self.state.snapshot()
        for step in range(self.spec.warmup_steps):
            self.step(step, 1.0)
            self.state.averages.update(step + 1, 1.0, 0.0)
        self.state.restore(before)
        self.is_warm = True

    def read_clock(self) -> None:
        """Agree on the time after a step, if it decides anything."""
        if self.spec.max_clock_s is not None:
            self.elapsed_s = self.ranks.max(self.state.clock.elapsed_s("train"))

    @property
    def is_out_of_time(self) -> bool:
        """Whether the slowest clock has reached the cap: all ranks stop after the same step."""
        return self.spec.max_clock_s is not None and self.elapsed_s >= self.spec.max_clock_s

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
            **self.pace(),
        }

    def pace(self) -> dict[str, float]:
        """Mean seconds of a step since this was last asked; empty when none was run since."""
        (step, clock_s), now_s = self.paced_from, self.state.clock.elapsed_s("train")
        self.paced_from = self.state.step, now_s
        num_steps = self.state.step - step
        return {"train/step_s": round((now_s - clock_s) / num_steps, 6)} if num_steps else {}


def _read(loader: Loader, ranks: Ranks, step: int, out: np.ndarray) -> None:
    loader.rows(step, ranks.rank, ranks.world_size, out)

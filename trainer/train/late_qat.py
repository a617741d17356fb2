"""Fake quantization that begins late in a training, and the proof that it then acts.

Five public trainings claimed it and none had it: their switch was no part of the compiled graph
(techniques 2.21). So the switch is not believed but measured, through the forward that trains.
"""

from trainer.errors import TrainingError
from trainer.optim.schedule import has_begun
from trainer.specs.train import Qat
from trainer.train.journal import Journal
from trainer.train.runner import StepRunner
from trainer.train.state import TrainState


class LateQat:
    """Turns a training's fake quantizers on, once, when their start has come."""

    def __init__(
        self, spec: Qat | None, state: TrainState, runner: StepRunner, journal: Journal
    ) -> None:
        self.start = None if spec is None else spec.start
        self.state = state
        self.runner = runner
        self.journal = journal

    def turn_on_if_due(self, lr_scale: float, progress: float) -> None:
        """Turn on before the coming step if it is time, on every rank at once.

        TrainingError unless the same micro-batch then has another loss and every fake-quantized
        weight is on its grid.
        """
        quants, step = self.state.fake_quants, self.state.step
        if quants is None or self.start is None or quants.start_step is not None:
            return
        if not has_begun(self.start, lr_scale, progress):
            return
        pace = self.runner.pace()
        with self.state.clock.phase("validate"):
            share_before, loss_before = quants.share_on_grid(), self.runner.probe(step)
            quants.turn_on(step)
            share, loss = quants.share_on_grid(), self.runner.probe(step)
        # The next line of the journal says what a step takes from here on.
        self.journal.write(step, {"qat/on_grid": share_before, **pace})
        self.journal.write(step + 1, {"qat/on_grid": share})
        if share < 1.0 or loss == loss_before:
            raise TrainingError(
                f"train.qat came on before step {step} but does not act: the loss of one "
                f"micro-batch went from {loss_before!r} to {loss!r}, the share of weights on "
                f"the grid from {share_before:.4f} to {share:.4f}; this is a bug of the trainer"
            )

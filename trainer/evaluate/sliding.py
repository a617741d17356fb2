"""A stream scored with sliding windows, summed into totals."""

import numpy as np
import torch

from trainer.data.bytecount import ByteTable
from trainer.errors import DataError
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import batches, plan_windows
from trainer.model.gpt import GPT
from trainer.results import Totals
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec


def score_stream(
    model: GPT, tokens: np.ndarray, table: ByteTable, spec: EvaluateSpec, ranks: Ranks
) -> Totals:
    """Score a token stream [N+1] with sliding windows; every rank returns the gang's totals.

    DataError if there is nothing to predict.
    """
    if len(tokens) < 2:
        raise DataError(f"a stream of {len(tokens)} tokens has nothing to predict")
    tape = Tape(tokens, again=spec.variant == "A")
    slide(model, tape, spec, ranks)
    return tape.totals(table)


@torch.no_grad()
def slide(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Score a whole tape with sliding windows, each rank its share."""
    was_training = model.training
    model.eval()
    plan = plan_windows(len(tape), spec).part(ranks.rank, ranks.world_size)
    for batch in batches(plan, spec.batch_windows):
        tape.score(model, batch, ranks.device, spec.window)
    tape.gather(ranks)
    model.train(was_training)

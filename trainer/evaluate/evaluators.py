"""From a spec to the evaluator that it asks for."""

import numpy as np

from trainer.errors import TrainingError
from trainer.evaluate.sliding import evaluating, slide
from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt import lora, oracle, sgd
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.ttt import LoraTtt, OracleTtt, SgdTtt


def evaluate(model: GPT, tape: Tape, spec: EvaluateSpec, ranks: Ranks) -> None:
    """Score every prediction of a tape once, as `spec` says; every rank holds all scores then.

    The model is the caller's to give away: test-time training leaves it as its last step did. The
    tape's journal, if it has one, resumes it. TrainingError where a loss is no number.
    """
    ttt = spec.ttt
    with evaluating(model):
        if isinstance(ttt, LoraTtt):
            lora.adapt(model, tape, spec, ttt, ranks)
        elif isinstance(ttt, SgdTtt):
            sgd.adapt(model, tape, spec, ttt, ranks)
        else:
            if isinstance(ttt, OracleTtt):
                tape.journal = None  # its scores follow from steps that no journal holds
                oracle.adapt(model, tape, spec.window, ttt, ranks)
            slide(model, tape, spec, ranks)
    lost = np.flatnonzero(~np.isfinite(tape.losses))
    if len(lost):
        raise TrainingError(
            f"evaluate: the losses of {len(lost)} predictions, from {lost[0]} on, are no numbers; "
            + ("check the model's weights" if ttt is None else "lower evaluate.ttt.lr")
        )

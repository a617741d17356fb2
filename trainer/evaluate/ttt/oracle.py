"""The bound from above: the whole model trains on the text before it is scored. Never legal.

Source: parameter-golf PRs #672 and #951 (AdamW, techniques 2.30), #348's late commits (SGD, 2.31).
"""

from collections.abc import Iterator

import torch

from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt.steps import GangStep, Sequences, batches, cosine, cut, training
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.ttt import OracleTtt


def adapt(model: GPT, tape: Tape, window: int, ttt: OracleTtt, ranks: Ranks) -> None:
    """Train on a text that is still to be scored; the tape marks that for the audit.

    AdamW reads every rank's contiguous share in order, at a rate that falls as a cosine over all
    steps; SGD reads all sequences in another order each epoch, at one rate.
    """
    rows = cut(tape.illegal_tokens(), window)
    parameters = list(model.parameters())
    is_adamw = ttt.optimizer == "adamw"
    optimizer = (
        _adamw(model, ttt)
        if is_adamw
        else torch.optim.SGD(parameters, lr=ttt.lr, momentum=ttt.momentum)
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    step = GangStep(model, optimizer, window, ttt.clip_norm, ranks)
    steps = [
        batch
        for epoch in _epochs(rows, ttt)
        for batch in batches(epoch, ttt.batch_sequences, ranks)
    ]
    with training(model, parameters):
        for index, (mine, num_predictions) in enumerate(steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (cosine(index / len(steps)) if is_adamw else 1.0)
            step.take([mine], num_predictions)
            tape.note_update()


def _epochs(rows: Sequences, ttt: OracleTtt) -> Iterator[Sequences]:
    """Yield the sequences of each epoch in its order, the same on every rank."""
    generator = torch.Generator().manual_seed(ttt.seed)
    for _ in range(ttt.epochs):
        if ttt.optimizer == "sgd":
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield rows


def _adamw(model: GPT, ttt: OracleTtt) -> torch.optim.AdamW:
    """The MLPs' matrices at rates of their own: those that end them, and those before."""
    downs = [block.mlp.down.weight for block in model.blocks]  # type: ignore[union-attr]
    inside = [p for block in model.blocks for p in block.mlp.parameters()]  # type: ignore[union-attr]
    ups = [p for p in inside if not any(p is down for down in downs)]
    held = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in held]
    groups = [(downs, ttt.mlp_down_lr), (ups, ttt.mlp_up_lr), (rest, 1.0)]
    return torch.optim.AdamW(
        [{"params": members, "lr": ttt.lr * factor} for members, factor in groups],
        weight_decay=0.0,
    )

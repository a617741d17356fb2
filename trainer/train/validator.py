"""The trainer's own score: blocks without overlap over the validation split."""

import torch

from trainer.codec import fingerprint
from trainer.data.bytecount import ByteTable
from trainer.data.shards import Dataset
from trainer.evaluate.bpb import bits_per_byte
from trainer.evaluate.sliding import score_stream
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.task import TrainTask
from trainer.train.memo import Memo


class Validator:
    """Scores a model in training. The memo spares it what an earlier training has done."""

    def __init__(self, task: TrainTask, dataset: Dataset, ranks: Ranks, memo: Memo) -> None:
        self.task = task
        self.dataset = dataset
        self.ranks = ranks
        self.memo = memo
        self.spec = EvaluateSpec(window=task.parity_window, stride=task.parity_window)
        key = fingerprint([dataset.digest, task.model.vocab_size])
        text = memo.texts.get(key)
        if text is None:
            stream = dataset.stream("val")
            table = ByteTable.load(dataset.tokenizer_path, task.model.vocab_size)
            text = memo.texts.keep(key, (stream.read(0, len(stream)), table))
        self.tokens, self.table = text

    def score(self, model: GPT) -> float:
        """Return val bpb of the model as it stands."""
        return bits_per_byte(score_stream(model, self.tokens, self.table, self.spec, self.ranks))

    def score_untrained(self, model: GPT) -> float:
        """Return val bpb of the model as it was built; known if it was scored before."""
        key = fingerprint(
            {
                "model": self.task.model,
                "seed": self.task.train.seed,
                "dtype": self.task.train.dtype,
                "attention": self.task.train.attention,
                "window": self.task.parity_window,
                "data": self.dataset.digest,
                "world_size": self.ranks.world_size,
                "device": self.ranks.device.type,
                "threads": torch.get_num_threads(),  # how sums are split
            }
        )
        known = self.memo.untrained_bpb.get(key)
        # Scoring is the gang's: one rank that has to score needs all of them.
        if self.ranks.max(float(known is None)):
            known = self.memo.untrained_bpb.keep(key, self.score(model))
        assert known is not None  # or this rank would have scored
        return known

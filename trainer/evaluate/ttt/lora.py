"""Low-rank test-time training: each document of its own, one step after every scored chunk.

Source: the LoRA record and parameter-golf PRs #1530, #1855 (techniques 2.28, 4.3-18).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate.sliding import plan_of
from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt import phases
from trainer.evaluate.ttt.adapters import Adapters
from trainer.evaluate.ttt.steps import training
from trainer.evaluate.windows import Windows
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.ttt import LoraTtt


class RowAdamW:
    """AdamW on the first rows of stacks of tensors, every row as if it stood alone.

    Source: Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(self, tensors: list[Tensor], ttt: LoraTtt) -> None:
        self.ttt = ttt
        self.tensors = tensors
        self.means = [torch.zeros_like(tensor) for tensor in tensors]
        self.squares = [torch.zeros_like(tensor) for tensor in tensors]
        self.num_steps = 0

    def reset(self) -> None:
        """Forget every moment, and start counting again."""
        torch._foreach_zero_(self.means + self.squares)
        self.num_steps = 0

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rows: int) -> None:
        """Step on the first rows; the others stay as they are, without decay too."""
        ttt = self.ttt
        self.num_steps += 1
        stacks = (self.tensors, self.means, self.squares, gradients)
        values, means, squares, slopes = ([whole[:rows] for whole in stack] for stack in stacks)
        torch._foreach_mul_(values, 1.0 - ttt.lr * ttt.weight_decay)
        torch._foreach_lerp_(means, slopes, 1.0 - ttt.beta1)
        torch._foreach_mul_(squares, ttt.beta2)
        torch._foreach_addcmul_(squares, slopes, slopes, 1.0 - ttt.beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1.0 - ttt.beta2**self.num_steps) ** 0.5)
        torch._foreach_add_(scales, ttt.eps)
        rate = ttt.lr / (1.0 - ttt.beta1**self.num_steps)
        torch._foreach_addcdiv_(values, means, scales, -rate)


class Documents:
    """The documents of a tape in the order in which they are scored, and their chunks."""

    def __init__(self, tape: Tape, spec: EvaluateSpec, ttt: LoraTtt) -> None:
        assert spec.documents is not None  # checked by the spec
        self.start = tape.document_starts(spec.documents.bos)
        self.stop = np.append(self.start[1:], len(tape))
        self.plan = plan_of(tape, spec)
        self.first = np.searchsorted(self.plan.stop - self.plan.scored, self.start)
        self.num_chunks = np.diff(np.append(self.first, len(self.plan)))
        length = self.stop - self.start
        is_longest = ttt.order == "longest"
        queue = np.argsort(-length, kind="stable") if is_longest else np.arange(len(length))
        size = ttt.batch_documents
        parts = [queue[i : i + size] for i in range(0, len(queue), size)]
        # In a batch the longest come first: those with a chunk left are its first rows.
        self.batches = [part[np.argsort(-self.num_chunks[part], kind="stable")] for part in parts]
        self.queue = queue

    def chunks(self, batch: np.ndarray) -> Iterator[tuple[Windows, int]]:
        """Yield a batch chunk by chunk: the windows of the documents that have one, and how many of
        these, the first rows, have a later one too."""
        for index in range(int(self.num_chunks[batch].max())):
            rows = batch[self.num_chunks[batch] > index]
            num_later = int((self.num_chunks[rows] > index + 1).sum())
            yield self.plan.take(self.first[rows] + index), num_later

    def spans(self, documents: np.ndarray) -> phases.Spans:
        """Return where each of some documents begins and stops."""
        return list(zip(self.start[documents].tolist(), self.stop[documents].tolist(), strict=True))

    def runs(self, documents: np.ndarray) -> phases.Spans:
        """Return the stretches of text that some documents fill, adjoining ones as one."""
        spans = self.spans(np.sort(documents))
        firsts = [i for i in range(len(spans)) if i == 0 or spans[i - 1][1] != spans[i][0]]
        lasts = [i - 1 for i in [*firsts[1:], len(spans)]]
        return [(spans[a][0], spans[b][1]) for a, b in zip(firsts, lasts, strict=True)]


def adapt(model: GPT, tape: Tape, spec: EvaluateSpec, ttt: LoraTtt, ranks: Ranks) -> None:
    """Score a whole tape document by document while each document's adapters train on its past.

    The base weights move in phases only, and every phase is followed by new adapters.
    """
    documents = Documents(tape, spec, ttt)
    learner = Learner(model, tape, spec, ttt, ranks)
    sizes = [len(batch) for batch in documents.batches]
    for number, (stretch, num_trained) in enumerate(phases.stretches(sizes, ttt.phases)):
        batches = documents.batches[stretch]
        if number >= learner.first_stretch:
            learner.score(documents, batches, number)
        for first, stop in documents.runs(np.concatenate(batches)):
            tape.gather(ranks, first, stop)
        if ttt.phases is not None and num_trained and number >= learner.first_stretch:
            spans = documents.spans(documents.queue[:num_trained])
            phases.train(model, tape, spans, spec.window, ttt.phases, ranks)
            learner.save(number + 1, None)


class Learner:
    """What scores the documents of one rank and learns from them.

    A tape's journal resumes it after the last whole batch of documents; where A or the weights
    carry over and ranks are several, after the last phase: each rank has another A.
    """

    def __init__(
        self, model: GPT, tape: Tape, spec: EvaluateSpec, ttt: LoraTtt, ranks: Ranks
    ) -> None:
        self.model = model
        self.tape = tape
        self.spec = spec
        self.ttt = ttt
        self.ranks = ranks
        self.carries = ttt.warm_a or ttt.phases is not None
        # A batch is kept whole: its first document's first window tells of all.
        self.known = set(tape.resume(ranks).start.tolist())
        state = tape.journal.state if tape.journal is not None else None
        self.first_stretch, self.warm = 0, None
        if state is not None:
            model.load_state_dict(state["model"])
            self.first_stretch, self.warm = state["stretch"], state["a"]

    def score(self, documents: Documents, batches: list[np.ndarray], stretch: int) -> None:
        """Score this rank's batches of a stretch with adapters of its own.

        The rank takes every W-th: were they claimed from a shared counter, what a warm A holds, and
        with it the score, would hang on which rank was faster. Neighbours cost about the same.
        """
        num_rows = max(map(len, batches))
        with training(self.model, ()), Adapters(self.model, self.ttt, num_rows) as adapters:
            if self.warm is not None and stretch == self.first_stretch:
                adapters.load(self.warm)
            optimizer = RowAdamW(adapters.tensors(), self.ttt)
            for batch in batches[self.ranks.rank :: self.ranks.world_size]:
                if int(documents.start[batch[0]]) not in self.known:
                    adapters.begin()
                    optimizer.reset()
                    self._learn(adapters, optimizer, documents.chunks(batch))
                    if not self.carries:
                        self.tape.save()
                    elif self.ranks.world_size == 1:
                        self.save(stretch, adapters)

    def save(self, stretch: int, adapters: Adapters | None) -> None:
        """Keep what the scores from here on follow from: the next stretch has new adapters."""
        self.tape.save(
            lambda: {
                "stretch": stretch,
                "model": self.model.state_dict(),
                "a": None if adapters is None else adapters.state(),
            }
        )

    def _learn(
        self, adapters: Adapters, optimizer: RowAdamW, chunks: Iterator[tuple[Windows, int]]
    ) -> None:
        """Score a batch of documents, and step on each chunk that another one follows."""
        device = self.ranks.device
        for windows, num_later in chunks:
            leaves = adapters.use(len(windows))
            with torch.set_grad_enabled(num_later > 0):
                losses, scored = self.tape.score(
                    adapters.forward, windows, device, self.spec.window
                )
            if num_later:
                means = (losses * scored).sum(dim=1) / scored.sum(dim=1)
                gradients = torch.autograd.grad(means.sum(), leaves)
                optimizer.step(gradients, num_later)
                self.tape.note_update()

"""An evaluator under test, and the small geometry in which it is run."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trainer.evaluate.probes.text import Text
from trainer.evaluate.tape import Tape
from trainer.model.build import build, load_state
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import ModelSpec

Evaluator = Callable[[GPT, Tape, EvaluateSpec, Ranks], None]

MAX_GAP = 1e-4  # nats: one prediction by another order of the same sums

WINDOW, STRIDE = 16, 4
# So small that an adapting evaluator takes several steps on a short text.
_SMALL = {
    "chunk_tokens": WINDOW,
    "batch_sequences": 2,
    "batch_documents": 2,
    "batch_windows": 4,
    "documents": 4,
    "count": 2,
    "epochs": 2,
}


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """An evaluator, the model that it scores with, and how it is told to."""

    evaluator: Evaluator
    model: GPT
    spec: EvaluateSpec
    ranks: Ranks

    @property
    def tolerance(self) -> float:
        """How far equal losses may be apart: a CPU repeats itself to the last bit."""
        return 0.0 if self.ranks.device.type == "cpu" else 1e-4

    def fresh(self) -> GPT:
        """Return a model of the artifact's weights that nobody has touched."""
        return deepcopy(self.model)

    def tape(self, text: Text) -> Tape:
        """Return a tape of a text, nothing scored yet."""
        return Tape(text.tokens, again=self.spec.variant == "A")

    def score(self, text: Text) -> Tape:
        """Run the evaluator on a text and return the tape that it leaves."""
        tape = self.tape(text)
        self.evaluator(self.fresh(), tape, self.spec, self.ranks)
        return tape


def make_subject(
    evaluator: Evaluator,
    model: ModelSpec,
    state: Mapping[str, Tensor],
    spec: EvaluateSpec,
    ranks: Ranks,
) -> Subject:
    """Take an evaluator and an artifact's float32 state; lawfulness is no matter of the dtype.

    Neither the attention that the spec names nor a compiled graph is under test here.
    """
    built = build(model)
    load_state(built, dict(state))
    return Subject(evaluator, built.to(ranks.device).eval(), _shrunk(spec), ranks)


def _shrunk(spec: EvaluateSpec) -> EvaluateSpec:
    stride = WINDOW if spec.stride == spec.window else STRIDE
    ttt = spec.ttt and _least(spec.ttt)
    # A graph for each short text would take longer than all of their scores.
    return replace(_least(spec), window=WINDOW, stride=stride, ttt=ttt, compile=False)


def _least(part: Any) -> Any:
    """Bring what counts something down to what a short text has of it, phases included."""
    counts = {
        name: min(value, most)
        for name, most in _SMALL.items()
        if isinstance(value := getattr(part, name, None), int)
    }
    phases = getattr(part, "phases", None)
    return replace(part, **counts, **({"phases": _least(phases)} if phases else {}))

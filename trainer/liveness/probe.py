"""What the experiments share: short random texts, and weights of which none is asleep."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.model.build import build
from trainer.model.gpt import GPT
from trainer.results import Rule
from trainer.specs.model import ModelSpec

NUM_ROWS = 2
NUM_TOKENS = 32
SEED = 1


def random_tokens(vocab_size: int, *shape: int, seed: int = SEED) -> Tensor:
    """Draw tokens of the given shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


def text(spec: ModelSpec, num_tokens: int = NUM_TOKENS) -> Tensor:
    """Draw [NUM_ROWS, num_tokens + 1] tokens: inputs are all but the last, targets all but the
    first."""
    return random_tokens(spec.vocab_size, NUM_ROWS, num_tokens + 1)


def awake(spec: ModelSpec, state: Mapping[str, Tensor] | None = None) -> GPT:
    """Build a model whose every weight is a random number away from zero.

    A fresh model would hide its parts: a table or an output projection that starts at zero
    takes the effect from whatever it is multiplied with. Tensors that `state` has are copied,
    as far as they reach where the shapes differ.
    """
    generator = torch.Generator().manual_seed(SEED)
    known = state or {}
    model = build(spec).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            given = known.get(name)
            if given is None or given.shape != parameter.shape:
                _fill(parameter, generator)
            if given is not None:
                ends = zip(given.shape, parameter.shape, strict=True)
                common = tuple(slice(min(pair)) for pair in ends)
                parameter[common] = given[common]
    return model


def _fill(parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.ndim == 2 and parameter.shape[0] > 2:
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    else:
        parameter.normal_(1.0, 0.3, generator=generator)


@torch.no_grad()
def losses(model: GPT, tokens: Tensor) -> Tensor:
    """Return the loss of every target of a text [B, T + 1]; [B, T]."""
    return model(tokens[:, :-1], tokens[:, 1:])


def rule(name: str, faults: list[str], detail: str) -> Rule:
    """Fail with the faults if there are any, else pass with the detail."""
    return Rule(
        id=name,
        verdict="fail" if faults else "pass",
        detail="; ".join(faults) if faults else detail,
        source="techniques 8",
    )


def not_checked(name: str, why: str) -> Rule:
    """Say why a rule was not applied."""
    return Rule(id=name, verdict="not checked", detail=why, source="techniques 8")

"""What an evaluation would take, and the best one that a time budget allows.

Pure but for `measure`. An estimate counts window forwards: a forward costs by the tokens it reads
and by the positions it scores, a training step three times a whole forward, and the ranks share
alike. What the clock of a record excludes, loading and compiling, is not in it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.errors import InfeasibleError
from trainer.evaluate.sliding import evaluating
from trainer.evaluate.windows import Windows, plan_windows
from trainer.model.gpt import GPT
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.ttt import LoraTtt, OracleTtt, SgdTtt

TRAIN_FACTOR = 3.0  # a backward costs two forwards
NUM_STRIDES = 6  # window, window / 2, … window / 32: 64 of 2048
EPOCHS = (1, 2, 3, 5, 10)  # the public scripts' range, techniques 2.29
CHUNK_FACTORS = (1, 2, 4)  # longer chunks, where a chunk has too few sequences for the ranks
_TIMED_S = 2.0  # of forwards, each kind
_MOST_RUNS = 10


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one window's forward in a full batch: with all positions scored, with one."""

    whole_s: float
    end_s: float

    def forward_s(self, windows: Windows, width: int) -> float:
        """Return the seconds of forwards over windows of up to `width` tokens."""
        read, scored = float(windows.length.sum()), float(windows.scored.sum())
        return (read * self.end_s + scored * (self.whole_s - self.end_s)) / width


@dataclass(frozen=True, slots=True)
class Option:
    """A way to evaluate: seconds it takes, and bits per byte it is expected to give away."""

    spec: EvaluateSpec
    seconds: float
    handicap: float

    def choices(self) -> dict[str, int]:
        """Return what was chosen, by the spec's paths."""
        ttt = self.spec.ttt
        sgd = isinstance(ttt, SgdTtt)
        adapted = {"ttt.epochs": ttt.epochs, "ttt.chunk_tokens": ttt.chunk_tokens} if sgd else {}
        return {"stride": self.spec.stride, **adapted}


@torch.no_grad()
def measure(model: GPT, spec: EvaluateSpec, ranks: Ranks) -> Speed:
    """Time forwards of full batches of random tokens on this rank's device, after warming up.

    A CPU gains nothing from a batch, so there it is one window.
    """
    rows = 1 if ranks.device.type == "cpu" else spec.batch_windows
    shape = (rows, spec.window + 1)
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.plan.spec.vocab_size
    tokens = torch.randint(vocab_size, shape, generator=generator).to(ranks.device)
    seconds: list[float] = []
    with evaluating(model):
        for num_scored in (spec.window, 1):
            taken = _median_s(
                lambda scored=num_scored: model(tokens[:, :-1], tokens[:, -scored:]), ranks.device
            )
            seconds.append(taken / rows)
    return Speed(whole_s=seconds[0], end_s=min(seconds))


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    taken: list[float] = []
    work()
    while len(taken) < _MOST_RUNS and sum(taken) < _TIMED_S:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def estimate_s(
    spec: EvaluateSpec,
    num_predictions: int,
    starts: np.ndarray | None,
    speed: Speed,
    world_size: int,
) -> float:
    """Return the seconds that an evaluation of a text takes; `starts` as for `plan_windows`."""
    plan = plan_windows(num_predictions, spec, starts)
    ttt, epoch_s = spec.ttt, TRAIN_FACTOR * speed.whole_s * num_predictions / spec.window
    if isinstance(ttt, LoraTtt):
        seconds = TRAIN_FACTOR * speed.forward_s(plan, spec.window) / world_size
        if ttt.phases is not None:
            documents = 1 if starts is None else len(starts)
            trained = min(1.0, ttt.phases.documents / documents)
            # Phase i trains on the first i of `count` parts.
            passes = (ttt.phases.count + 1) / 2 * ttt.phases.epochs
            seconds += passes * trained * epoch_s / world_size
        return seconds
    seconds = speed.forward_s(plan.joined(), spec.window) / world_size
    if isinstance(ttt, SgdTtt):
        # Sequences are whole: a rank of a gang may have one more than another.
        sequences = ttt.chunk_tokens // spec.window
        most = -(-sequences // world_size)
        chunks = max(0, -(-num_predictions // ttt.chunk_tokens) - 1)
        seconds += chunks * ttt.epochs * most * TRAIN_FACTOR * speed.whole_s
    elif isinstance(ttt, OracleTtt):
        seconds += ttt.epochs * epoch_s / world_size
    return seconds


def handicap(spec: EvaluateSpec) -> float:
    """Return the bits per byte that a choice is expected to give away; for ranking choices only.

    Stride: 0.024 (S / L)^1.5, which is 0.024 without overlap and 0.0001 between 32 and 64 of 2048
    (techniques 1.5). SGD: a gain of 0.0022 epochs^0.12, fitted to PR #526's 3 and 30 epochs and
    #549's 0.0025; chunks that are longer adapt later, by nothing that was measured.
    """
    given_away = 0.024 * (spec.stride / spec.window) ** 1.5
    if isinstance(spec.ttt, SgdTtt):
        given_away -= 0.0022 * spec.ttt.epochs**0.12 - 1e-12 * spec.ttt.chunk_tokens
    return given_away


def options(
    spec: EvaluateSpec,
    num_predictions: int,
    starts: np.ndarray | None,
    speed: Speed,
    world_size: int,
) -> list[Option]:
    """Return the ways to evaluate as `spec` does, the best first."""
    found = [
        Option(
            choice,
            estimate_s(choice, num_predictions, starts, speed, world_size),
            handicap(choice),
        )
        for choice in _choices(spec)
    ]
    return sorted(found, key=lambda option: (option.handicap, option.seconds))


def _choices(spec: EvaluateSpec) -> Iterator[EvaluateSpec]:
    strides = {max(1, spec.window >> halvings) for halvings in range(NUM_STRIDES)}
    for stride in sorted(strides):
        ttt = spec.ttt
        if not isinstance(ttt, SgdTtt):
            yield replace(spec, stride=stride)
            continue
        for epochs in EPOCHS:
            for factor in CHUNK_FACTORS:
                if factor * ttt.chunk_tokens < spec.window:
                    continue  # holds no whole sequence to train on
                chosen = replace(ttt, epochs=epochs, chunk_tokens=factor * ttt.chunk_tokens)
                yield replace(spec, stride=stride, ttt=chosen)


def pick(found: list[Option], budget_s: float) -> Option:
    """Return the best option within a budget of seconds; InfeasibleError if there is none."""
    for option in found:
        if option.seconds <= budget_s:
            return option
    cheapest = min(found, key=lambda option: option.seconds)
    chosen = ", ".join(f"{name}={value}" for name, value in cheapest.choices().items())
    raise InfeasibleError(
        f"a budget of {budget_s:g} s: the quickest way ({chosen}) takes about "
        f"{cheapest.seconds:.3g} s; raise the budget, take more workers or score less"
    )

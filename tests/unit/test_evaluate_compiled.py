"""One small graph is built for most of these tests: they share its model and its shape."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from tests.models import off_its_start
from trainer.evaluate.compiled import Compiled, common_shape
from trainer.evaluate.journal import Journal, identity
from trainer.evaluate.sliding import slide
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import Shape, Windows, plan_windows, shape_of
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import Documents, EvaluateSpec
from trainer.specs.ttt import LoraTtt, OracleTtt, SgdTtt

# torch's own, when its CPU compiler is first imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CPU = torch.device("cpu")
EAGER = EvaluateSpec(window=16, stride=4, batch_windows=4)
COMPILED = replace(EAGER, compile=True)
SHAPE = Shape(rows=4, length=16, scored=4)


@dataclass(frozen=True)
class OneOf(Ranks):
    """A rank whose gang adds nothing up: its own share is what it returns."""

    def sum(self, values):
        return values

    def max(self, value):
        return value


class StopAt:
    """Breaks an evaluation off once so many predictions are scored."""

    def __init__(self, predictions):
        self.left = predictions

    def resumed(self, predictions):
        pass

    def advance(self, predictions):
        self.left -= predictions
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model():
    return off_its_start(build(tiny.bare_model(), seed=0))


def text(num_predictions=140):
    tokens = np.random.default_rng(0).integers(2, 64, size=num_predictions + 1)
    tokens[::50] = 1
    return tokens.astype(np.uint16)


def scored(model, spec, num_predictions=140, ranks=Ranks(), **parts):  # noqa: B008 (a value)
    tape = Tape(text(num_predictions), again=spec.variant == "A", **parts)
    slide(model, tape, spec, ranks)
    return tape


def windows(*rows):
    return Windows(*np.array(rows, dtype=np.int64).T)


@pytest.mark.parametrize("num_predictions", [135, 139, 140])
@pytest.mark.parametrize("variant", ["A", "C"])
def test_compiled_scores_are_the_eager_ones(model, variant, num_predictions):
    spec = replace(COMPILED, variant=variant)

    found = scored(model, spec, num_predictions)

    plain = scored(model, replace(spec, compile=False), num_predictions)
    assert np.abs(found.losses - plain.losses).max() < 1e-5
    assert (found.times == plain.times).all()
    assert [event.predictions for event in found.events] == [
        event.predictions for event in plain.events
    ]


def test_documents_of_any_length_are_scored_as_without_a_graph(model):
    spec = replace(COMPILED, documents=Documents(bos=1))

    found = scored(model, spec)

    plain = scored(model, replace(spec, compile=False))
    assert np.abs(found.losses - plain.losses).max() < 1e-5
    assert (found.times == 1).all()


def test_texts_of_all_lengths_share_one_graph_which_other_weights_use_too(model):
    torch._dynamo.reset()
    counters.clear()

    for num_predictions in (120, 135, 138, 140, 141):
        scored(model, COMPILED, num_predictions)
    scored(build(tiny.bare_model(), seed=1), COMPILED)

    assert counters["stats"]["unique_graphs"] == 1


def test_a_process_that_scores_one_model_after_another_never_has_too_many_graphs(
    model, monkeypatch
):
    monkeypatch.setattr("trainer.evaluate.compiled._MOST_GRAPHS", 2)
    specs = [replace(COMPILED, window=window) for window in (16, 20, 24, 16)]

    for spec in specs:
        found = scored(model, spec)

        plain = scored(model, replace(spec, compile=False))
        assert np.abs(found.losses - plain.losses).max() < 1e-5


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_shares_are_the_scores_of_one_to_the_bit(model, world_size):
    whole = scored(model, COMPILED)

    shares = [
        scored(model, COMPILED, ranks=OneOf(rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]

    total = sum(share.losses for share in shares)
    assert total.tobytes() == whole.losses.tobytes()
    assert (sum(share.times for share in shares) == 1).all()


def test_an_evaluation_that_broke_off_goes_on_to_the_same_scores(model, tmp_path):
    name, whole = identity("this score"), scored(model, COMPILED)
    with pytest.raises(KeyboardInterrupt):
        scored(model, COMPILED, progress=StopAt(70), journal=Journal(tmp_path, name, every_s=0.0))

    tape = scored(model, COMPILED, journal=Journal(tmp_path, name))

    assert len(list(tmp_path.glob("*.npz"))) > 1
    assert tape.losses.tobytes() == whole.losses.tobytes()
    assert (tape.events, tape.digest()) == (whole.events, whole.digest())


def test_the_common_shape_is_that_of_most_of_the_work():
    plan = plan_windows(140, EAGER)

    assert common_shape(plan, 4) == SHAPE


@pytest.mark.parametrize(
    ("rows", "is_compiled"),
    [
        ([(4 * i, 4 * i + 16, 4) for i in range(4)], True),
        ([(4, 20, 4), (8, 24, 4)], True),  # half a batch costs less filled up than eager
        ([(4, 20, 4)], False),
        ([(4, 20, 3), (8, 23, 3), (12, 28, 4)], True),
        ([(0, 16, 16), (16, 32, 16)], False),  # more scores than the graph gives
    ],
)
def test_a_batch_is_filled_up_where_that_costs_less_than_eager(model, rows, is_compiled):
    batch = windows(*rows)

    forward, shape = Compiled(model, plan_windows(140, EAGER), 4).forward_for(batch)

    assert shape == (SHAPE if is_compiled else shape_of(batch))
    assert (forward is model) == (not is_compiled)


def test_what_fills_a_batch_up_is_dropped():
    seen = []

    def forward(tokens, targets, width):
        seen.append((tokens.tolist(), targets.shape))
        return targets * 1.0

    tape = Tape(text())
    flight = tape.launch(forward, windows((4, 20, 3), (8, 23, 3)), CPU, 16, SHAPE)
    tape.land(flight)

    tokens = text().tolist()
    assert seen == [([tokens[4:20], [*tokens[8:24]], [0] * 16, [0] * 16], (4, 4))]
    assert flight.losses.shape == (2, 4)
    assert np.flatnonzero(tape.times).tolist() == list(range(17, 23))
    assert tape.losses[17:23].tolist() == tokens[18:24]


def test_nothing_is_sealed_before_it_landed():
    tape = Tape(text())

    flight = tape.launch(lambda x, y, width: y * 1.0, windows((0, 16, 16)), CPU, 16)

    assert not tape.times.any()
    assert tape.events == []
    tape.land(flight)
    assert tape.times.sum() == tape.events[0].predictions == 16


@pytest.mark.parametrize("spec", [EAGER, COMPILED])
def test_a_batch_is_launched_before_the_one_before_it_is_sealed(model, spec):
    steps = []

    class Told(Tape):
        def launch(self, *given):
            steps.append("launch")
            return super().launch(*given)

        def land(self, flight):
            steps.append("land")
            super().land(flight)

    slide(model, Told(text(47)), spec, Ranks())

    assert steps == ["launch", "launch", "land", "launch", "land", "land"]


@pytest.mark.parametrize("name", ["compile", "fused"])
@pytest.mark.parametrize("ttt", [LoraTtt(), SgdTtt()])
def test_a_model_that_trains_between_scores_takes_no_fast_path_past_what_it_trains(ttt, name):
    documents = Documents() if isinstance(ttt, LoraTtt) else None

    with pytest.raises(ValueError, match=rf"{name}=True .* leave out ttt.kind={ttt.kind}, which"):
        replace(EAGER, documents=documents, ttt=ttt, **{name: True})


def test_an_oracle_may_be_compiled():
    assert replace(COMPILED, ttt=OracleTtt(epochs=1)).compile

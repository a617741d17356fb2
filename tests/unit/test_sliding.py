from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.models import off_its_start
from tests.reference import sliding_reference as plain
from trainer.data.bytecount import ByteTable
from trainer.errors import DataError
from trainer.evaluate.sliding import score_stream
from trainer.evaluate.windows import Windows, batches, concatenate, plan_windows, times_scored
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import Rope

ALONE = Ranks()
SP1024_PREDICTIONS = 62_021_632
LAYOUTS = st.integers(1, 300).flatmap(
    lambda window: st.tuples(st.integers(1, 900), st.just(window), st.integers(1, window))
)


NTK = tiny.full_model(
    attention=replace(tiny.full_model().attention, rope=Rope(dims=4, ntk_reference=6))
)


@dataclass(frozen=True)
class OneOfTwo(Ranks):
    """A rank whose gang adds nothing up: its own share is what it returns."""

    world_size: int = 2

    def sum(self, values):
        return values


@pytest.fixture(scope="module")
def model():
    return off_its_start(build(NTK, seed=0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(64, size=101).astype(np.uint16)


@pytest.fixture(scope="module")
def table():
    generator = np.random.default_rng(1)
    return ByteTable(
        lut=generator.integers(5, size=64).astype(np.int32),
        has_leading_space=generator.random(64) < 0.4,
        is_boundary=generator.random(64) < 0.4,
    )


def score(model, tokens, table, spec, ranks=ALONE):
    totals = score_stream(model, tokens, table, spec, ranks)
    return totals.nats, totals.tokens, totals.bytes


def rows(plan):
    return sorted(zip(plan.start.tolist(), plan.stop.tolist(), plan.scored.tolist(), strict=True))


@given(LAYOUTS)
def test_variant_c_scores_every_prediction_exactly_once(layout):
    num_predictions, window, stride = layout

    plan = plan_windows(num_predictions, EvaluateSpec(window=window, stride=stride))

    assert (times_scored(plan, num_predictions) == 1).all()


@given(LAYOUTS)
def test_the_windows_are_those_of_the_plain_twin(layout):
    num_predictions, window, stride = layout

    plan = plan_windows(num_predictions, EvaluateSpec(window=window, stride=stride))

    found = [
        (int(start), prediction)
        for start, stop, scored in zip(plan.start, plan.stop, plan.scored, strict=True)
        for prediction in range(stop - scored, stop)
    ]
    assert found == plain.plan(num_predictions, window, stride)


@given(LAYOUTS)
def test_the_windows_of_variant_a_are_those_of_the_plain_twin(layout):
    num_predictions, window, stride = layout

    plan = plan_windows(num_predictions, EvaluateSpec(window=window, stride=stride, variant="A"))

    starts = np.repeat(plan.start, plan.scored).tolist()
    found = list(zip(starts, plan.positions().tolist(), strict=True))
    assert found == plain.plan_again(num_predictions, window, stride)


@given(LAYOUTS, st.sampled_from("AC"), st.integers(1, 20), st.integers(1, 4))
def test_the_ranks_batches_are_the_whole_plan(layout, variant, size, world_size):
    num_predictions, window, stride = layout
    plan = plan_windows(
        num_predictions, EvaluateSpec(window=window, stride=stride, variant=variant)
    )

    found = list(batches(plan, size))

    shares = [found[rank::world_size] for rank in range(world_size)]
    taken = concatenate([batch for share in shares for batch in share])
    assert rows(taken) == rows(plan)
    for batch in found:
        assert len(batch) * batch.length.max() <= size * plan.length.max()


def test_a_flat_stream_is_scored_in_the_order_of_the_text():
    plan = plan_windows(1000, EvaluateSpec(window=32, stride=8))

    order = concatenate(list(batches(plan, 16)))

    assert (np.diff(order.positions()) == 1).all()


@given(LAYOUTS)
def test_after_the_first_window_every_prediction_has_the_promised_context(layout):
    num_predictions, window, stride = layout

    plan = plan_windows(num_predictions, EvaluateSpec(window=window, stride=stride))

    context = (plan.stop - plan.scored - plan.start)[1:]
    assert (context >= window - stride).all()
    assert (plan.stop - plan.start <= window).all()


@pytest.mark.parametrize(
    ("variant", "stride", "num_windows"),
    [("C", 64, 969_057), ("A", 64, 969_088), ("C", 2048, 30_284)],
)
def test_window_counts_of_the_full_validation_split(variant, stride, num_windows):
    spec = EvaluateSpec(window=2048, stride=stride, variant=variant)

    plan = plan_windows(SP1024_PREDICTIONS, spec)

    assert len(plan) == num_windows
    assert plan.scored.sum() == SP1024_PREDICTIONS or variant == "A"


def test_variant_a_scores_the_tail_of_the_stream_again():
    plan = plan_windows(100, EvaluateSpec(window=32, stride=8, variant="A"))

    times = times_scored(plan, 100)

    assert (times[:92] == 1).all()
    assert (times[96:] > 1).all()


def test_stride_equal_to_window_means_blocks():
    plan = plan_windows(70, EvaluateSpec(window=32, stride=32))

    assert (plan.start.tolist(), plan.stop.tolist()) == ([0, 32, 64], [32, 64, 70])
    assert plan.scored.tolist() == [32, 32, 6]


@pytest.mark.parametrize("variant", ["A", "C"])
@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 16), (24, 7), (200, 50)])
def test_the_score_is_the_plain_twins(model, tokens, table, window, stride, variant):
    spec = EvaluateSpec(window=window, stride=stride, variant=variant, batch_windows=3)

    found = score(model, tokens, table, spec)

    pairs = (plain.plan if variant == "C" else plain.plan_again)(100, window, stride)
    nats, *counted = plain.score(model, tokens.tolist(), table, pairs, window)
    assert found[0] == pytest.approx(nats, rel=1e-6)
    assert list(found[1:]) == counted


@pytest.mark.parametrize("batch_windows", [1, 5, 64])
def test_the_score_does_not_depend_on_the_batch(model, tokens, table, batch_windows):
    told = EvaluateSpec(window=16, stride=4, batch_windows=batch_windows)

    one_by_one = score(model, tokens, table, EvaluateSpec(window=16, stride=4, batch_windows=16))

    assert score(model, tokens, table, told) == pytest.approx(one_by_one, rel=1e-7)


def test_two_ranks_shares_add_up_to_the_score_of_one(model, tokens, table):
    spec = EvaluateSpec(window=16, stride=4, batch_windows=3)

    shares = [score(model, tokens, table, spec, OneOfTwo(rank=rank)) for rank in range(2)]

    whole = score(model, tokens, table, spec)
    assert np.sum(shares, axis=0).tolist() == pytest.approx(whole, rel=1e-12)
    assert all(0 < share[1] < whole[1] for share in shares)


def test_a_rank_without_a_batch_scores_nothing(model, table):
    spec = EvaluateSpec(window=16, stride=16)

    share = score(model, np.array([1, 2, 3], dtype=np.uint16), table, spec, OneOfTwo(rank=1))

    assert share == (0.0, 0, 0)


@pytest.mark.parametrize("is_training", [True, False])
def test_scoring_leaves_the_model_in_its_mode(model, tokens, table, is_training):
    model.train(is_training)

    score(model, tokens, table, EvaluateSpec(window=16, stride=16))

    assert model.training == is_training


def test_a_stream_with_nothing_to_predict_is_refused(model, table):
    spec = EvaluateSpec(window=16, stride=16)

    with pytest.raises(DataError, match="a stream of 1 tokens has nothing to predict"):
        score(model, np.array([1], dtype=np.uint16), table, spec)


def test_no_windows_make_no_batch():
    nothing = np.array([], dtype=np.int64)

    assert list(batches(Windows(nothing, nothing, nothing), 4)) == []

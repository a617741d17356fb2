"""Documents on their own: planned, batched by length, and scored as one window at a time is."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.models import off_its_start
from tests.reference import sliding_reference as plain
from trainer.data.bytecount import ByteTable
from trainer.evaluate.sliding import plan_of, slide
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import batches, plan_windows, times_scored
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import Documents, EvaluateSpec

BOS = 1
SPEC = EvaluateSpec(window=12, stride=5, batch_windows=3, documents=Documents(bos=BOS))
TEXTS = st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=2, max_size=200)
GEOMETRIES = st.integers(1, 60).flatmap(
    lambda window: st.tuples(st.just(window), st.integers(1, window))
)


@pytest.fixture(scope="module")
def model():
    built = build(tiny.rich_model(), seed=0)  # its NTK rule binds beyond 6 tokens
    return off_its_start(built).eval()


@pytest.fixture(scope="module")
def tokens():
    """Documents of 1 to 40 tokens, after a piece of one whose beginning is not there."""
    generator = np.random.default_rng(0)
    pieces = [generator.integers(2, 64, size=7)]
    for length in (3, 0, 11, 25, 12, 39, 1, 5, 12):
        pieces += [[BOS], generator.integers(2, 64, size=length)]
    return np.concatenate(pieces).astype(np.uint16)


def taped(model, tokens, spec=SPEC):
    tape = Tape(tokens)
    slide(model, tape, spec, Ranks())
    return tape


def plan(text, window, stride):
    spec = EvaluateSpec(window=window, stride=stride, documents=Documents(bos=BOS))
    return plan_of(Tape(np.array(text, dtype=np.uint16)), spec)


@given(TEXTS, GEOMETRIES)
def test_every_prediction_of_any_documents_is_scored_exactly_once(text, geometry):
    chunks = plan(text, *geometry)

    assert (times_scored(chunks, len(text) - 1) == 1).all()
    assert (times_scored(chunks.joined(), len(text) - 1) == 1).all()


@given(TEXTS, GEOMETRIES)
def test_the_chunks_are_those_of_the_plain_twin(text, geometry):
    chunks = plan(text, *geometry)

    starts = np.repeat(chunks.start, chunks.scored).tolist()
    found = list(zip(starts, chunks.positions().tolist(), strict=True))
    assert found == plain.plan_documents(text, BOS, *geometry)


@given(TEXTS, GEOMETRIES)
def test_no_window_reads_across_a_bos(text, geometry):
    chunks = plan(text, *geometry).joined()

    for start, stop in zip(chunks.start, chunks.stop, strict=True):
        assert BOS not in text[start + 1 : stop]
        assert stop - start <= geometry[0]


@given(TEXTS, GEOMETRIES)
def test_joined_windows_give_each_prediction_the_same_context(text, geometry):
    chunks = plan(text, *geometry)

    joined = chunks.joined()

    assert len(joined) <= len(chunks)
    assert (joined.positions() == chunks.positions()).all()
    first_read = [np.repeat(windows.start, windows.scored) for windows in (chunks, joined)]
    assert (first_read[0] == first_read[1]).all()


def test_a_document_that_fits_is_read_once():
    joined = plan([BOS, *[5] * 30, BOS, *[5] * 9], window=32, stride=4).joined()

    assert (joined.start.tolist(), joined.stop.tolist()) == ([0, 31], [31, 40])
    assert joined.scored.tolist() == [31, 9]


def test_every_token_of_short_documents_is_read_once_and_nearly_without_filling(model, tokens):
    read = []
    hook = model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))

    taped(model, tokens, replace(SPEC, window=64, batch_windows=1))

    hook.remove()
    assert len(tokens) - 1 <= sum(read) < 1.2 * len(tokens)


def test_without_documents_the_text_is_one():
    chunks = plan_windows(70, SPEC)

    assert chunks.start.max() == 70 - SPEC.window
    assert (chunks.start[:2] == 0).all()


def test_a_large_text_of_documents_is_planned_with_little_padding():
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(6.7, 1.0, size=5_000).astype(np.int64) + 1
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    spec = EvaluateSpec(window=2048, stride=48, documents=Documents())

    chunks = plan_windows(int(lengths.sum()), spec, starts)
    cut = list(batches(chunks.joined(), 16))

    read = chunks.joined().length.sum()
    assert sum(len(batch) * batch.length.max() for batch in cut) < 1.01 * read
    assert read < 0.6 * chunks.length.sum()
    assert sum(batch.scored.sum() for batch in cut) == lengths.sum()


@pytest.mark.parametrize(("window", "stride"), [(12, 5), (12, 12), (8, 1), (64, 16)])
def test_the_score_is_the_plain_twins(model, tokens, window, stride):
    generator = np.random.default_rng(1)
    table = ByteTable(
        lut=generator.integers(5, size=64).astype(np.int32),
        has_leading_space=generator.random(64) < 0.4,
        is_boundary=generator.random(64) < 0.4,
    )
    spec = replace(SPEC, window=window, stride=stride)

    totals = taped(model, tokens, spec).totals(table)

    pairs = plain.plan_documents(tokens.tolist(), BOS, window, stride)
    nats, *counted = plain.score(model, tokens.tolist(), table, pairs, window)
    assert totals.nats == pytest.approx(nats, rel=1e-6)
    assert [totals.tokens, totals.bytes] == counted


@pytest.mark.parametrize("batch_windows", [1, 7, 100])
def test_a_loss_does_not_depend_on_its_batch(model, tokens, batch_windows):
    told = taped(model, tokens, replace(SPEC, batch_windows=batch_windows))

    np.testing.assert_allclose(told.losses, taped(model, tokens).losses, rtol=2e-5)


def test_tokens_outside_a_document_change_nothing_in_it(model, tokens):
    starts = np.flatnonzero(tokens == BOS)
    first, stop = starts[5], starts[6]
    outside = (np.arange(len(tokens)) < first) | (np.arange(len(tokens)) > stop)
    other = np.where(outside & (tokens != BOS), 65 - tokens, tokens).astype(np.uint16)

    before, after = (taped(model, text).losses for text in (tokens, other))

    assert (before[first:stop] == after[first:stop]).all()
    assert (before[:first] != after[:first]).any()


def test_a_bos_is_scored_at_the_end_of_the_document_before_it(model, tokens):
    bos = int(np.flatnonzero(tokens == BOS)[4])
    alone = tokens[np.flatnonzero(tokens == BOS)[3] : bos + 1]

    found = taped(model, tokens).losses[bos - 1]

    assert found == pytest.approx(taped(model, alone).losses[-1], rel=1e-5)


def test_flat_and_apart_score_the_same_targets(model, tokens):
    apart, flat = (taped(model, tokens, spec) for spec in (SPEC, replace(SPEC, documents=None)))

    assert (apart.times == 1).all()
    assert (flat.times == 1).all()
    assert apart.losses.sum() != flat.losses.sum()

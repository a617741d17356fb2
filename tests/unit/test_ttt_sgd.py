from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.models import off_its_start
from tests.mortal import Kill, Killed
from tests.reference import ttt_reference as plain
from trainer.errors import TrainingError, UsageError
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.journal import Journal
from trainer.evaluate.sliding import plan_of
from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt.sgd import plan_chunks, unfrozen
from trainer.evaluate.ttt.steps import batches, cosine, cut, share
from trainer.evaluate.windows import plan_windows
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.ttt import SgdTtt

ALONE = Ranks()
WINDOW, STRIDE, CHUNK = 16, 8, 48


def awake(spec, seed=0):
    """Build a model whose every part does something."""
    return off_its_start(build(spec, seed=seed), seed=seed)


@pytest.fixture(scope="module")
def model():
    return awake(tiny.rich_model(mtp=None))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(64, size=155).astype(np.uint16)


def ttt_of(**changes):
    return SgdTtt(
        **({"chunk_tokens": CHUNK, "lr": 0.05, "batch_sequences": 2, "epochs": 2} | changes)
    )


def spec_of(ttt=None, **changes):
    return EvaluateSpec(window=WINDOW, stride=STRIDE, ttt=ttt, **changes)


def scored(model, tokens, spec, **tape):
    """Return the tape that an evaluation with a fresh copy of the model leaves."""
    found = Tape(tokens, **tape)
    evaluate(deepcopy(model), found, spec, ALONE)
    return found


def repeated(num_tokens=240, period=40):
    pattern = np.random.default_rng(3).integers(64, size=period)
    return np.tile(pattern, num_tokens // period + 1)[:num_tokens].astype(np.uint16)


def test_a_rate_of_zero_gives_the_plain_score(model, tokens):
    still = scored(model, tokens, spec_of(ttt_of(lr=0.0)))

    assert still.losses == pytest.approx(scored(model, tokens, spec_of()).losses, abs=1e-6)


def test_the_first_chunk_is_scored_by_the_model_as_it_came(model, tokens):
    plain_score = scored(model, tokens, spec_of(batch_windows=1)).losses

    found = scored(model, tokens, spec_of(ttt_of(), batch_windows=1)).losses

    assert (found[:CHUNK] == plain_score[:CHUNK]).all()
    assert (found[CHUNK + STRIDE :] != plain_score[CHUNK + STRIDE :]).mean() > 0.9


@pytest.mark.parametrize(("stride", "batch_sequences"), [(8, 2), (16, 32)])
def test_the_losses_are_the_plain_twins(model, tokens, stride, batch_sequences):
    spec = EvaluateSpec(window=WINDOW, stride=stride)
    ttt = ttt_of(chunk_tokens=50, batch_sequences=batch_sequences, clip_norm=0.5)

    found = scored(model, tokens, EvaluateSpec(window=WINDOW, stride=stride, ttt=ttt))

    assert found.losses == pytest.approx(
        plain.sgd(model, tokens.tolist(), spec.window, stride, ttt), abs=1e-5
    )


@pytest.mark.parametrize("cut_at", [30, CHUNK, 100])
def test_later_tokens_leave_earlier_losses_as_they_are(model, tokens, cut_at):
    other = tokens.copy()
    other[cut_at + 1 :] = (other[cut_at + 1 :] + 1) % 64

    found, base = (scored(model, text, spec_of(ttt_of())).losses for text in (other, tokens))

    assert (found[:cut_at] == base[:cut_at]).all()
    assert (found[cut_at:] != base[cut_at:]).any()


def test_it_learns_a_text_that_repeats_itself(model):
    text = repeated()

    learned = scored(model, text, spec_of(ttt_of())).losses.mean()

    assert learned < scored(model, text, spec_of()).losses.mean() - 0.3


def test_two_evaluations_have_the_same_bits(model, tokens):
    one, other = (scored(model, tokens, spec_of(ttt_of())) for _ in range(2))

    assert (one.losses == other.losses).all()
    assert one.events == other.events


def test_the_tape_tells_of_every_step_after_the_scores_it_used(model, tokens):
    tape = scored(model, tokens, spec_of(ttt_of()))

    kinds = [event.kind for event in tape.events if event.kind != "score"]
    assert kinds == (["lend"] + ["update"] * 4) * 3
    assert tape.events[0].kind == tape.events[-1].kind == "score"
    assert (tape.times == 1).all()


def test_momentum_and_the_rate_follow_the_whole_stream(model, tokens):
    base = scored(model, tokens, spec_of(ttt_of())).losses

    without = scored(model, tokens, spec_of(ttt_of(momentum=0.0))).losses

    assert (base[CHUNK + STRIDE :] != without[CHUNK + STRIDE :]).any()
    assert [cosine(i / 4) for i in range(5)] == pytest.approx([1, 0.854, 0.5, 0.146, 0], abs=1e-3)


def test_training_leaves_no_gradient_and_no_flag_behind(model, tokens):
    own, tape = deepcopy(model).train(), Tape(tokens)

    evaluate(own, tape, spec_of(ttt_of(freeze_layers=2)), ALONE)

    assert all(p.grad is None and p.requires_grad for p in own.parameters())
    assert own.training


def test_frozen_layers_and_tables_stay_and_all_else_moves(model, tokens):
    own = deepcopy(model)

    evaluate(own, Tape(tokens), spec_of(ttt_of(freeze_layers=2, freeze_tables=True)), ALONE)

    moved = {
        name
        for (name, before), after in zip(model.named_parameters(), own.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    frozen = ("blocks.0.", "blocks.1.", "embedding.", "bigram.", "trigram.", "value_embedding.")
    assert moved == {n for n, _ in model.named_parameters() if not n.startswith(frozen)}


def test_what_cannot_be_frozen_is_refused(model):
    with pytest.raises(UsageError, match=r"freeze_layers=5: the model has 4 layers; freeze as"):
        unfrozen(model, ttt_of(freeze_layers=5))
    with pytest.raises(UsageError, match=r"every parameter is frozen; lower freeze_layers"):
        unfrozen(awake(tiny.bare_model()), ttt_of(freeze_layers=2, freeze_tables=True))


def test_a_chunk_shorter_than_a_window_is_refused(model, tokens):
    with pytest.raises(UsageError, match=r"chunk_tokens=15 holds no sequence of evaluate.window="):
        scored(model, tokens, spec_of(ttt_of(chunk_tokens=15)))


def test_a_rate_that_blows_up_stops_the_evaluation(model, tokens):
    with pytest.raises(TrainingError, match=r"diverged: gradient norm .*; lower evaluate.ttt.lr"):
        scored(model, tokens, spec_of(ttt_of(lr=1e30, clip_norm=1e30)))


@pytest.mark.parametrize("after", [1, 60, 150])
def test_a_killed_evaluation_goes_on_as_if_it_had_not_been(model, tokens, tmp_path, after):
    spec = spec_of(ttt_of())
    journal = {"journal": Journal(tmp_path, "me", every_s=0.0)}
    with pytest.raises(Killed):
        scored(model, tokens, spec, progress=Kill(after), **journal)

    told = Kill(10_000)
    tape = scored(model, tokens, spec, progress=told, journal=Journal(tmp_path, "me"))

    straight = scored(model, tokens, spec)
    assert (tape.losses == straight.losses).all()
    assert tape.events == straight.events
    assert told.num_resumed == after // CHUNK * CHUNK


LAYOUTS = st.integers(1, 40).flatmap(
    lambda window: st.tuples(
        st.integers(1, 500), st.just(window), st.integers(1, window), st.integers(window, 120)
    )
)


@given(LAYOUTS)
@settings(max_examples=60)
def test_chunks_hold_each_window_once_and_only_what_is_scored_by_their_end(layout):
    num, window, stride, size = layout
    plan = plan_windows(num, EvaluateSpec(window=window, stride=stride))

    chunks = plan_chunks(plan, num, size)

    assert len(chunks) == -(-num // size)
    assert np.concatenate([c.stop for c in chunks]).tolist() == plan.stop.tolist()
    done = np.cumsum([c.scored.sum() for c in chunks])
    assert all(done[i] >= min((i + 1) * size, num) for i in range(len(chunks)))
    firsts = [(c.stop - c.scored) // size for c in chunks]
    assert all((first == i).all() for i, first in enumerate(firsts))


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_ranks_take_every_step_together_and_every_sequence_once(num, window, world_size, size):
    rows = cut(np.arange(num), window)
    gang = [Ranks(rank, world_size) for rank in range(world_size)]

    steps = [batches(rows, size, ranks) for ranks in gang]

    assert len({len(mine) for mine in steps}) == 1
    for together in zip(*steps, strict=True):
        assert {total for _, total in together} == {
            sum(len(row) - 1 for mine, _ in together for row in mine)
        }
    held = [row[0] for mine in steps for batch, _ in mine for row in batch]
    assert held == [row[0] for row in rows] == list(range(0, num - 1, window))
    assert [row[0] for ranks in gang for row in share(rows, ranks)] == held


def test_the_plan_of_a_tape_is_that_of_its_spec(tokens):
    plan = plan_of(Tape(tokens), spec_of())

    assert len(plan) == len(plan_windows(len(tokens) - 1, spec_of()))

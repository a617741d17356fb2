from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.models import off_its_start
from tests.mortal import Kill, Killed
from tests.reference import ttt_reference as plain
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.journal import Journal
from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt import phases
from trainer.evaluate.ttt.adapters import Adapters
from trainer.evaluate.ttt.lora import Documents, RowAdamW
from trainer.model.build import build
from trainer.model.linear import Absent
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import Documents as DocumentsSpec
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.model import Attention, Recurrence
from trainer.specs.ttt import LORA_TARGETS, LoraTtt, Phases

ALONE = Ranks()
BOS = 1
WINDOW, CHUNK = 16, 4
LENGTHS = (5, 14, 1, 30, 9, 16, 26)


def awake(spec, seed=0):
    """Build a model whose every part does something."""
    return off_its_start(build(spec, seed=seed), seed=seed)


def text_of(lengths, seed=0):
    """Write documents of so many tokens, BOS included."""
    generator = np.random.default_rng(seed)
    parts = [[BOS, *generator.integers(2, 64, size=length - 1)] for length in lengths]
    return np.concatenate(parts).astype(np.uint16)


@pytest.fixture(scope="module")
def model():
    # Fast rotations: a row that turned as a shorter window's would show.
    spec = tiny.rich_model(mtp=None)
    rope = replace(spec.attention.rope, base=3.0)
    return awake(replace(spec, attention=replace(spec.attention, rope=rope)))


@pytest.fixture(scope="module")
def tokens():
    return text_of(LENGTHS)


def ttt_of(**changes):
    parts = {"rank": 3, "alpha": 6.0, "lr": 0.005, "warm_a": False, "batch_documents": 3}
    return LoraTtt(**(parts | changes))


def spec_of(ttt=None, **changes):
    return EvaluateSpec(
        window=WINDOW, stride=CHUNK, documents=DocumentsSpec(bos=BOS), ttt=ttt, **changes
    )


def scored(model, tokens, ttt=None, **tape):
    """Return the tape that an evaluation with a fresh copy of the model leaves."""
    found = Tape(tokens, **tape)
    evaluate(deepcopy(model), found, spec_of(ttt), ALONE)
    return found


def spans(tokens):
    starts = [*np.flatnonzero(tokens == BOS), len(tokens) - 1]
    return list(pairwise(starts))


def test_a_rate_of_zero_gives_the_plain_score(model, tokens):
    still = scored(model, tokens, ttt_of(lr=0.0, weight_decay=0.5))

    assert still.losses == pytest.approx(scored(model, tokens).losses, abs=2e-6)
    assert still.losses.mean() == pytest.approx(scored(model, tokens).losses.mean(), abs=1e-6)


def test_the_first_chunk_of_each_document_is_scored_by_the_model_as_it_came(model, tokens):
    found, base = (scored(model, tokens, ttt).losses for ttt in (ttt_of(), None))

    for first, stop in spans(tokens):
        chunk = slice(first, min(first + CHUNK, stop))
        assert found[chunk] == pytest.approx(base[chunk], abs=1e-6)
        assert (np.abs(found[first + CHUNK : stop] - base[first + CHUNK : stop]) > 1e-6).all()


VARIANTS = {
    "working form": {"alpha": 3.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.0}
    | {"targets": ("query", "value", "head")},
    "modern form": {},
    "one target": {"targets": ("mlp",)},
    "decay": {"weight_decay": 5.0, "beta1": 0.5},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_losses_are_those_of_the_plain_twin_document_by_document(model, tokens, name):
    ttt = ttt_of(**VARIANTS[name])

    found = scored(model, tokens, ttt).losses

    for first, stop in spans(tokens):
        document = tokens[first : stop + 1].tolist()
        assert found[first:stop] == pytest.approx(
            plain.lora(model, document, WINDOW, CHUNK, ttt), abs=1e-5
        )


@pytest.mark.parametrize("spec", [tiny.full_model(), tiny.bare_model()])
def test_the_twin_agrees_on_a_tied_head_and_on_keys_of_each_layer(spec, tokens):
    small, ttt = awake(spec), ttt_of()

    found = scored(small, tokens, ttt).losses

    first, stop = spans(tokens)[3]
    twin = plain.lora(small, tokens[first : stop + 1].tolist(), WINDOW, CHUNK, ttt)
    assert found[first:stop] == pytest.approx(twin, abs=1e-5)


@pytest.mark.parametrize("order", ["longest", "file"])
@pytest.mark.parametrize("batch_documents", [1, 2, 64])
def test_a_document_does_not_depend_on_its_batch(model, tokens, order, batch_documents):
    base = scored(model, tokens, ttt_of()).losses

    other = ttt_of(order=order, batch_documents=batch_documents)

    assert scored(model, tokens, other).losses == pytest.approx(base, abs=1e-5)


@pytest.mark.parametrize("cut_at", [15, 80])
def test_later_tokens_leave_earlier_losses_as_they_are(model, tokens, cut_at):
    """In the order of the file this holds whatever is carried from document to document."""
    other = tokens.copy()
    later = np.arange(len(tokens)) > cut_at
    other[later & (tokens != BOS)] = 2 + (other[later & (tokens != BOS)] - 1) % 62
    phased = Phases(documents=4, count=2, chunk_tokens=32, lr=0.05)

    for ttt in (ttt_of(order="file"), ttt_of(order="file", warm_a=True, phases=phased)):
        found, base = (scored(model, text, ttt).losses for text in (other, tokens))
        batch_stop = min(cut_at, len(tokens) - 1)
        assert (found[:batch_stop] == base[:batch_stop]).all()
        assert (found[cut_at:] != base[cut_at:]).any()


def test_another_document_leaves_the_losses_as_they_are(model, tokens):
    first, stop = spans(tokens)[3]
    other = tokens.copy()
    other[first + 1 : stop] = 2 + (other[first + 1 : stop] - 1) % 62

    found, base = (scored(model, text, ttt_of()).losses for text in (other, tokens))

    outside = np.r_[:first, stop : len(base)]
    assert (found[outside] == base[outside]).all()
    assert (found[first:stop] != base[first:stop]).any()


def test_a_warm_a_carries_from_the_document_before_it_in_its_row(model, tokens):
    """What holds with a warm A: the first batch is untouched by later ones, not the other way."""
    base = scored(model, tokens, ttt_of()).losses
    warm = scored(model, tokens, ttt_of(warm_a=True)).losses
    longest = sorted(spans(tokens), key=lambda span: span[0] - span[1])

    for rank, (first, stop) in enumerate(longest):
        same = np.abs(warm[first:stop] - base[first:stop]) <= 1e-6
        assert same.all() if rank < 3 or stop - first <= CHUNK else not same.all()


def test_it_learns_a_document_that_repeats_itself(model):
    pattern = text_of((10,), seed=5)[1:]
    text = np.concatenate([[BOS], np.tile(pattern, 20)]).astype(np.uint16)
    ttt = ttt_of(rank=8, alpha=16.0, lr=0.01, weight_decay=0.0)

    learned = scored(model, text, ttt).losses.mean()

    assert learned < scored(model, text).losses.mean() - 0.3


def test_two_evaluations_have_the_same_bits(model, tokens):
    one, other = (scored(model, tokens, ttt_of(warm_a=True)) for _ in range(2))

    assert (one.losses == other.losses).all()
    assert one.events == other.events


def test_a_step_follows_every_chunk_that_another_one_follows(model, tokens):
    kinds = [event.kind for event in scored(model, tokens, ttt_of(batch_documents=1)).events]

    lengths = sorted((stop - first for first, stop in spans(tokens)), reverse=True)
    chunks = [-(-length // CHUNK) for length in lengths]
    assert kinds == [kind for num in chunks for kind in ["score", "update"] * (num - 1) + ["score"]]


def test_the_base_weights_stay_and_the_seams_are_empty_again(model, tokens):
    own = deepcopy(model)

    evaluate(own, Tape(tokens), spec_of(ttt_of(warm_a=True)), ALONE)

    for (name, before), after in zip(model.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(before, after), name
        assert after.requires_grad
        assert after.grad is None
    adapters = [getattr(module, "adapter", None) for module in own.modules()]
    assert all(isinstance(adapter, Absent) for adapter in adapters if adapter is not None)


def test_every_visit_of_a_layer_has_adapters_of_its_own():
    spec = tiny.full_model(recurrence=Recurrence(first=1, last=1, passes=3))
    model = awake(spec)
    adapters = Adapters(model, ttt_of(), 2)

    assert len(adapters.pairs) == 5 * (3 + 2) + 1
    assert len(adapters.seams[model.blocks[1].mlp].pairs) == 3
    assert len(adapters.seams[model.blocks[0].mlp].pairs) == 1
    gradients = _first_gradients(model, adapters)
    of_visits = [id(pair.b) for pair in adapters.seams[model.blocks[1].mlp].pairs]
    moved = [gradients[key] for key in of_visits]
    assert not torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[1], moved[2])


def _first_gradients(model, adapters):
    """Return the gradients of all B of a first forward, by tensor."""
    batch = torch.arange(12)[None]
    with adapters:
        leaves = adapters.use(1)
        found = []
        for _ in range(2):  # a forward leaves nothing behind that would change the next
            losses = adapters.forward(batch[:, :-1], batch[:, 1:])
            found.append(torch.autograd.grad(losses.sum(), leaves))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    return {
        id(pair.b): gradient for pair, gradient in zip(adapters.pairs, found[0][1::2], strict=True)
    }


def test_layers_that_share_keys_have_adapters_of_their_own_on_them():
    spec = tiny.full_model(
        attention=Attention(num_heads=4, num_kv_heads=2, shared_kv=tiny.SharedKv())
    )
    model = awake(spec)

    adapters = Adapters(model, ttt_of(targets=("key", "value")), 1)

    assert {len(seam.pairs) for seam in adapters.seams.values()} == {3}
    assert len(adapters.pairs) == 6


def test_adapters_start_as_nothing_on_all_targets(model):
    batch = torch.arange(24).view(2, 12)
    adapters = Adapters(model, ttt_of(), 2)
    model.eval()
    base = model(batch[:, :-1], batch[:, 1:])

    with adapters:
        adapters.use(2)
        found = adapters.forward(batch[:, :-1], batch[:, 1:])

    assert torch.equal(found, base)
    slots = len(model.steps)
    assert len(adapters.pairs) == slots * (len(LORA_TARGETS) - 1) + 1
    assert all((pair.a.abs() <= pair.a.shape[2] ** -0.5).all() for pair in adapters.pairs)
    assert all(pair.a.std() > 0.4 * pair.a.shape[2] ** -0.5 for pair in adapters.pairs)


@given(st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=20)
def test_rows_step_as_torchs_adamw_would_move_each_alone(rows, seed):
    ttt = ttt_of(beta1=0.3, beta2=0.9, weight_decay=0.7)
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(4, 3, 5, generator=generator)
    parameter = torch.nn.Parameter(whole[:rows].clone())
    rest = whole[rows:].clone()
    own = RowAdamW([whole], ttt)
    theirs = torch.optim.AdamW(
        [parameter], ttt.lr, (ttt.beta1, ttt.beta2), ttt.eps, ttt.weight_decay
    )
    for _ in range(3):
        gradient = torch.randn(4, 3, 5, generator=generator)
        own.step((gradient,), rows)
        parameter.grad = gradient[:rows]
        theirs.step()

    assert torch.allclose(whole[:rows], parameter, atol=1e-6)
    assert torch.equal(whole[rows:], rest)


LENGTH_LISTS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(LENGTH_LISTS, st.integers(1, 5), st.sampled_from(("longest", "file")))
@settings(max_examples=50)
def test_every_chunk_of_every_document_comes_once_and_in_order(lengths, size, order):
    text = text_of([*lengths, 2])
    tape = Tape(text)
    documents = Documents(tape, spec_of(), ttt_of(order=order, batch_documents=size))

    seen = np.zeros(len(tape), dtype=int)
    for batch in documents.batches:
        for windows, num_later in documents.chunks(batch):
            seen[windows.positions()] += 1
            ends = documents.stop[batch[: len(windows)]]
            assert (windows.stop[:num_later] < ends[:num_later]).all()
            assert (windows.stop[num_later:] == ends[num_later:]).all()

    assert (seen == 1).all()
    assert documents.runs(np.arange(len(documents.start))) == [(0, len(tape))]
    assert sorted(np.concatenate(documents.batches)) == list(range(len(documents.start)))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=15), st.integers(1, 40), st.integers(1, 5))
def test_a_phase_comes_after_the_batch_that_reaches_its_share(sizes, documents, count):
    count = min(count, documents)

    found = phases.stretches(sizes, Phases(documents=documents, count=count))

    assert [i for part, _ in found for i in range(len(sizes))[part]] == list(range(len(sizes)))
    assert found[-1][1] == 0
    for part, trained in found[:-1]:
        assert sum(sizes[: part.stop]) >= trained > sum(sizes[: part.stop - 1])
        assert trained in [documents * k // count for k in range(1, count + 1)]


def test_a_phase_trains_the_base_weights_as_the_plain_twin_does(model, tokens):
    phased = Phases(documents=6, count=1, chunk_tokens=32, lr=0.05, epochs=2)
    own = deepcopy(model)

    ttt = ttt_of(order="file", batch_documents=2, phases=phased)
    tape = Tape(tokens)
    evaluate(own, tape, spec_of(ttt), ALONE)

    texts = [tokens[first : stop + 1].tolist() for first, stop in spans(tokens)]
    twin = plain.phase(model, texts[:6], WINDOW, phased)
    for (name, found), expected in zip(own.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5), name
    for number, (first, stop) in enumerate(spans(tokens)):
        base = model if number < 6 else twin
        expected = plain.lora(base, texts[number], WINDOW, CHUNK, ttt)
        assert tape.losses[first:stop] == pytest.approx(expected, abs=1e-4)


def test_phases_at_a_rate_of_zero_change_nothing(model, tokens):
    still = Phases(documents=4, count=2, chunk_tokens=24, lr=0.0)

    found = scored(model, tokens, ttt_of(phases=still))

    assert (found.losses == scored(model, tokens, ttt_of()).losses).all()
    assert [event.kind for event in found.events].count("lend") == 2 + 4


@pytest.mark.parametrize("after", [30, 90])
@pytest.mark.parametrize(
    "carried",
    [{}, {"warm_a": True}, {"phases": Phases(documents=4, count=2, chunk_tokens=32, lr=0.05)}],
)
def test_a_killed_evaluation_goes_on_as_if_it_had_not_been(model, tokens, tmp_path, after, carried):
    ttt = ttt_of(batch_documents=2, **carried)
    with pytest.raises(Killed):
        scored(model, tokens, ttt, progress=Kill(after), journal=Journal(tmp_path, "me", every_s=0))

    told = Kill(10_000)
    tape = scored(model, tokens, ttt, progress=told, journal=Journal(tmp_path, "me"))

    straight = scored(model, tokens, ttt)
    assert (tape.losses == straight.losses).all()
    assert tape.events == straight.events
    assert (told.num_resumed > 0) == (after == 90)


class OneOfTwo(Ranks):
    """A rank whose gang adds nothing up: its own share is what it returns."""

    def sum(self, values):
        return values

    def max(self, value):
        return value


def test_what_two_ranks_left_is_taken_up_by_one(model, tokens, tmp_path):
    spec, both = spec_of(ttt_of(batch_documents=2)), []
    for rank, after in enumerate((60, 31)):
        journal = Journal(tmp_path, "me", rank, every_s=0)
        tape = Tape(tokens, progress=Kill(after), journal=journal)
        with pytest.raises(Killed):
            evaluate(deepcopy(model), tape, spec, OneOfTwo(rank, 2))
        both.append(sum(event.predictions for event in tape.events))

    told = Kill(10_000)
    found = scored(
        model, tokens, ttt_of(batch_documents=2), progress=told, journal=Journal(tmp_path, "me")
    )

    assert 0 < told.num_resumed < sum(both)
    assert (found.losses == scored(model, tokens, ttt_of(batch_documents=2)).losses).all()
    assert (found.times == 1).all()

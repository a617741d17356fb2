"""The text that Hessians are collected on, and the Hessians that are collected on it."""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.models import off_its_start
from tests.strategies import models
from trainer.data.shards import TokenStream, write_shard
from trainer.errors import DataError, UsageError
from trainer.finalize import calibration
from trainer.finalize.calibration import calibration_batches, generated_batches, training_batches
from trainer.finalize.hessians import collect_hessians, load_hessians, save_hessians
from trainer.model.build import build
from trainer.model.linear import Linear
from trainer.runtime.distributed import Ranks
from trainer.specs.final import Gptq
from trainer.specs.model import Attention, Recurrence, Rope, SharedKv

ALONE, CPU = Ranks(), torch.device("cpu")


class Box:
    """Where two threads meet to add up what they hold."""

    def __init__(self):
        self.barrier = threading.Barrier(2)
        self.held = [None, None]


@dataclass(frozen=True)
class OneOfTwo(Ranks):
    """A rank of a gang of two threads of this process."""

    world_size: int = 2
    box: Box = field(default_factory=Box)

    def sum(self, values):
        self.box.held[self.rank] = values.clone()
        self.box.barrier.wait(timeout=240)
        values += self.box.held[1 - self.rank]
        self.box.barrier.wait(timeout=240)
        return values

    def max(self, value):
        return float(self.sum(torch.tensor(float(value > 0))) > 0)


def on_two_ranks(work):
    """Call work(ranks) on both ranks at once; return what each returns or raises."""
    box = Box()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: work(OneOfTwo(rank=rank, box=box)), range(2)))


def alive(spec):
    """A model whose every parameter is away from its start, where much is zero."""
    return off_its_start(build(spec, seed=0))


def text(num_rows, length, vocab_size=64, seed=0):
    return torch.randint(
        vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(seed)
    )


def plain_hessians(model, tokens):
    """Each matrix for itself: every input that it ever multiplies, one token at a time."""
    seen = defaultdict(list)
    linears = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, Linear)}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: seen[name].append(args[0]))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        hidden = model.hidden(tokens)
        model.logits(hidden)
    for handle in handles:
        handle.remove()
    if model.plan.spec.head is None:
        seen["embedding.weight"].append(hidden)
    moments = {}
    for name, visits in seen.items():
        rows = torch.cat([visit.flatten(0, 1) for visit in visits]).double()
        moments[name] = rows.T @ rows / tokens.numel()
    return moments


@pytest.mark.parametrize("spec", [tiny.full_model(), tiny.rich_model(), tiny.bare_model()])
def test_hessians_equal_those_of_every_matrix_on_its_own(spec):
    model, tokens = alive(spec.exported()), text(6, 20)

    collected = collect_hessians(model, tokens.split(2), ALONE)

    plain = plain_hessians(model, tokens)
    assert collected.keys() == plain.keys()
    for name, hessian in collected.items():
        assert hessian.dtype == torch.float32
        torch.testing.assert_close(hessian.double(), plain[name], rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(spec=models())
def test_every_matrix_of_any_model_has_a_hessian_of_its_width(spec):
    model = build(spec.exported(), seed=0)

    collected = collect_hessians(model, [text(1, 5, spec.vocab_size)], ALONE)

    matrices = {
        f"{path}.weight": module.weight.shape[1]
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }
    if spec.head is None:
        matrices["embedding.weight"] = spec.dim
    assert {name: hessian.shape for name, hessian in collected.items()} == {
        name: (width, width) for name, width in matrices.items()
    }


def test_matrices_that_read_the_same_inputs_share_one_tensor():
    collected = collect_hessians(alive(tiny.full_model()), [text(2, 8)], ALONE)

    first = {name: collected[f"blocks.0.attention.{name}.weight"] for name in ("query", "key")}
    assert first["query"] is first["key"]
    assert first["key"] is collected["blocks.0.attention.value.weight"]
    assert first["query"] is not collected["blocks.0.attention.out.weight"]
    assert first["query"] is not collected["blocks.1.attention.query.weight"]


def test_shared_keys_add_up_the_inputs_of_every_layer_that_uses_them():
    shared = Attention(num_heads=2, num_kv_heads=1, shared_kv=SharedKv())

    collected = collect_hessians(alive(tiny.bare_model(attention=shared)), [text(2, 8)], ALONE)

    queries = [collected[f"blocks.{layer}.attention.query.weight"] for layer in range(2)]
    torch.testing.assert_close(collected["blocks.0.attention.key.weight"], sum(queries))
    assert "blocks.1.attention.key.weight" not in collected


def test_a_layer_that_runs_twice_adds_up_both_visits():
    again = tiny.bare_model(num_layers=1, recurrence=Recurrence(first=0, last=0, passes=2))
    once = tiny.bare_model(num_layers=1)
    tokens = text(2, 8)

    twice, single = (collect_hessians(alive(spec), [tokens], ALONE) for spec in (again, once))

    name = "blocks.0.mlp.up.weight"
    assert float(twice[name].trace()) == pytest.approx(2 * float(single[name].trace()), rel=0.05)
    assert not torch.allclose(twice[name], 2 * single[name])


def test_the_cut_into_batches_does_not_matter():
    model, tokens = alive(tiny.full_model()), text(6, 12)

    whole = collect_hessians(model, [tokens], ALONE)
    uneven = collect_hessians(model, [tokens[:1], tokens[1:3], tokens[3:]], ALONE)

    for name in whole:
        torch.testing.assert_close(uneven[name], whole[name], rtol=1e-5, atol=1e-6)


def test_two_ranks_with_uneven_shares_collect_what_one_does():
    tokens, spec = text(5, 12), tiny.full_model()
    shares = (tokens[:2], tokens[2:])

    both = on_two_ranks(
        lambda ranks: collect_hessians(alive(spec), shares[ranks.rank].split(1), ranks)
    )

    alone = collect_hessians(alive(spec), [tokens], ALONE)
    for hessians in both:
        assert hessians.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(hessians[name], alone[name], rtol=1e-5, atol=1e-6)


def test_a_rank_without_text_is_refused_on_every_rank():
    def work(ranks):
        batches = [text(1, 4)] if ranks.rank == 0 else []
        with pytest.raises(UsageError, match=r"gptq\.sequences: too few for 2 workers"):
            collect_hessians(alive(tiny.bare_model()), batches, ranks)
        return True

    assert on_two_ranks(work) == [True, True]


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_is_left_as_it_was():
    model = alive(tiny.full_model()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    collect_hessians(model, [text(2, 8)], ALONE)

    assert hooks(model) == 0
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failure_in_the_forward_leaves_no_hook():
    model = alive(tiny.full_model())

    with pytest.raises(IndexError):
        collect_hessians(model, [text(1, 4), text(1, 4) + 64], ALONE)

    assert hooks(model) == 0


def test_what_the_model_runs_between_two_batches_is_not_collected():
    model, tokens = alive(tiny.bare_model()), text(4, 8)

    def batches():
        for row in tokens.split(1):
            model.hidden(text(3, 5, seed=9))
            yield row

    collected = collect_hessians(model, batches(), ALONE)

    expected = collect_hessians(model, tokens.split(1), ALONE)
    assert all(torch.equal(collected[name], expected[name]) for name in expected)


def test_saved_hessians_come_back_as_they_were_and_shared_as_they_were(tmp_path):
    hessians = collect_hessians(alive(tiny.full_model()), [text(2, 8)], ALONE)
    distinct = {id(hessian): hessian for hessian in hessians.values()}

    save_hessians(tmp_path, hessians)
    loaded = load_hessians(tmp_path, CPU)

    assert all(torch.equal(loaded[name], hessians[name]) for name in hessians)
    assert list(loaded) == list(hessians)
    assert len({id(hessian) for hessian in loaded.values()}) == len(distinct) < len(hessians)
    stored = 4 * sum(hessian.numel() for hessian in distinct.values())
    assert (tmp_path / "hessians.pt").stat().st_size < 1.1 * stored + 30_000


def test_hessians_that_are_moved_to_a_device_stay_shared(tmp_path):
    hessian = torch.eye(4)
    save_hessians(tmp_path, {"query": hessian, "key": hessian, "out": torch.eye(4)})

    loaded = load_hessians(tmp_path, torch.device("meta"))

    assert loaded["query"] is loaded["key"]
    assert loaded["query"].device.type == loaded["out"].device.type == "meta"


def test_altered_hessians_are_refused_by_file(tmp_path):
    save_hessians(tmp_path, {"w": torch.eye(64)})
    data = bytearray((tmp_path / "hessians.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "hessians.pt").write_bytes(data)

    with pytest.raises(DataError, match=r"hessians\.pt: altered"):
        load_hessians(tmp_path, CPU)


@pytest.fixture
def counting(tmp_path):
    """A stream whose tokens are their own positions."""
    write_shard(tmp_path / "a.bin", np.arange(1000))
    return TokenStream([tmp_path / "a.bin"])


def test_training_text_is_spread_evenly_over_the_stream(counting):
    spec = Gptq(sequences=4, seq_len=100)

    rows = torch.cat(list(training_batches(counting, spec, ALONE)))

    assert rows[:, 0].tolist() == [0, 250, 500, 750]
    assert torch.equal(rows, rows[:, :1] + torch.arange(100))
    assert rows.dtype == torch.int64


@given(sequences=st.integers(1, 40), seq_len=st.integers(1, 25), world_size=st.integers(1, 4))
def test_ranks_share_sequences_that_do_not_overlap(
    tmp_path_factory, sequences, seq_len, world_size
):
    folder = tmp_path_factory.mktemp("stream")
    write_shard(folder / "a.bin", np.arange(1000))
    stream, spec = TokenStream([folder / "a.bin"]), Gptq(sequences=sequences, seq_len=seq_len)

    shares = [
        batch
        for rank in range(world_size)
        for batch in training_batches(stream, spec, Ranks(rank, world_size))
    ]

    read = torch.cat(shares).flatten().tolist()
    assert len(read) == sequences * seq_len
    assert read == sorted(set(read))


def test_long_texts_come_in_batches_of_bounded_size(counting, monkeypatch):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 90)

    spec = Gptq(sequences=7, seq_len=30)
    batches = list(training_batches(counting, spec, ALONE))

    assert [len(batch) for batch in batches] == [3, 3, 1]


def test_a_stream_that_is_too_short_is_refused(counting):
    with pytest.raises(UsageError, match=r"11 sequences of 100 need 1,100 tokens, .* has 1,000"):
        list(training_batches(counting, Gptq(sequences=11, seq_len=100), ALONE))


def test_the_spec_says_which_text_is_read(tiny_dataset):
    model = alive(tiny.bare_model(vocab_size=tiny.VOCAB_SIZE))
    spec = Gptq(sequences=3, seq_len=8)

    trained = list(calibration_batches(model, spec, tiny_dataset, ALONE))
    drawn = list(
        calibration_batches(model, replace(spec, calibration="generated"), tiny_dataset, ALONE)
    )

    stream = tiny_dataset.stream("train")
    assert torch.equal(trained[0], next(training_batches(stream, spec, ALONE)))
    assert torch.equal(drawn[0], next(generated_batches(model, spec, ALONE)))
    assert not torch.equal(trained[0], drawn[0])


def test_text_of_another_vocabulary_is_refused(tiny_dataset):
    model = alive(tiny.bare_model(vocab_size=tiny.VOCAB_SIZE - 1))

    with pytest.raises(DataError, match=r"320 tokens, but the model's vocab_size is 319"):
        calibration_batches(model, Gptq(sequences=1, seq_len=8), tiny_dataset, ALONE)


def test_cold_text_is_what_the_model_thinks_likeliest_at_full_length():
    rope = Rope(dims=4, ntk_reference=4)  # positions turn by the length of the sequence
    attention = Attention(num_heads=4, num_kv_heads=2, rope=rope)
    model = alive(tiny.full_model(attention=attention))

    (tokens,) = generated_batches(model, Gptq(sequences=40, seq_len=16, temperature=1e-6), ALONE)

    with torch.no_grad():
        likeliest = model.logits(model.hidden(tokens)).argmax(dim=-1)
    assert torch.equal(tokens[:, 1:], likeliest[:, :-1])


def test_text_is_drawn_with_the_models_own_chances_at_the_temperature():
    model = alive(tiny.bare_model(vocab_size=4))
    spec = Gptq(sequences=3000, seq_len=2, temperature=0.7)

    drawn = torch.cat(list(generated_batches(model, spec, ALONE)))

    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).view(4, 4)
    with torch.no_grad():
        chances = (model.logits(model.hidden(torch.arange(4)[:, None]))[:, 0] / 0.7).softmax(-1)
    first = counts.sum(dim=1)
    assert bool(((first - 750).abs() < 4 * 750**0.5).all())
    spread = (chances * (1 - chances) / first[:, None]).sqrt()
    assert bool(((counts / first[:, None] - chances).abs() < 4 * spread + 1e-3).all())


def test_drawn_text_follows_from_the_seed_and_from_nothing_else(monkeypatch):
    model, spec = alive(tiny.bare_model()), Gptq(sequences=5, seq_len=9)

    alone = torch.cat(list(generated_batches(model, spec, ALONE)))
    other = torch.cat(list(generated_batches(model, replace(spec, seed=1), ALONE)))
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 18)
    shares = [
        batch for rank in range(2) for batch in generated_batches(model, spec, Ranks(rank, 2))
    ]

    assert torch.equal(torch.cat(shares), alone)
    assert not torch.equal(other, alone)
    assert len(alone.unique(dim=0)) == 5

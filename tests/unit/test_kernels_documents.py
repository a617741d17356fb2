"""Documents kept apart in training: each is learnt from as if it were alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.models import assert_same_banks
from tests.tiny import full_model
from trainer.codec import dump, parse
from trainer.errors import UsageError
from trainer.kernels.attention import attend_masked
from trainer.kernels.chosen import kernels_of
from trainer.kernels.documents import SPARE, attend_within, document_mask, document_starts
from trainer.kernels.varlen import Package, within_by
from trainer.model.build import build
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.specs.documents import Documents
from trainer.specs.kernels import AttentionKernel
from trainer.specs.model import Attention, QGain, Rope, SharedKv, ValueEmbedding, Xsa
from trainer.specs.task import train_task
from trainer.specs.train import TrainSpec
from trainer.train import loop

CPU, BOS = torch.device("cpu"), 1
APART = Documents(bos=BOS)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, q_gain=QGain(), xsa=Xsa(last=2))
MODELS = {
    "full": full_model(),
    "edited": full_model(
        attention=replace(ATTENTION, rope=Rope(dims=4), shared_kv=SharedKv()),
        num_layers=4,
        value_embedding=ValueEmbedding(dim=8, last=2),
    ),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(*lengths, seed=3):
    """Two rows of documents of these lengths, each opened by BOS."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, 64, (2, sum(lengths)), generator=generator)
    rows[:, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = BOS
    return rows


def model_of(spec, *, documents=APART, fused=False):
    kernels = kernels_of(None, CPU, "float32", "train.attention", fused=fused, documents=documents)
    model = build(spec, seed=5, kernels=kernels)
    for parameter in model.parameters():  # what starts at zero would hide what reaches it
        parameter.data += 0.02 * draw(*parameter.shape, seed=parameter.numel())
    return model


def gradients(model, losses):
    model.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_each_document_is_learnt_from_as_if_it_were_alone(name, fused):
    lengths, tokens = (5, 1, 9, 2), text(5, 1, 9, 2)
    targets = text(17, seed=4)
    model = model_of(MODELS[name], fused=fused)

    losses = model(tokens, targets)
    grads = gradients(model, losses)

    pairs = zip(tokens.split(lengths, dim=1), targets.split(lengths, dim=1), strict=True)
    alone = torch.cat([model(*pair) for pair in pairs], dim=1)
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-5)
    for path, grad in gradients(model, alone).items():
        torch.testing.assert_close(grads[path], grad, rtol=1e-3, atol=1e-4, msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_another_earlier_document_changes_nothing_in_a_later_one(name):
    model, tokens, targets = model_of(MODELS[name]), text(6, 8), text(14, seed=4)
    other = torch.cat((text(6, seed=9), tokens[:, 6:]), dim=1)

    losses, others = (model(each, targets) for each in (tokens, other))

    assert torch.equal(losses[:, 6:], others[:, 6:])
    assert not torch.equal(losses[:, :6], others[:, :6])


def test_a_row_without_a_boundary_inside_is_the_plain_one():
    tokens, targets = text(14), text(14, seed=4)

    apart, plain = (
        model_of(full_model(), documents=documents)(tokens, targets) for documents in (APART, None)
    )

    torch.testing.assert_close(apart, plain, rtol=1e-5, atol=1e-5)


def test_a_model_reads_across_documents_when_it_is_scored():
    tokens, targets = text(6, 8), text(14, seed=4)

    apart, plain = (
        model_of(full_model(), documents=documents).eval()(tokens, targets)
        for documents in (APART, None)
    )

    assert torch.equal(apart, plain)


def test_the_last_positions_alone_keep_documents_apart_too():
    model, tokens = model_of(full_model()), text(6, 8)

    assert torch.equal(model.hidden(tokens, last=3), model.hidden(tokens)[:, -3:])


TOKENS = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


def slow_starts(rows):
    """Position by position: a document begins with its row or with BOS."""
    width = len(rows[0])
    return [
        r * width + t
        for r, row in enumerate(rows)
        for t, token in enumerate(row)
        if t == 0 or token == BOS
    ]


@given(rows=TOKENS)
def test_documents_start_with_their_row_or_with_bos(rows):
    starts, count = document_starts(torch.tensor(rows), BOS)

    expected, total = slow_starts(rows), len(rows) * len(rows[0])
    assert starts.dtype == torch.int32
    assert int(count) == len(expected)
    assert starts.tolist() == expected + [total] * (total + SPARE - len(expected))


@given(rows=TOKENS)
def test_a_position_sees_its_own_document_up_to_itself(rows):
    mask = document_mask(torch.tensor(rows), BOS)[:, 0].tolist()

    for row, seen in zip(rows, mask, strict=True):
        for t in range(len(row)):
            first = max((i for i in range(t + 1) if row[i] == BOS), default=0)
            assert [s for s, sees in enumerate(seen[t]) if sees] == list(range(first, t + 1))


def probabilities(q, k, scale):
    """P [H, n, n] of one document, and its scores' log-sum-exp [H, n]."""
    scores = scale * torch.einsum("thd,shd->hts", q, k)
    scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp(), lse


def slow_forward(q, k, v, ends, longest):
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    group, bounds = q.shape[1] // k.shape[1], ends.tolist()
    assert bounds[-1] == len(q)
    for a, b in pairwise(bounds):
        assert b - a <= longest
        keys, values = (x[a:b].repeat_interleave(group, dim=1) for x in (k, v))
        p, lse[:, a:b] = probabilities(q[a:b], keys, q.shape[-1] ** -0.5)
        out[a:b] = torch.einsum("hts,shd->thd", p, values)
    return out, lse


def slow_backward(grad, q, k, v, out, lse, ends, longest):
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    group, scale, bounds = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, ends.tolist()
    for a, b in pairwise(bounds):
        keys, values = (x[a:b].repeat_interleave(group, dim=1) for x in (k, v))
        p = probabilities(q[a:b], keys, scale)[0]
        dp = torch.einsum("thd,shd->hts", grad[a:b], values)
        ds = scale * p * (dp - (grad[a:b] * out[a:b]).sum(-1).T[..., None])
        dq[a:b] = torch.einsum("hts,shd->thd", ds, keys)
        dk[a:b] = torch.einsum("hts,thd->shd", ds, q[a:b]).unflatten(1, (-1, group)).sum(2)
        dv[a:b] = torch.einsum("hts,thd->shd", p, grad[a:b]).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


SLOW = Package("slow", slow_forward, slow_backward)
PADDED = Package("slow_padded", slow_forward, slow_backward, least=SPARE)


def attended(within, tokens, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = within(tokens)(*inputs)
    (out * draw(*out.shape, seed=8)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("package", [SLOW, PADDED], ids=["as many", "at least"])
def test_a_package_of_kernels_attends_as_the_mask_does(package):
    tokens = text(5, 1, 9, 2)
    inputs = draw(2, 17, 4, 8, seed=1), draw(2, 17, 2, 8, seed=2), draw(2, 17, 2, 8, seed=3)

    found = attended(within_by(package, BOS), tokens, *inputs)

    expected = attended(lambda tokens: attend_within(tokens, BOS), tokens, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_is_built_once_whatever_the_number_of_documents():
    model, plain = (model_of(full_model()) for _ in range(2))
    model.within = within_by(SLOW, BOS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    targets = text(16, seed=4)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((16,), (3, 13), (1,) * 16, (2, 3, 4, 7)):
            tokens = text(*lengths)
            losses, expected = compiled(tokens, targets), plain(tokens, targets)

            torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
            theirs = gradients(plain, expected)
            for path, grad in gradients(model, losses).items():
                torch.testing.assert_close(grad, theirs[path], rtol=1e-3, atol=1e-4, msg=path)


def test_a_mask_with_every_pair_is_full_attention():
    q, k, v = draw(2, 5, 4, 8, seed=1), draw(2, 5, 2, 8, seed=2), draw(2, 5, 2, 8, seed=3)
    every = torch.ones(5, 5, dtype=torch.bool)

    order = torch.tensor([3, 1, 4, 0, 2])

    torch.testing.assert_close(
        attend_masked(every, q, k, v), attend_masked(every, q, k[:, order], v[:, order])
    )


def spec_of(**values):
    return {"iterations": 1, "batch_tokens": 8, "seq_len": 8, **values}


def test_a_spec_with_documents_reads_back_as_it_was_written():
    spec = parse(TrainSpec, spec_of(schedule={"warmdown_iters": 0}, documents={"bos": 2}), "t")

    assert spec.documents == Documents(bos=2)
    assert parse(TrainSpec, dump(spec), "t") == spec
    assert "documents" not in dump(replace(spec, documents=None))


@pytest.mark.parametrize("field", ["name", "substitute"])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_a_kernel_that_cannot_keep_documents_apart_is_refused_beside_them(name, field):
    kernel = {"name": "flash_attn_4"} | {field: name}
    given = spec_of(attention=kernel, dtype="bfloat16", schedule={"warmdown_iters": 0})

    with pytest.raises(UsageError, match=rf"attention\.{field}={name} .*beside documents use fl"):
        parse(TrainSpec, given | {"documents": {}}, "t")
    parse(TrainSpec, given, "t")


def test_a_back_end_that_cannot_is_refused_where_it_is_chosen(monkeypatch):
    monkeypatch.setattr("trainer.kernels.attention.lacking", lambda *given: None)
    given = AttentionKernel(name="cudnn"), CPU, "bfloat16", "train.attention"

    with pytest.raises(UsageError, match=r"train\.documents: cudnn .*set train\.attention\.name"):
        kernels_of(*given, documents=Documents())
    assert kernels_of(*given).within is None


def test_a_bos_that_is_no_token_is_refused():
    with pytest.raises(ValueError, match=r"train\.documents\.bos=320 is no token"):
        train_task(tiny.recipe({"train.documents": {"bos": 320}}))


def test_a_training_with_documents_apart_is_another_one_and_resumes_to_the_same_bits(
    tiny_dataset, tmp_path, monkeypatch
):
    apart = train_task(tiny.recipe({"train.documents": {}, "observe.checkpoint_every": 3}))
    plain = train_task(tiny.recipe({"observe.checkpoint_every": 3}))
    for name, task in (("apart", apart), ("plain", plain)):
        train(task, tiny_dataset, tmp_path / name, Ranks())
    with pytest.raises(AssertionError, match="raw"):
        assert_same_banks(tmp_path / "apart", tmp_path / "plain")

    _die_once(monkeypatch, after=7)
    with pytest.raises(InterruptedError):
        train(apart, tiny_dataset, tmp_path / "killed", Ranks())
    assert (tmp_path / "killed" / "checkpoint").exists()
    result = train(apart, tiny_dataset, tmp_path / "killed", Ranks())

    assert 0 < result.steps_computed < result.steps == 12
    assert_same_banks(tmp_path / "apart", tmp_path / "killed")


def _die_once(monkeypatch, after):
    step, left = loop.StepRunner.step, [after]

    def dying(self, *given):
        left[0] -= 1
        if left[0] == 0:
            raise InterruptedError
        return step(self, *given)

    monkeypatch.setattr(loop.StepRunner, "step", dying)

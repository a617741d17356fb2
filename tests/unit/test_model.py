import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import tiny
from tests.models import off_its_start
from tests.reference import attention_reference as plain
from trainer.blueprint import blueprint
from trainer.errors import UsageError
from trainer.kernels.attention import attend
from trainer.model.attention import Xsa
from trainer.model.build import build, load_state
from trainer.model.gpt import GPT
from trainer.model.head import Softcap
from trainer.model.linear import norm
from trainer.model.mlp import LeakyRelu2, Relu2, ReluPower
from trainer.model.roles import roles_of
from trainer.model.rotary import Rotary, ntk_base, rotate
from trainer.model.stem import BIGRAM, TRIGRAM, buckets
from trainer.specs import model as specs

FULL, BARE, RICH = tiny.full_model(), tiny.bare_model(), tiny.rich_model()


def attention(**changes):
    return replace(RICH.attention, **changes)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(spec, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(spec.vocab_size, shape, generator=generator)


def awake(spec, seed=0):
    """Build a model whose every parameter matters: at init the output projections are zero."""
    return off_its_start(build(spec, seed=seed), seed=seed, scale=0.3)


def logits_of(model, tokens):
    with torch.no_grad():
        return model.logits(model.hidden(tokens))


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        replace(FULL, num_layers=4),
        replace(FULL, num_layers=5),
        replace(FULL, num_layers=1, unet=None),
        BARE,
        replace(BARE, unet=specs.UNetSkips(), num_layers=6),
        RICH,
        replace(RICH, smear=specs.SmearV1(init=0.4), recurrence=None),
        replace(RICH, smear=specs.SmearV1(init=-3.0, before_norm=True), head=None),
        replace(RICH, attention=attention(shared_kv=specs.SharedKv(last=2), xsa=specs.Xsa())),
        replace(
            RICH, recurrence=specs.Recurrence(first=0, last=3, passes=3), ln_scale=specs.LnScale()
        ),
        replace(BARE, mlp=specs.Mlp(mult=2.0, activation=specs.ReluPower(power=3.0))),
    ],
    ids=[
        "odd",
        "even",
        "two skips",
        "one layer",
        "bare",
        "only skips",
        "every part",
        "smear v1",
        "smear before the norm",
        "some layers share keys",
        "all layers again",
        "relu cubed",
    ],
)
def test_the_forward_is_the_plain_twins(spec):
    model = awake(spec).double()
    tokens = tokens_of(spec, 2, 9)

    found = logits_of(model, tokens)

    eps = torch.finfo(torch.float64).eps
    for row, expected_of in zip(found, tokens.tolist(), strict=True):
        expected = plain.gpt_logits(model.state_dict(), spec, expected_of, eps)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [FULL, BARE, RICH], ids=["full", "bare", "rich"])
@pytest.mark.parametrize("t", [1, 6, 11])
def test_a_changed_token_leaves_every_earlier_loss_bit_identical(spec, t):
    model, tokens, targets = awake(spec), tokens_of(spec, 3, 12), tokens_of(spec, 3, 12, seed=2)
    model.eval()
    changed = tokens.clone()
    changed[:, t] = (tokens[:, t] + 1) % spec.vocab_size

    before, after = (model(rows, targets) for rows in (tokens, changed))

    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


def test_a_row_is_scored_without_its_neighbours():
    model, tokens, targets = awake(FULL), tokens_of(FULL, 4, 8), tokens_of(FULL, 4, 8, seed=2)

    together, alone = model(tokens, targets)[2:3], model(tokens[2:3], targets[2:3])

    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("num_scored", [1, 3, 10])
def test_the_loss_of_the_last_targets_is_the_tail_of_the_full_loss(num_scored):
    model, tokens, targets = awake(FULL), tokens_of(FULL, 2, 10), tokens_of(FULL, 2, 10, seed=2)

    tail = model(tokens, targets[:, -num_scored:])

    torch.testing.assert_close(tail, model(tokens, targets)[:, -num_scored:])


def test_probabilities_of_all_tokens_sum_to_one():
    model, tokens = awake(FULL), tokens_of(FULL, 1, 6)

    total = torch.zeros(1, 6)
    for token in range(FULL.vocab_size):
        total += torch.exp(-model(tokens, torch.full((1, 6), token)))

    torch.testing.assert_close(total, torch.ones(1, 6))


@pytest.mark.parametrize(
    "part",
    [
        {"residual_scale": specs.ResidualScale()},
        {"x0_mix": specs.X0Mix()},
        {"attention": replace(BARE.attention, q_gain=specs.QGain(init=1.0))},
        {"bigram": specs.HashEmbedding(num_buckets=9, dim=4)},
        {"trigram": specs.HashEmbedding(num_buckets=9, dim=4)},
        {"smear": specs.SmearV2(width=4)},
    ],
    ids=["residual scale", "x0 mix", "q gain of 1", "bigram", "trigram", "smear v2"],
)
def test_a_part_that_claims_so_changes_nothing_at_init(part):
    without, tokens = awake(BARE), tokens_of(BARE, 2, 8)
    model = build(replace(BARE, **part), seed=7)

    model.load_state_dict(without.state_dict(), strict=False)

    assert torch.equal(logits_of(model, tokens), logits_of(without, tokens))


@pytest.mark.parametrize("name", dict(build(RICH).named_parameters()))
def test_every_parameter_reaches_the_loss(name):
    model, tokens = awake(RICH), tokens_of(RICH, 2, 8)
    before = model(tokens, tokens)

    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)

    assert not torch.equal(model(tokens, tokens), before)


def test_an_absent_part_has_no_parameter():
    names = {name for name, _ in GPT(blueprint(BARE)).named_parameters()}

    assert names == {"embedding.weight"} | {
        f"blocks.{layer}.{matrix}.weight"
        for layer in range(2)
        for matrix in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.out",
            "mlp.up",
            "mlp.down",
        )
    }


def test_a_parameter_without_a_declared_role_is_refused_by_name():
    model = build(BARE)
    model.blocks[1].extra = nn.Linear(3, 2, bias=False)

    with pytest.raises(UsageError, match=r"^blocks\.1\.extra\.weight \(2, 3\): declare its role"):
        roles_of(model)


def test_the_norm_gives_unit_mean_square():
    mean_square = norm(100 * draw(5, 32)).square().mean(dim=-1)

    torch.testing.assert_close(mean_square, torch.ones(5))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_is_the_plain_twins(num_heads, num_kv_heads):
    q = draw(1, 7, num_heads, 8, seed=0)
    k, v = (draw(1, 7, num_kv_heads, 8, seed=seed) for seed in (1, 2))

    out = attend(q, k, v)[0]

    torch.testing.assert_close(out, plain.attention(q[0], k[0], v[0]))


def test_grouped_heads_equal_repeated_keys_and_values():
    q, k, v = draw(2, 9, 6, 8), draw(2, 9, 2, 8, seed=1), draw(2, 9, 2, 8, seed=2)

    repeated = attend(q, k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2))

    torch.testing.assert_close(attend(q, k, v), repeated)


def test_partial_rope_leaves_the_other_dimensions():
    x = draw(2, 5, 3, 16)

    turned = rotate(x, Rotary(4, 10_000.0)(5, x.device))

    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.isclose(turned[:, 1:, :, :4], x[:, 1:, :, :4]).all(dim=-1).any()


def test_rope_makes_scores_depend_on_distance_only():
    rope = Rotary(16, 100.0)(12, torch.device("cpu"))
    q, k = (draw(1, 1, 1, 16, seed=seed).expand(1, 12, 1, 16) for seed in (0, 1))

    scores = rotate(q, rope)[0, :, 0] @ rotate(k, rope)[0, :, 0].T

    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.isclose(scores[0, 0], scores[0, 5])


def test_the_ntk_rule_raises_the_base_beyond_the_reference_only():
    assert ntk_base(10_000.0, 2048, 1024, 16) == pytest.approx(22_081.79, abs=0.01)
    assert ntk_base(10_000.0, 1024, 1024, 16) == 10_000.0
    assert ntk_base(10_000.0, 2048, None, 16) == 10_000.0


def test_hashed_buckets_are_the_published_ones():
    tokens = torch.tensor([[1, 5, 7, 1023]])

    assert buckets(tokens, BIGRAM, 2048).tolist() == [[2047, 1887, 1082, 53]]
    assert buckets(tokens, TRIGRAM, 10240).tolist() == [[10239, 10239, 3199, 7441]]


@pytest.mark.parametrize("multipliers", [BIGRAM, TRIGRAM])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 50])
def test_buckets_are_the_plain_twins_at_every_length(multipliers, num_tokens):
    tokens = torch.randint(8192, (3, num_tokens), generator=torch.Generator().manual_seed(0))

    found = buckets(tokens, multipliers, 12288)

    assert found.tolist() == [plain.buckets(row, multipliers, 12288) for row in tokens.tolist()]


def test_exclusive_attention_leaves_nothing_along_the_tokens_own_value():
    y, v = draw(2, 5, 6, 8), draw(2, 5, 3, 8, seed=1)

    out = Xsa()(y, v)

    along = (out.unflatten(2, (3, 2)) * v.unsqueeze(3)).sum(dim=-1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-5, rtol=0)
    for row in range(2):
        torch.testing.assert_close(out[row], plain.without_own_value(y[row], v[row]))


def test_layers_that_share_keys_and_values_hold_them_once():
    spec = replace(
        BARE, num_layers=4, attention=replace(BARE.attention, shared_kv=specs.SharedKv())
    )
    model = build(spec, seed=0)

    keys = {name for name in model.state_dict() if ".key." in name or ".value." in name}

    assert keys == {"blocks.0.attention.key.weight", "blocks.0.attention.value.weight"}
    assert model.blocks[3].attention.key_value[0] is model.blocks[0].attention.key


def test_shared_keys_gather_the_gradients_of_all_their_layers():
    spec = replace(
        BARE, num_layers=2, attention=replace(BARE.attention, shared_kv=specs.SharedKv())
    )
    shared = awake(spec)
    apart = build(replace(spec, attention=BARE.attention))
    state = shared.state_dict()
    for name in ("key", "value"):
        weight = state[f"blocks.0.attention.{name}.weight"]
        state[f"blocks.1.attention.{name}.weight"] = weight.clone()
    apart.load_state_dict(state)
    tokens = tokens_of(spec, 2, 8)

    for model in (shared, apart):
        model(tokens, tokens).mean().backward()

    keys = [block.attention.key.weight.grad for block in apart.blocks]
    torch.testing.assert_close(shared.blocks[0].attention.key.weight.grad, keys[0] + keys[1])


def test_a_smear_that_knows_documents_does_not_look_across_their_start():
    model = awake(replace(BARE, smear=specs.SmearV2(width=6, bos=1)))
    tokens = torch.tensor([[3, 4, 1, 5], [3, 9, 1, 5]])

    with torch.no_grad():
        smeared = model.smear(model.embedding(tokens), tokens)

    assert not torch.equal(smeared[0, 1], model.embedding(tokens)[0, 1])
    assert torch.equal(smeared[:, 2], model.embedding(tokens)[:, 2])


def test_further_heads_raise_the_training_loss_by_what_they_mispredict():
    spec = replace(BARE, mtp=specs.Mtp(num_heads=2, loss_weight=0.5))
    model = awake(spec)
    tokens, targets = tokens_of(spec, 2, 8), tokens_of(spec, 2, 8, seed=2)

    training, scoring = model(tokens, targets).mean(), model.eval()(tokens, targets)

    hidden = model.hidden(tokens)
    extra = []
    for k, head in enumerate(model.mtp.heads):
        logits = (hidden[:, : -1 - k] @ head.weight.T).flatten(0, 1)
        extra.append(nn.functional.cross_entropy(logits, targets[:, k + 1 :].flatten()))
    torch.testing.assert_close(training, scoring.mean() + 0.5 * (extra[0] + extra[1]) / 2)


def test_an_exported_model_has_no_further_heads():
    names = {name for name, _ in GPT(blueprint(RICH.exported())).named_parameters()}

    assert names == {n for n, _ in GPT(blueprint(RICH)).named_parameters() if "mtp" not in n}


def test_skip_gates_start_as_half_stream_half_skip():
    model = build(replace(RICH, ortho_init=None), seed=0)
    x, skip = draw(1, 3, 32), draw(1, 3, 32, seed=1)

    torch.testing.assert_close(model.skips(x, skip, 0), (x + skip) / 2)


def test_softcap_bounds_logits_and_spares_small_ones():
    capped = Softcap(30.0)(torch.tensor([-1e6, -0.1, 0.0, 0.1, 20.0, 1e6]))

    expected = [-30.0, -0.1, 0.0, 0.1, 30 * math.tanh(2 / 3), 30.0]
    torch.testing.assert_close(capped, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_a_models_logits_stay_under_its_cap():
    model = awake(replace(FULL, softcap=specs.Softcap(cap=2.0)))

    assert logits_of(model, tokens_of(FULL, 2, 8)).abs().max() <= 2.0


def test_the_activations_square_what_they_pass():
    x = torch.tensor([-2.0, -1.0, 0.0, 3.0])

    leaky = LeakyRelu2(specs.LeakyRelu2(slope=0.5))(x)
    plain_relu = Relu2(specs.Relu2())(x)
    cubed = ReluPower(specs.ReluPower(power=3.0))(x)

    assert cubed.tolist() == [0.0, 0.0, 0.0, 27.0]
    assert leaky.tolist() == [1.0, 0.25, 0.0, 9.0]
    assert plain_relu.tolist() == [0.0, 0.0, 0.0, 9.0]


def test_output_projections_start_at_zero_and_the_others_do_not():
    model = build(BARE, seed=0)

    zero = {name for name, p in model.named_parameters() if not p.any()}

    assert zero == {
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention.out", "mlp.down")
    }


def test_orthogonal_init_has_unit_singular_values():
    model = build(replace(BARE, ortho_init=specs.OrthoInit()), seed=0)

    for matrix in (model.blocks[0].mlp.up.weight, model.blocks[1].attention.key.weight):
        singular = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(singular, torch.ones_like(singular))


def test_projections_that_end_a_branch_start_smaller_by_the_root_of_twice_the_depth():
    model = build(RICH, seed=0)

    for projection in (model.bigram.projection, model.value_embedding.projection):
        singular = torch.linalg.svdvals(projection.weight)
        torch.testing.assert_close(singular, torch.full_like(singular, 8**-0.5))


def test_scaled_outputs_start_orthogonal_instead_of_zero():
    model = build(replace(BARE, ortho_init=specs.OrthoInit(scaled_outputs=True)), seed=0)

    for weight in (model.blocks[0].attention.out.weight, model.blocks[1].mlp.down.weight):
        singular = torch.linalg.svdvals(weight)
        torch.testing.assert_close(singular, torch.full_like(singular, 4**-0.5))


def test_plain_init_is_uniform_within_the_inverse_root_of_the_inputs():
    weight = build(BARE, seed=0).blocks[0].mlp.up.weight

    assert 0.95 * 32**-0.5 < weight.abs().max() <= 32**-0.5


def test_an_untied_head_starts_at_zero():
    assert not build(RICH, seed=0).head.output.weight.any()


def test_the_value_embedding_has_the_deviation_it_was_told():
    values = replace(RICH.value_embedding, dim=64, init_std=0.01)

    table = build(replace(RICH, value_embedding=values), seed=0).value_embedding.table.weight

    assert float(table.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_the_dtg_gate_sends_no_gradient_back_to_what_it_looks_at():
    gate = build(RICH, seed=0).blocks[0].dtg
    with torch.no_grad():
        gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    y, entry = draw(1, 4, 32), draw(1, 4, 32, seed=1).requires_grad_()

    gate(y, entry).sum().backward()

    share = torch.sigmoid(entry.detach() @ gate.weight + gate.bias).detach()
    torch.testing.assert_close(entry.grad, (1 - share).unsqueeze(-1).expand(1, 4, 32))


def test_the_embedding_has_the_deviation_it_was_told():
    spec = replace(BARE, vocab_size=500, embedding=specs.Embedding(init_std=0.25))

    weight = build(spec, seed=0).embedding.weight.detach()

    assert float(weight.std()) == pytest.approx(0.25, rel=0.05)


def test_a_seed_fixes_every_bit_of_the_init():
    one, again, other = (build(FULL, seed=seed).state_dict() for seed in (3, 3, 4))

    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_a_further_part_leaves_the_init_of_the_others():
    rich = build(replace(RICH, ortho_init=None), seed=3).state_dict()
    bare = replace(BARE, num_layers=4, attention=RICH.attention, mlp=RICH.mlp)
    state = build(bare, seed=3).state_dict()

    assert all(torch.equal(rich[name], state[name]) for name in state)


def test_bfloat16_keeps_float32_masters_of_all_but_the_tables():
    model = build(RICH, seed=0, dtype="bfloat16")
    tokens = tokens_of(RICH, 2, 6)

    dtypes = {name: p.dtype for name, p in model.named_parameters()}

    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {
        "embedding.weight",
        "bigram.table.weight",
        "trigram.table.weight",
        "value_embedding.table.weight",
    }
    assert model.hidden(tokens).dtype == torch.bfloat16
    assert model(tokens, tokens).dtype == torch.float32


def test_loading_a_float32_state_casts_it_to_the_models_dtypes():
    state = {name: tensor.clone() for name, tensor in awake(FULL).state_dict().items()}
    model = build(FULL, dtype="bfloat16")

    load_state(model, state)

    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], state[name].to(loaded[name].dtype)) for name in state)
    assert loaded["embedding.weight"].dtype == torch.bfloat16


def test_every_part_compiles_into_one_graph_that_gives_the_same_losses():
    model, tokens = awake(RICH), tokens_of(RICH, 2, 8)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))

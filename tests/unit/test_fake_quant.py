import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests import tiny
from tests.reference.quantize_reference import half, quantize_row
from trainer.errors import UsageError
from trainer.model.build import build
from trainer.model.fake_quant import FakeQuant, FakeQuants
from trainer.quant import dequantize_rows, levels, quantize_rows, row_scale
from trainer.sizes import tensor_sizes
from trainer.specs.train import Late, Qat

ALL = Qat(mlp_bits=5, attention_bits=6, other_bits=4)
LATE = Qat(mlp_bits=5, attention_bits=6, other_bits=4, start=Late(lr_scale=0.15))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(strength, bits=6, **changes):
    return FakeQuant(bits, Qat(**({"mlp_bits": bits} | changes)), torch.tensor(strength))


def batch(seed=0):
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def awake(spec):
    """Build a model and move it off its zeros, so that every matrix bears on the loss."""
    model = build(spec, seed=0)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.1 * draw(*parameter.shape, seed=i)
    return model


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_at_full_strength_a_weight_is_what_would_be_written(bits):
    weight = draw(7, 33)

    found = quantizer(1.0, bits)(weight)

    scale = row_scale(weight.abs().amax(dim=1), bits, 1e-12)
    assert torch.equal(found, dequantize_rows(quantize_rows(weight, scale, bits), scale))


def test_the_grid_of_a_tensor_is_that_of_its_largest_weight():
    weight = draw(3, 5)
    scale = half(float(weight.abs().max()) / levels(4))

    found = quantizer(1.0, 4, scale="tensor")(weight)

    twin = [[q * scale for q in quantize_row(row, torch.tensor(scale), -7, 7)] for row in weight]
    torch.testing.assert_close(found, torch.tensor(twin), rtol=1e-6, atol=0)
    assert not torch.equal(found, quantizer(1.0, 4)(weight))


def test_the_scale_has_a_floor():
    weight = draw(3, 5).clamp(-1, 1) / 63  # every weight is below half a step of 1/31

    assert not quantizer(1.0, scale_floor=1 / 31)(weight).any()


def test_the_rounding_of_a_scale_is_that_of_a_cast_for_every_float16():
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    ties = (halves[1:] + halves[:-1]) / 2
    above, below = (torch.nextafter(ties, torch.tensor(end)) for end in (float("inf"), 0.0))
    values = torch.cat([halves, ties, above, below])

    assert torch.equal(row_scale(values, 2, 1e-12), values.half())  # 2 bits: R is 1


def test_at_no_strength_and_outside_training_a_weight_is_itself():
    weight, scored = draw(4, 8), quantizer(1.0).eval()

    assert torch.equal(quantizer(0.0)(weight), weight)
    assert scored(weight) is weight


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_gradient_of_the_rounded_weight_is_given_to_the_weight(strength):
    weight, x = draw(6, 8).requires_grad_(), draw(5, 8, seed=1)
    module = quantizer(strength)

    (x @ module(weight).T).square().sum().backward()

    twin = module(weight).detach().requires_grad_()
    (x @ twin.T).square().sum().backward()
    assert torch.equal(weight.grad, twin.grad)


@pytest.mark.parametrize("spec", [tiny.rich_model(), tiny.bare_model()], ids=["rich", "bare"])
def test_every_matrix_gets_the_bits_of_its_class(spec):
    model = build(spec, seed=0)

    FakeQuants(model, ALL)

    found = {
        f"{path.removesuffix('.weight_edit')}.weight": module.bits
        for path, module in model.named_modules()
        if isinstance(module, FakeQuant)
    }
    tables = {name for name, m in model.named_modules() if type(m).__name__ == "Embedding"}
    expected = {
        size.name: {"mlp": 5, "attention": 6}.get(size.part, 4)
        for size in tensor_sizes(model.plan)
        if size.role in ("matrix", "head") and size.name.removesuffix(".weight") not in tables
    }
    assert found == expected


def test_a_class_without_bits_is_left_alone():
    model = build(tiny.rich_model(), seed=0)

    FakeQuants(model, Qat(mlp_bits=4))

    kinds = {type(module.weight_edit) for module in (model.blocks[0].attention.query,
                                                     model.bigram.projection,
                                                     model.head.output)}  # fmt: skip
    assert kinds == {nn.Identity}
    assert isinstance(model.blocks[0].mlp.up.weight_edit, FakeQuant)


def test_bits_for_matrices_that_the_model_lacks_are_refused():
    with pytest.raises(UsageError, match=r"^train\.qat\.other_bits=6 alone reaches no matrix"):
        FakeQuants(build(tiny.bare_model(), seed=0), Qat(other_bits=6))


def test_without_a_start_it_acts_from_the_first_step():
    model = awake(tiny.rich_model())

    quants = FakeQuants(model, ALL)

    assert (quants.start_step, quants.share_on_grid()) == (0, 1.0)


@pytest.mark.parametrize("spec", [tiny.rich_model(), tiny.full_model()], ids=["rich", "full"])
def test_turning_on_puts_every_weight_on_the_grid_and_changes_the_loss(spec):
    model = awake(spec)
    plain = model(*batch()).detach()
    quants = FakeQuants(model, LATE)
    off, share_off = model(*batch()).detach(), quants.share_on_grid()

    quants.turn_on(7)

    assert torch.equal(off, plain)
    assert share_off < 0.5
    assert (quants.start_step, quants.share_on_grid()) == (7, 1.0)
    assert not torch.equal(model(*batch()), off)


def test_a_score_is_that_of_the_plain_weights():
    model = awake(tiny.rich_model()).eval()
    plain = model(*batch()).detach()

    FakeQuants(model.train(), ALL)

    assert torch.equal(model.eval()(*batch()), plain)


def test_a_state_holds_no_trace_of_it():
    model = build(tiny.rich_model(), seed=0)
    names = list(model.state_dict())

    FakeQuants(model, ALL)

    assert list(model.state_dict()) == names


def test_the_gradients_are_those_of_a_model_that_holds_the_rounded_weights():
    model, twin = awake(tiny.rich_model()), awake(tiny.rich_model())
    FakeQuants(model, ALL)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, FakeQuant):
                linear = twin.get_submodule(path.removesuffix(".weight_edit"))
                linear.weight.copy_(module(linear.weight))

    losses = [net(*batch()).mean() for net in (model, twin)]
    for loss in losses:
        loss.backward()

    assert torch.equal(*losses)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_a_restored_switch_is_where_it_was():
    model = awake(tiny.full_model())
    quants = FakeQuants(model, LATE)
    off = quants.state_dict()
    quants.turn_on(3)
    on = quants.state_dict()

    quants.load_state_dict(off)
    assert (quants.start_step, float(quants.strength)) == (None, 0.0)

    quants.load_state_dict(on)
    assert (quants.start_step, quants.share_on_grid()) == (3, 1.0)


@pytest.mark.parametrize(
    ("spec", "backend"),
    [(tiny.rich_model(), "eager"), (tiny.bare_model(), "aot_eager")],
    ids=["rich", "bare"],
)
def test_turning_on_acts_in_the_graph_that_is_compiled_already(spec, backend):
    torch._dynamo.reset()
    model = awake(spec)
    quants = FakeQuants(model, LATE)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    off = compiled(*batch())
    quants.turn_on(1)
    on = compiled(*batch())

    assert counter.frame_count == 1
    assert not torch.equal(on, off)
    torch.testing.assert_close(on, model(*batch()))


# torch's own, when its CPU compiler is first imported
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiler_that_fuses_casts_still_rounds_to_the_grid_that_is_written():
    torch._dynamo.reset()
    module, weight = quantizer(1.0), draw(64, 48)

    compiled = torch.compile(module, fullgraph=True, backend="inductor")(weight)

    assert torch.equal(compiled, module(weight))

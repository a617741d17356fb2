"""The fused MLP: the twin against the model's own, the kernels against the twin."""

import json

import pytest
import torch
from torch.nn import functional as F

from tests.interpreted import interpret, needs_triton
from trainer.kernels.mlp import relu2_mlp
from trainer.model.mlp import LeakyRelu2, Relu2
from trainer.specs import model as specs

SHAPES = [((2, 5, 8), 24), ((7, 3), 5), ((1, 1, 6), 1)]
SLOPES = [0.0, 0.5, -0.3]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def matrices(shape, width, dtype=torch.float64):
    dim = shape[-1]
    sides = shape, (width, dim), (dim, width)
    return [draw(*side, seed=seed, dtype=dtype) for seed, side in enumerate(sides)]


def activation(slope):
    return LeakyRelu2(specs.LeakyRelu2(slope=slope)) if slope else Relu2(specs.Relu2())


def gradients(out, inputs):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
@pytest.mark.parametrize("slope", SLOPES)
def test_it_is_the_mlp_of_the_model(shape, width, slope):
    x, up, down = inputs = matrices(shape, width)

    found = relu2_mlp(x, up, down, slope)

    expected = F.linear(activation(slope)(F.linear(x, up)), down)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("slope", SLOPES)
def test_the_gradients_are_those_of_the_values(slope):
    inputs = matrices((2, 3, 4), 5)

    assert torch.autograd.gradcheck(lambda *given: relu2_mlp(*given, slope), inputs)


def test_an_input_that_lies_apart_and_the_gradient_of_a_mean_are_taken():
    x, up, down = matrices((4, 5, 6), 8)

    relu2_mlp(x.transpose(0, 1), up, down, 0.5).mean().backward()

    apart = x.detach().clone().requires_grad_()
    F.linear(F.leaky_relu(F.linear(apart, up), 0.5).square(), down).mean().backward()
    torch.testing.assert_close(x.grad, apart.grad)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_it_is_compiled_whole(slope):
    def both(x, up, down):
        return relu2_mlp(x.sin(), up, down, slope).square()

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    inputs = matrices((2, 5, 8), 24)

    found, expected = compiled(*inputs), both(*inputs)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


INTERPRETED = """
import contextlib, json, torch
from triton.runtime import interpreter
from trainer.kernels import mlp, mlp_triton
patch = interpreter._patch_lang_tensor
def patch_further(tensor, scope):  # numpy 2.4 takes an array of one number for none
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
interpreter._patch_lang_tensor = patch_further
torch.cuda.device_of = contextlib.nullcontext
far = 0.0
def compare(found, expected):
    global far
    assert found.shape == expected.shape and found.dtype == expected.dtype
    far = max(far, float((found - expected).norm() / expected.norm()))
configurations = mlp_triton._project.configs
for rows, dim, width in ((300, 72, 264), (5, 8, 16)):
    generator = torch.Generator().manual_seed(rows)
    x, dy = torch.randn(2, rows, dim, generator=generator)
    up, down = torch.randn(2, width, dim, generator=generator)
    down = down.T.contiguous()
    for slope in (0.0, 0.5):
        u = x @ up.T
        h = mlp._square(u, slope)
        kept = u if slope else h
        du = mlp._through(dy @ down, kept, slope)
        for one in configurations:
            mlp_triton._project.configs = [one]
            found = mlp_triton.project_up(x, up, slope)
            compare(found[0], h)
            compare(found[1], kept)
            compare(mlp_triton.project_back(dy, down, kept, slope), du)
print(json.dumps(far))
"""


@needs_triton
def test_the_kernels_are_their_twins_when_interpreted():
    assert json.loads(interpret(INTERPRETED)) < 1e-5

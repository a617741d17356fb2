"""The loss of softcapped logits: the twin against the model's own, the kernel against the twin."""

import pytest
import torch

from tests.interpreted import interpret, needs_triton
from trainer.kernels.loss import capped_loss
from trainer.model.head import Softcap
from trainer.model.loss import token_loss

SHAPES = [(2, 3, 8), (1, 5, 13), (3, 1, 100)]
CAPS = [None, 3.0, 30.0]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(shape, generator=generator, dtype=dtype)
    return logits.requires_grad_(), torch.randint(shape[-1], shape[:-1], generator=generator)


def plain(logits, targets, cap):
    return token_loss(logits if cap is None else Softcap(cap)(logits), targets)


def gradient(losses, logits):
    weights = torch.linspace(-1, 1, losses.numel(), dtype=losses.dtype).view_as(losses)
    return torch.autograd.grad((losses * weights).sum(), logits)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cap", CAPS)
def test_it_is_the_softcap_and_the_loss_of_the_model(shape, cap):
    logits, targets = draw(*shape, dtype=torch.float32)

    found, expected = capped_loss(logits, targets, cap), plain(logits, targets, cap)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))


@pytest.mark.parametrize("cap", CAPS)
def test_its_gradient_is_that_of_its_values(cap):
    logits, targets = draw(2, 3, 7)

    assert torch.autograd.gradcheck(lambda x: capped_loss(x, targets, cap), logits)


def test_bfloat16_logits_are_rounded_no_further():
    logits, targets = draw(4, 9, 50, dtype=torch.bfloat16)
    wide = logits.detach().double().requires_grad_()

    found, expected = capped_loss(logits, targets, 3.0), capped_loss(wide, targets, 3.0)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    d_logits = gradient(found, logits)
    assert d_logits.dtype == torch.bfloat16
    torch.testing.assert_close(d_logits.double(), gradient(expected, wide), rtol=4e-3, atol=1e-6)


def test_logits_that_lie_apart_and_the_gradient_of_a_mean_are_taken():
    logits, targets = draw(5, 4, 9)
    turned, targets = logits.transpose(0, 1), targets.T

    capped_loss(turned, targets, 3.0).mean().backward()

    # The model's loss is float32, this one float64 of float64.
    expected = torch.autograd.grad(plain(turned, targets, 3.0).mean(), logits)[0]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)


def test_a_token_without_a_target_is_refused():
    logits, targets = draw(2, 3, 8)

    with pytest.raises(ValueError, match="give a target each"):
        capped_loss(logits, targets[:1], 3.0)


def test_a_target_outside_the_vocabulary_is_refused():
    logits, targets = draw(2, 3, 8)

    with pytest.raises(RuntimeError, match="out of bounds"):
        capped_loss(logits, targets + 8, 3.0)


def test_it_is_compiled_whole():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, targets: capped_loss(x.sin(), targets, 3.0).mean(),
        backend="aot_eager",
        fullgraph=True,
    )
    logits, targets = draw(2, 3, 8)

    found = torch.autograd.grad(compiled(logits, targets), logits)[0]

    whole = capped_loss(logits.sin(), targets, 3.0).mean()
    torch.testing.assert_close(found, torch.autograd.grad(whole, logits)[0])


INTERPRETED = """
import contextlib, torch
from trainer.kernels import loss, loss_triton
torch.cuda.device_of = contextlib.nullcontext
for shape in ((2, 5, 8), (37, 100), (1, 1), (3, 1024), (2, 4100)):
    generator = torch.Generator().manual_seed(shape[-1])
    logits = 4 * torch.randn(shape, generator=generator)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    grad = torch.randn(shape[:-1], generator=generator)
    for cap in (None, 3.0, 30.0):
        expected = loss._forward(logits, targets, cap)
        found = loss_triton.loss_forward(logits, targets, cap)
        given = grad, logits, targets, expected[1], cap
        pairs = *zip(found, expected), (loss_triton.loss_backward(*given), loss._backward(*given))
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
beyond = loss_triton.loss_forward(torch.zeros(2, 5), torch.tensor([5, -1]), 3.0)[0]
assert beyond.isnan().all()
"""


@needs_triton
def test_the_kernels_are_their_twins_when_interpreted():
    interpret(INTERPRETED)

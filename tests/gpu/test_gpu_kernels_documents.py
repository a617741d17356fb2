"""Every back end at hand that keeps documents apart, against the masked plain one in float64."""

import pytest

torch = pytest.importorskip("torch")

from tests.tiny import full_model  # noqa: E402
from trainer.kernels.attention import lacking  # noqa: E402
from trainer.kernels.chosen import kernels_of, within_of  # noqa: E402
from trainer.kernels.documents import attend_within, document_starts  # noqa: E402
from trainer.model.build import build  # noqa: E402
from trainer.specs.documents import Documents  # noqa: E402
from trainer.specs.kernels import APART, AttentionKernel  # noqa: E402
from trainer.specs.model import Attention  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOS = 1
SHAPES = [(2, 1024, 8, 4, 64), (3, 300, 4, 4, 64), (1, 129, 8, 2, 128)]
SHARES = [0.0, 0.004, 0.05, 1.0]
"""Of tokens that open a document: from none inside a row to every one of them."""


@pytest.fixture(params=APART)
def name(request):
    why = lacking(request.param, torch.device("cuda", 0), "bfloat16")
    if why:
        pytest.skip(why)
    return request.param


def text(batch, num_tokens, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 64, (batch, num_tokens), generator=generator)
    opens = torch.rand(batch, num_tokens, generator=generator) < share
    return tokens.masked_fill(opens, BOS).cuda()


def draw(shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def with_gradients(within, tokens, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = within(tokens, *inputs)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def apart(found, expected):
    expected = expected.double().cpu()
    distance = float((found.double().cpu() - expected).norm())
    return distance / max(float(expected.norm()), 1e-3 * expected.numel() ** 0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_back_end_attends_inside_documents_as_the_mask_does(name, is_compiled, shape):
    batch, num_tokens, heads, kv_heads, width = shape
    q = draw((batch, num_tokens, heads, width), 1)
    k, v = (draw((batch, num_tokens, kv_heads, width), seed) for seed in (2, 3))
    within = within_of(name, Documents(bos=BOS), "train.attention")

    def function(tokens, q, k, v):
        return within(tokens)(q, k, v)

    if is_compiled:
        function = torch.compile(function, fullgraph=True, dynamic=False)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share in SHARES:
            tokens = text(batch, num_tokens, share)
            found = with_gradients(function, tokens, q, k, v)

            expected = with_gradients(
                lambda tokens, *inputs: attend_within(tokens, BOS)(*inputs),
                tokens.cpu(),
                *(x.double().cpu() for x in (q, k, v)),
            )
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == torch.bfloat16
                assert apart(ours, theirs) < 2e-2, share


def test_the_starts_are_those_found_on_the_cpu():
    tokens = text(3, 300, 0.05)

    starts, count = document_starts(tokens, BOS)

    expected, expected_count = document_starts(tokens.cpu(), BOS)
    assert starts.is_cuda
    assert not count.is_cuda
    assert torch.equal(starts.cpu(), expected)
    assert torch.equal(count, expected_count)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_compiled_model_is_built_once_whatever_the_number_of_documents(name, fused):
    spec = full_model(dim=256, attention=Attention(num_heads=4, num_kv_heads=2))
    documents, cuda = Documents(bos=BOS), torch.device("cuda", 0)
    chosen = AttentionKernel(name=name)
    kernels = kernels_of(
        chosen, cuda, "bfloat16", "train.attention", fused=fused, documents=documents
    )
    plain = kernels_of(None, cuda, "bfloat16", "train.attention", documents=documents)
    ours, theirs = (
        build(spec, seed=5, dtype="bfloat16", kernels=each).cuda() for each in (kernels, plain)
    )
    for model in (ours, theirs):  # what starts at zero would hide what reaches it
        for i, parameter in enumerate(model.parameters()):
            parameter.data += 0.02 * draw(parameter.shape, i).to(parameter.dtype)
    compiled = torch.compile(ours, fullgraph=True, dynamic=False)
    targets = text(4, 256, 0.0, seed=7)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share in SHARES:
            tokens = text(4, 256, share)
            losses, expected = compiled(tokens, targets), theirs(tokens, targets)
            for model, of in ((ours, losses), (theirs, expected)):
                model.zero_grad()
                of.sum().backward()

            assert apart(losses, expected) < 2e-2, share
            pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
            for (path, found), parameter in pairs:
                if parameter.grad is not None:
                    assert apart(found.grad, parameter.grad) < 1e-1, (path, share)

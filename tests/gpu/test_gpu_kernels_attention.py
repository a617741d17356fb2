"""Every attention back end that this machine has, against the plain one in float64."""

import pytest

torch = pytest.importorskip("torch")

from trainer.kernels.attention import attend, attention_of, lacking  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [(2, 2048, 8, 4, 64), (3, 300, 4, 4, 64), (1, 129, 8, 2, 128)]
NAMES = ["torch", "cudnn", "flash", "flash_attn_4", "flash_attn_3", "flash_attn_2"]


def draw(shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def with_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def apart(found, expected):
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_a_back_end_is_the_plain_attention(name, is_compiled, shape):
    why = lacking(name, torch.device("cuda", 0), "bfloat16")
    if why:
        pytest.skip(why)
    batch, num_tokens, heads, kv_heads, width = shape
    q = draw((batch, num_tokens, heads, width), 1)
    k, v = (draw((batch, num_tokens, kv_heads, width), seed) for seed in (2, 3))
    function = attention_of(name)
    if is_compiled:
        function = torch.compile(function, fullgraph=True, dynamic=False)

    found = with_gradients(function, q, k, v)

    expected = with_gradients(attend, *(x.double().cpu() for x in (q, k, v)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert apart(ours, theirs) < 2e-2

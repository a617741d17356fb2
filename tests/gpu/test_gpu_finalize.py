"""Finals on a CUDA device: the same integers as on the CPU, but for the last bit of a sum."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

from tests import tiny  # noqa: E402
from trainer.blueprint import blueprint  # noqa: E402
from trainer.finalize.artifact import read_weights  # noqa: E402
from trainer.finalize.gptq import (  # noqa: E402
    factorize,
    round_rows,
    row_errors,
    walk_block,
    walk_on,
)
from trainer.finalize.hessians import collect_hessians  # noqa: E402
from trainer.finalize.pipeline import WEIGHTS_FILE, finalize  # noqa: E402
from trainer.finalize.quantize import quantize_tensors  # noqa: E402
from trainer.finalize.stored import Quantized, restore  # noqa: E402
from trainer.model.build import build, load_state  # noqa: E402
from trainer.quant import dequantize_rows, row_scale  # noqa: E402
from trainer.runtime.distributed import Ranks  # noqa: E402
from trainer.sizes import TensorSize, tensor_sizes  # noqa: E402
from trainer.specs.final import (  # noqa: E402
    Bits,
    FinalSpec,
    Gptq,
    Int8Rule,
    Lqer,
    Prune,
    Quantize,
    TrimOnes,
    Zstd,
)

CUDA = torch.device("cuda")
PLAIN = Quantize(bits=Bits(mlp=4), float_numel=0)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(width, seed=0):
    x = drawn(4 * width, width, seed=seed)
    for column in range(1, width):
        x[:, column] += 0.9 * x[:, column - 1]
    return x.T @ x / len(x)


def sparse(*shape, seed=0):
    weight = drawn(*shape, seed=seed)
    weight[weight.abs() < 0.2] = 0.0
    return weight


@pytest.mark.parametrize(("columns", "rows"), [(1, 40), (19, 5), (128, 1001), (512, 96)])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (6, True), (8, False)])
def test_the_kernel_leaves_what_its_plain_twin_leaves(columns, rows, bits, symmetric):
    own = sparse(columns, rows, seed=bits).to(CUDA)
    aim = own + 0.1 * drawn(columns, rows, seed=9).to(CUDA)
    mix = (drawn(columns, columns + 3).triu(1) / columns**0.5).to(CUDA)[:, :columns]
    scale = row_scale(own.abs().amax(dim=0) * 0.7, bits, 1e-12).float()
    left = []
    for walk in (walk_on(CUDA), walk_block):
        lost, q = aim.clone(), torch.empty_like(own, dtype=torch.int8)
        walk(own, lost, mix, scale, q, bits, symmetric=symmetric)
        left.append((lost, q))

    (lost, q), (expected, plain) = left

    assert walk_on(CUDA) is not walk_block
    # A sum that ends in another last bit may send one weight to the other side of a half, and with
    # it what follows in its row.
    alike = (q == plain).all(dim=0)
    assert float(alike.float().mean()) >= 0.97
    torch.testing.assert_close(lost[:, alike], expected[:, alike], rtol=1e-4, atol=1e-5)
    assert not q[own == 0].any()


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (6, True), (8, False)])
def test_where_every_sum_is_exact_the_kernel_leaves_the_same_bits(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)

    def eighths(most, *shape):
        return torch.randint(-most, most + 1, shape, generator=generator).float() / 8

    own, mix = eighths(40, 96, 1001), eighths(4, 96, 96).triu(1)
    aim, scale = own + eighths(8, 96, 1001), 2.0 ** -torch.arange(1001).remainder(4)
    left = []
    for device, walk in ((CUDA, walk_on(CUDA)), (torch.device("cpu"), walk_block)):
        there, lost, mixed, unit = (x.clone().to(device) for x in (own, aim, mix, scale))
        q = torch.empty_like(there, dtype=torch.int8)
        walk(there, lost, mixed, unit, q, bits, symmetric=symmetric)
        left.append((lost.cpu(), q.cpu()))

    (lost, q), (expected, plain) = left

    assert torch.equal(q, plain)
    assert torch.equal(lost, expected)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 48, 128, 600])
def test_rounding_by_a_hessian_equals_that_on_the_cpu(act_order, block):
    weight, hessian = sparse(300, 512), correlated(512)
    hessian[[3, 100]] = 0.0
    hessian[:, [3, 100]] = 0.0
    scale = row_scale(weight.abs().amax(dim=1) * 0.8, 4, 1e-12)
    spec = Gptq(act_order=act_order, block=block)
    rounded = []
    for device in (CUDA, torch.device("cpu")):
        factor = factorize(hessian.to(device), spec, "w")
        there = weight.to(device), scale.to(device)
        rounded.append(round_rows(*there, 4, factor, block, symmetric=True).cpu())

    q, expected = rounded

    # One that falls to the other side moves those after it in its row.
    assert float((q == expected).float().mean()) > 0.99
    errors = [
        float(row_errors(weight - dequantize_rows(each, scale), hessian).sum()) for each in rounded
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert not q[weight == 0].any()
    assert not q[:, [3, 100]].any()


@pytest.mark.parametrize("spec", [
    PLAIN,
    replace(PLAIN, clip="p9"),
    replace(PLAIN, clip="r9", symmetric=False),
    replace(PLAIN, clip="p5", clip_scope="matrix"),
    replace(PLAIN, clip="sd3"),
    replace(PLAIN, bits=Bits(mlp=8), int8=Int8Rule(scale_floor=1e-12)),
    replace(PLAIN, bits=Bits(mlp=16)),
    replace(PLAIN, clip="p9", gptq=Gptq()),
    replace(PLAIN, clip="r9", clip_scope="matrix", gptq=Gptq()),
    replace(PLAIN, clip="sd3", gptq=Gptq(row_importance=0.2)),
    replace(PLAIN, clip="p5", gptq=Gptq(), lqer=Lqer(tensors=1, rank=2)),
])  # fmt: skip
def test_a_state_on_the_device_is_stored_as_on_the_cpu(spec):
    weight, hessian = sparse(200, 256) ** 3, correlated(256)
    size = TensorSize("w", (200, 256), "matrix", "mlp")
    forms = []
    for device in (CUDA, torch.device("cpu")):
        hessians = {"w": hessian.to(device)} if spec.gptq else None
        stored, (record,) = quantize_tensors({"w": weight.to(device)}, [size], spec, hessians)
        forms.append((stored["w"], record))

    (there, record), (here, expected) = forms

    tensors = [there.q, there.scale] if isinstance(there, Quantized) else [there.tensor]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    if spec.lqer is None:  # whose factors all move with one integer
        same = (restore(there) - restore(here)).abs() <= 1e-3 * restore(here).abs()
        assert float(same.float().mean()) > (0.98 if spec.gptq else 0.999)
    assert record.mse == pytest.approx(expected.mse, rel=5e-3)
    assert (record.hessian_error or 0.0) == pytest.approx(expected.hessian_error or 0.0, rel=5e-3)
    assert record.method == expected.method


def test_a_whole_final_on_the_device_restores_to_what_the_cpus_does(tmp_path):
    spec = tiny.full_model(dim=64)
    sizes = tensor_sizes(blueprint(spec))
    state = {size.name: 0.3 * drawn(*size.shape, seed=n) for n, size in enumerate(sizes)}
    tokens = [torch.randint(0, spec.vocab_size, (4, 64), generator=torch.Generator())]
    reports, weights = [], []
    for device in (CUDA, torch.device("cpu")):
        model = build(spec)
        load_state(model, dict(state))
        hessians = collect_hessians(model.to(device), tokens, Ranks(device=device))
        final = FinalSpec(
            prune=Prune(ratio=0.2, larger_than=1000),
            quantize=replace(PLAIN, clip="p5", gptq=Gptq()),
            compress=Zstd(level=3),
        )
        folder = tmp_path / device.type
        folder.mkdir()
        reports.append(finalize(state, spec, final, folder, "ab" * 32, hessians))
        final = replace(final, trim_ones=TrimOnes(weights_bytes=reports[-1].weights_bytes - 40))
        trimmed = finalize(state, spec, final, folder, "ab" * 32, hessians)
        assert trimmed.num_trimmed > 0
        weights.append(read_weights(folder / WEIGHTS_FILE)[1])

    there, here = reports

    assert there.num_pruned == here.num_pruned
    assert there.weights_bytes == pytest.approx(here.weights_bytes, rel=0.02)
    for one, other in zip(there.tensors, here.tensors, strict=True):
        assert (one.name, one.method, one.bits) == (other.name, other.method, other.bits)
        assert one.mse == pytest.approx(other.mse, rel=0.05, abs=1e-9)
    for name, tensor in weights[1].items():
        assert float((weights[0][name] - tensor).abs().mean()) <= 0.1 * float(tensor.abs().mean())

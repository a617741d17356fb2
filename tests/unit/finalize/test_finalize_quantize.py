import pytest
import torch

from tests.reference import quantize_reference
from trainer.errors import DataError
from trainer.finalize.quantize import (
    Floats,
    Quantized,
    quantize_matrix,
    quantize_tensors,
    restore,
)
from trainer.specs.final import CLIP_CANDIDATES, Quantize


def heavy_tailed(rows, cols, seed):
    """Rows of different size, each with a few outliers, so that candidates differ."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) ** 3
    return weight * torch.rand(rows, 1, generator=generator)


def squared_error(weight, quantized):
    return (weight - restore(quantized)).double().square().sum(dim=1)


@pytest.mark.parametrize("clip", ["none", "p3", "p5", "p9", "r9", "sd3", "sd12.85"])
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_search_equals_the_slow_plain_twin(clip, bits):
    weight = heavy_tailed(6, 101, seed=bits)

    fast, _ = quantize_matrix(weight, bits, clip, scale_floor=0.01)
    q, scales, _ = quantize_reference.quantize_matrix(weight, bits, clip, 0.01)

    assert fast.scale.tolist() == scales
    assert fast.q.tolist() == q


@pytest.mark.parametrize("clip", CLIP_CANDIDATES)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_search_is_never_worse_than_the_row_maximum(clip, bits):
    weight = heavy_tailed(32, 256, seed=1)
    plain, _ = quantize_matrix(weight, bits, "none", 1e-12)

    searched, _ = quantize_matrix(weight, bits, clip, 1e-12)

    assert bool((squared_error(weight, searched) <= squared_error(weight, plain)).all())


def test_search_chooses_each_row_for_itself():
    smooth, spiked = torch.linspace(-1, 1, 128), torch.full((128,), 0.01)
    spiked[3] = 1.0
    weight = torch.stack([smooth, spiked])

    together, _ = quantize_matrix(weight, 3, "p9", 1e-12)

    alone = [quantize_matrix(row.unsqueeze(0), 3, "p9", 1e-12)[0].scale for row in weight]
    assert torch.equal(together.scale, torch.cat(alone))


def test_floor_share_counts_rows_whose_scale_is_the_floor():
    weight = torch.tensor([[0.1, -0.2], [3.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
    spec = Quantize(scale_floor=1 / 31, float_numel=0)

    _, (record,) = quantize_tensors({"w": weight}, {"w": "matrix"}, spec)

    assert record.floor_share == 0.75
    assert record.bits == 6


def test_roles_and_sizes_decide_the_storage():
    state = {
        "matrix": torch.ones(3, 4),
        "small": torch.ones(2, 2),
        "table": torch.ones(4, 3),
        "gain": torch.ones(100),
    }
    roles = {"matrix": "matrix", "small": "matrix", "table": "embed", "gain": "scalar"}

    stored, records = quantize_tensors(state, roles, Quantize(float_numel=4))

    assert [record.bits for record in records] == [6, 16, 8, 32]
    assert isinstance(stored["matrix"], Quantized)
    assert isinstance(stored["small"], Floats)


def test_scalars_are_stored_exactly():
    gain = torch.tensor([1 / 3, 1e-30, -1e30])

    stored, (record,) = quantize_tensors({"gain": gain}, {"gain": "scalar"}, Quantize())

    assert torch.equal(restore(stored["gain"]), gain)
    assert record.mse == 0.0


def test_record_carries_the_error_of_what_is_stored():
    weight = heavy_tailed(4, 32, seed=3)
    spec = Quantize(matrix_bits=4, float_numel=0)

    stored, (record,) = quantize_tensors({"w": weight}, {"w": "matrix"}, spec)

    error = (weight - restore(stored["w"])).abs()
    assert record.max_error == float(error.max())
    assert record.mse == pytest.approx(float(error.square().mean()))


def test_tensor_without_a_role_is_refused_by_name():
    with pytest.raises(DataError, match=r"^lost\.weight: its role is None"):
        quantize_tensors({"lost.weight": torch.ones(2, 2)}, {}, Quantize())


def test_weight_beyond_float16_is_refused_by_name():
    with pytest.raises(DataError, match=r"^big: a weight of magnitude 100000"):
        quantize_tensors({"big": torch.tensor([[1e5]])}, {"big": "matrix"}, Quantize())

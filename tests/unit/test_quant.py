import pytest
import torch

from trainer.quant import dequantize_rows, levels, quantize_rows, row_scale

ALL_BITS = range(2, 9)


def gaussian(rows=8, cols=64, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "expected"), [(2, 1), (4, 7), (6, 31), (8, 127)])
def test_levels_are_symmetric_around_zero(bits, expected):
    assert levels(bits) == expected


@pytest.mark.parametrize("bits", ALL_BITS)
def test_error_inside_the_clip_is_at_most_half_a_step(bits):
    weight = gaussian()
    scale = row_scale(weight.abs().amax(dim=1) * 0.8, bits, 1e-12)
    reach = scale.float().unsqueeze(1) * levels(bits)

    error = (weight - dequantize_rows(quantize_rows(weight, scale, bits), scale)).abs()

    half_step = scale.float().unsqueeze(1) / 2 * (1 + 1e-5)
    assert bool((error <= half_step)[weight.abs() <= reach].all())


def test_weights_beyond_the_clip_go_to_its_end():
    q = quantize_rows(torch.tensor([[-9.0, 9.0]]), torch.tensor([0.1]).half(), bits=4)

    assert q.tolist() == [[-7, 7]]


def test_an_asymmetric_grid_has_one_integer_more_below():
    scale = torch.tensor([0.1]).half()

    q = quantize_rows(torch.tensor([[-9.0, 9.0]]), scale, bits=8, symmetric=False)

    assert q.tolist() == [[-90, 90]]
    far = quantize_rows(torch.tensor([[-99.0, 99.0]]), scale, bits=8, symmetric=False)
    assert far.tolist() == [[-128, 127]]


def test_halves_round_to_even():
    q = quantize_rows(torch.tensor([[0.5, 1.5, 2.5, -0.5]]), torch.ones(1).half(), bits=6)

    assert q.tolist() == [[0, 2, 2, 0]]


def test_grid_uses_the_scale_as_stored():
    clip = torch.tensor([1.0])

    scale = row_scale(clip, bits=6, scale_floor=1e-12)

    assert scale.dtype == torch.float16
    assert scale.item() == torch.tensor(1 / 31).half().item()


def test_a_row_of_zeros_has_a_valid_scale_and_stays_zero():
    weight = torch.zeros(2, 4)

    scale = row_scale(weight.abs().amax(dim=1), 6, scale_floor=1e-12)

    assert bool((scale > 0).all())
    assert torch.equal(dequantize_rows(quantize_rows(weight, scale, 6), scale), weight)


def test_a_huge_clip_does_not_make_the_scale_infinite():
    scale = row_scale(torch.tensor([1e30]), 2, scale_floor=1e-12)

    assert bool(torch.isfinite(scale).all())


def test_scale_floor_is_a_lower_bound_of_the_scale():
    scale = row_scale(torch.tensor([0.5, 2.0]), 6, scale_floor=1 / 31)

    assert scale.tolist() == [
        torch.tensor(1 / 31).half().item(),
        torch.tensor(2 / 31).half().item(),
    ]

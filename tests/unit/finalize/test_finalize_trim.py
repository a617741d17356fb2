import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import InfeasibleError
from trainer.finalize.compress import compress
from trainer.finalize.stored import Floats, Quantized
from trainer.finalize.trim import MAX_WRITES, TOLERANCE, trim_ones
from trainer.specs.final import Zstd


def matrices(seed=0, rows=48, num=3):
    """Quantized matrices whose rows have different scales, and a tensor of floats."""
    generator = torch.Generator().manual_seed(seed)
    forms = {}
    for index in range(num):
        q = torch.randn(rows, 64, generator=generator).mul(1.5 + index).round().clamp(-31, 31)
        scale = (0.01 + 0.1 * torch.rand(rows, generator=generator)).half()
        forms[f"matrix{index}"] = Quantized(q.to(torch.int8), scale, 6)
    return forms | {"gain": Floats(torch.ones(7))}


NOISE = 60  # bytes by which a compressor's file may grow when an integer becomes zero


class Files:
    """A file whose bytes are a real compressor's, and every size that was written."""

    def __init__(self):
        self.sizes = []
        self.last = {}

    def __call__(self, stored):
        payload = b"".join(f.q.numpy().tobytes() for f in stored.values() if hasattr(f, "q"))
        self.last = dict(stored)
        self.sizes.append(len(compress(payload, Zstd(level=12))))
        return self.sizes[-1]


def removed(before, after):
    """Scales of the integers that are gone, and those of the ones that stayed."""
    gone, kept = [], []
    for name, form in before.items():
        if isinstance(form, Quantized):
            ones = form.q.abs() == 1
            is_gone = after[name].q != form.q
            scales = form.scale.float().unsqueeze(1).expand_as(form.q)
            assert bool((after[name].q[is_gone] == 0).all())
            assert bool(ones[is_gone].all())
            gone += scales[is_gone].tolist()
            kept += scales[ones & ~is_gone].tolist()
    return gone, kept


def test_file_that_fits_is_left_alone():
    stored, files = matrices(), Files()

    trimmed = trim_ones(stored, 10**9, files)

    assert (trimmed.count, trimmed.names, len(files.sizes)) == (0, frozenset(), 1)
    assert all(trimmed.stored[name] is form for name, form in stored.items())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 5), share=st.floats(0.80, 0.99))
def test_ones_of_the_smallest_scales_go_and_the_file_is_just_small_enough(seed, share):
    stored, files = matrices(seed), Files()
    target = int(share * Files()(stored))

    trimmed = trim_ones(stored, target, files)

    gone, kept = removed(stored, trimmed.stored)
    assert len(gone) == trimmed.count > 0
    assert max(gone) <= min(kept, default=np.inf)
    written = Files()(trimmed.stored)
    assert target - max(TOLERANCE * target, NOISE) <= written <= target
    assert Files()(files.last) == written


def test_few_files_are_written():
    stored, files = matrices(rows=400), Files()

    trim_ones(stored, int(0.93 * Files()(stored)), files)

    assert len(files.sizes) <= 5 < MAX_WRITES


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_search_closes_in_where_a_file_is_far_from_its_entropy(factor):
    stored, sizes = matrices(rows=400), []

    def write(forms):
        q = torch.cat([f.q.flatten() for f in forms.values() if isinstance(f, Quantized)])
        shares = torch.unique(q, return_counts=True)[1].double() / len(q)
        sizes.append(round(-factor * len(q) * float(torch.xlogy(shares, shares).sum()) / 5.545))
        return sizes[-1]

    target = int(0.93 * write(stored))
    trimmed = trim_ones(stored, target, write)

    assert len(sizes) <= 8
    assert (1 - TOLERANCE) * target <= write(trimmed.stored) == sizes[-2] <= target


def test_tensors_that_lost_ones_are_named():
    stored = matrices()
    stored["matrix1"] = Quantized(stored["matrix1"].q, torch.full((48,), 0.001).half(), 6)
    target = int(0.99 * Files()(stored))

    trimmed = trim_ones(stored, target, Files())

    assert trimmed.names == {"matrix1"}
    assert trimmed.stored["matrix0"] is stored["matrix0"]


def test_the_same_ones_go_each_time():
    stored = matrices()
    target = int(0.9 * Files()(stored))

    one, two = (trim_ones(stored, target, Files()) for _ in range(2))

    assert one.count == two.count
    assert all(
        torch.equal(one.stored[name].q, two.stored[name].q) for name in one.names | two.names
    )


def test_what_the_caller_holds_is_not_changed():
    stored = matrices()
    before = {name: form.q.clone() for name, form in stored.items() if isinstance(form, Quantized)}

    trim_ones(stored, int(0.9 * Files()(stored)), Files())

    assert all(torch.equal(stored[name].q, q) for name, q in before.items())


def test_impossible_target_names_the_size_that_is_left():
    stored, files = matrices(), Files()
    ones = sum(int((f.q.abs() == 1).sum()) for f in stored.values() if isinstance(f, Quantized))

    with pytest.raises(InfeasibleError) as error:
        trim_ones(stored, 100, files)

    assert f"{min(files.sizes):,} bytes are left when all {ones:,} ones are zeroed" in str(
        error.value
    )
    assert len(files.sizes) <= MAX_WRITES


def test_model_without_integers_cannot_be_trimmed():
    with pytest.raises(InfeasibleError, match="when all 0 ones are zeroed"):
        trim_ones({"gain": Floats(torch.ones(7))}, 10, lambda stored: 99)

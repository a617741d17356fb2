import math
from dataclasses import replace

import pytest
import torch

from trainer.errors import DataError, InfeasibleError
from trainer.finalize.artifact import read_weights
from trainer.finalize.code import write_code
from trainer.finalize.pipeline import artifact_bytes, finalize
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.stored import restore
from trainer.runtime.files import sha256_file
from trainer.specs.final import FinalSpec, Gptq, Prune, TrimOnes, Zstd
from trainer.specs.model import Mtp


@pytest.fixture
def finish(small, tmp_path):
    """Finalize the small model into a folder; keyword arguments change the spec."""

    def run(state=None, folder="artifact", hessians=None, **changes):
        spec = replace(FinalSpec(quantize=small.quantize, compress=Zstd(level=3)), **changes)
        chosen = small.state if state is None else state
        path = tmp_path / folder
        return path, finalize(chosen, small.spec, spec, path, small.tokenizer_sha256, hessians)

    return run


def test_report_is_what_lies_on_disk(finish):
    folder, report = finish()

    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes == {"weights.fw": report.weights_bytes, "code.pyz": report.code_bytes}
    assert report.artifact_bytes == sum(sizes.values())
    assert report.weights_sha256 == sha256_file(folder / "weights.fw")
    assert set(report.clock_s) == {"prune", "quantize", "write"}


def test_written_weights_are_the_quantized_state(finish, small):
    folder, report = finish()

    _, tensors, _ = read_weights(folder / "weights.fw")

    stored, records = quantize_tensors(small.state, small.tensors, small.quantize)
    assert all(torch.equal(tensors[name], restore(stored[name])) for name in stored)
    assert [replace(record, bytes=None) for record in report.tensors] == list(records)


def test_bytes_of_the_tensors_add_up_to_the_file_but_for_its_header(finish, small):
    _, report = finish()

    sizes = {record.name: record.bytes for record in report.tensors}

    assert sizes.keys() == {tensor.name for tensor in small.tensors}
    assert all(size > 0 for size in sizes.values())
    assert 0 < report.weights_bytes - sum(sizes.values()) < report.weights_bytes


@pytest.mark.parametrize("form", ["zip", "packed"])
def test_code_is_written_in_the_form_of_the_spec(finish, tmp_path, form):
    folder, report = finish(code=form)

    alone = write_code(tmp_path / "alone", form)

    assert report.code_bytes == alone.stat().st_size
    assert (folder / alone.name).read_bytes() == alone.read_bytes()


@pytest.fixture
def coarse(small):
    """Steps so wide that many integers are ±1."""
    return replace(small.quantize, clip="sd20")


def test_ones_are_trimmed_down_to_the_bytes_of_the_spec(finish, coarse):
    _, plain = finish(folder="plain", quantize=coarse)
    target = plain.weights_bytes - 30

    folder, report = finish(quantize=coarse, trim_ones=TrimOnes(weights_bytes=target))

    assert report.num_trimmed > plain.num_trimmed == 0
    assert 0.9 * target < report.weights_bytes <= target
    assert report.weights_bytes == (folder / "weights.fw").stat().st_size


def test_records_of_trimmed_tensors_tell_the_error_that_is_left(finish, small, coarse):
    _, plain = finish(folder="plain", quantize=coarse)
    trim = TrimOnes(weights_bytes=plain.weights_bytes - 30)

    folder, report = finish(quantize=coarse, trim_ones=trim)

    _, tensors, _ = read_weights(folder / "weights.fw")
    for after in report.tensors:
        error = small.state[after.name] - tensors[after.name]
        assert after.mse == pytest.approx(float(error.square().mean()), rel=1e-5)
        assert after.max_error == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert [record.mse for record in report.tensors] != [record.mse for record in plain.tensors]


def test_impossible_number_of_bytes_is_refused_with_the_smallest(finish):
    with pytest.raises(InfeasibleError, match=r"bytes are left when all [\d,]+ ones are zeroed"):
        finish(trim_ones=TrimOnes(weights_bytes=10))


def test_hessians_shape_the_rounding(finish, small):
    gptq = replace(small.quantize, gptq=Gptq())
    names = [t.name for t in small.tensors if t.role == "matrix" and t.numel > 32]
    generator = torch.Generator().manual_seed(1)
    hessians = {}
    for name in names:
        width = small.state[name].shape[1]
        inputs = torch.randn(64, width, generator=generator) @ torch.randn(width, width)
        hessians[name] = inputs.T @ inputs / 64

    _, report = finish(quantize=gptq, hessians=hessians)

    by_name = {record.name: record for record in report.tensors}
    assert all(by_name[name].method == "gptq" for name in names)
    assert all(by_name[n].hessian_error <= by_name[n].nearest_hessian_error for n in names)


def test_same_state_gives_the_same_folder(finish):
    one, _ = finish(folder="one")
    two, _ = finish(folder="two")

    for name in ("weights.fw", "code.pyz"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_pruning_zeroes_large_matrices_and_nothing_else(finish, small):
    folder, report = finish(prune=Prune(ratio=0.5, larger_than=32))

    _, tensors, _ = read_weights(folder / "weights.fw")

    large = {
        tensor.name: tensor.numel
        for tensor in small.tensors
        if tensor.role == "matrix" and tensor.numel > 32
    }
    assert report.num_pruned == sum(math.floor(numel / 2) for numel in large.values())
    zeros = {name: int((tensors[name] == 0).sum()) for name in tensors}
    assert all(zeros[name] >= large[name] // 2 for name in large)
    assert all(zeros[name] < tensors[name].numel() / 2 for name in zeros.keys() - large.keys())


def test_pruning_looks_at_the_size_and_not_at_how_a_tensor_is_stored(finish, small):
    whole = replace(small.quantize, float_numel=10_000)
    folder, report = finish(quantize=whole, prune=Prune(ratio=0.5, larger_than=0))

    _, tensors, _ = read_weights(folder / "weights.fw")

    matrices = [tensor for tensor in small.tensors if tensor.role == "matrix"]
    assert report.num_pruned == sum(tensor.numel // 2 for tensor in matrices)
    assert all(int((tensors[m.name] == 0).sum()) == m.numel // 2 for m in matrices)


def test_tables_are_pruned_where_the_spec_says_so(finish):
    table = "embedding.weight"
    kept, _ = finish(folder="kept", prune=Prune(ratio=0.5, larger_than=32))
    pruned, _ = finish(folder="pruned", prune=Prune(ratio=0.5, larger_than=32, tables=True))

    zeros = [
        int((read_weights(folder / "weights.fw")[1][table] == 0).sum()) for folder in (kept, pruned)
    ]

    assert zeros[0] < 12 * 8 // 2 <= zeros[1]


def test_what_only_training_uses_is_left_out(small, tmp_path):
    trained = replace(small.spec, mtp=Mtp(num_heads=2))
    state = small.state | {f"mtp.heads.{k}.weight": torch.ones(12, 8) for k in range(2)}
    final = FinalSpec(quantize=small.quantize, compress=Zstd(level=3))

    with_heads = finalize(state, trained, final, tmp_path / "with", small.tokenizer_sha256)
    without = finalize(small.state, small.spec, final, tmp_path / "without", small.tokenizer_sha256)

    assert with_heads.weights_sha256 == without.weights_sha256
    assert read_weights(tmp_path / "with" / "weights.fw")[0] == small.spec


def test_state_in_bfloat16_is_accepted(finish, small):
    state = {name: tensor.bfloat16() for name, tensor in small.state.items()}

    folder, _ = finish(state)

    _, tensors, _ = read_weights(folder / "weights.fw")
    assert torch.equal(tensors["skips.scale"], state["skips.scale"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_state_is_refused_by_name_before_anything_is_written(finish, small, value):
    state = dict(small.state)
    state["blocks.1.mlp.up.weight"] = torch.full((24, 8), value)

    with pytest.raises(DataError, match=r"^blocks\.1\.mlp\.up\.weight: holds NaN or infinity"):
        finish(state)


def test_incomplete_state_is_refused_by_name(finish, small):
    state = {name: tensor for name, tensor in small.state.items() if name != "embedding.weight"}

    with pytest.raises(DataError, match=r"^state: tensor 'embedding\.weight' is missing"):
        finish(state)


def test_extra_file_in_the_folder_is_counted(finish):
    folder, report = finish()
    (folder / "deep").mkdir()

    (folder / "deep" / "notes.txt").write_bytes(b"x" * 1000)

    assert artifact_bytes(folder) == report.artifact_bytes + 1000


def test_symlink_in_the_folder_is_refused_by_name(finish, tmp_path):
    folder, _ = finish()
    (tmp_path / "hidden").write_bytes(b"x" * 1000)

    (folder / "link").symlink_to(tmp_path / "hidden")

    with pytest.raises(DataError, match=rf"^{folder}/link: neither a file nor a folder"):
        artifact_bytes(folder)


def test_absent_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        artifact_bytes(tmp_path / "absent")

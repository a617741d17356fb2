import math
from dataclasses import replace

import pytest
import torch

from trainer.errors import DataError
from trainer.finalize.artifact import read_weights
from trainer.finalize.pipeline import artifact_bytes, finalize
from trainer.finalize.quantize import quantize_tensors, restore
from trainer.runtime.files import sha256_file
from trainer.specs.final import FinalSpec, Prune, Zstd


@pytest.fixture
def finish(small, tmp_path):
    """Finalize the small model into a folder; keyword arguments change the spec."""

    def run(state=None, folder="artifact", **changes):
        spec = replace(FinalSpec(quantize=small.quantize, compress=Zstd(level=3)), **changes)
        chosen = small.state if state is None else state
        path = tmp_path / folder
        return path, finalize(chosen, small.roles, small.spec, spec, path, small.tokenizer_sha256)

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

    stored, records = quantize_tensors(small.state, small.roles, small.quantize)
    assert all(torch.equal(tensors[name], restore(stored[name])) for name in stored)
    assert report.tensors == records


def test_same_state_gives_the_same_folder(finish):
    one, _ = finish(folder="one")
    two, _ = finish(folder="two")

    for name in ("weights.fw", "code.pyz"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_pruning_zeroes_large_matrices_and_nothing_else(finish, small):
    folder, report = finish(prune=Prune(ratio=0.5))

    _, tensors, _ = read_weights(folder / "weights.fw")

    large = {
        name: tensor.numel()
        for name, tensor in small.state.items()
        if small.roles[name] == "matrix" and tensor.numel() > 32
    }
    assert report.num_pruned == sum(math.floor(numel / 2) for numel in large.values())
    zeros = {name: int((tensors[name] == 0).sum()) for name in tensors}
    assert all(zeros[name] >= large[name] // 2 for name in large)
    assert all(zeros[name] < tensors[name].numel() / 2 for name in zeros.keys() - large.keys())


def test_state_in_bfloat16_is_accepted(finish, small):
    state = {name: tensor.bfloat16() for name, tensor in small.state.items()}

    folder, _ = finish(state)

    _, tensors, _ = read_weights(folder / "weights.fw")
    assert torch.equal(tensors["skip_scale"], state["skip_scale"].float())


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

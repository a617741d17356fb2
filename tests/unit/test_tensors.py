import pytest
import torch

from trainer.errors import DataError
from trainer.runtime.distributed import Ranks, current, from_torchrun
from trainer.runtime.files import read_json, sha256_file, write_bytes, write_json
from trainer.runtime.tensors import load_tensors, save_tensors, saved_names


@pytest.fixture
def bank(tmp_path):
    folder = tmp_path / "bank"
    save_tensors(folder, {"raw": {"w": torch.randn(3, 4)}, "ema-0.9": {"w": torch.zeros(2)}})
    return folder


def test_tensors_numbers_and_containers_come_back_bit_for_bit(tmp_path):
    value = {"w": torch.randn(5, 3), "half": torch.randn(4).bfloat16(), "n": [1, 2.5, {"s": "x"}]}

    save_tensors(tmp_path, {"state": value})

    loaded = load_tensors(tmp_path, "state")
    assert torch.equal(loaded["w"], value["w"])
    assert torch.equal(loaded["half"], value["half"])
    assert loaded["n"] == value["n"]


def test_the_index_lists_what_was_saved_in_order(bank):
    assert saved_names(bank) == ["raw", "ema-0.9"]


@pytest.mark.parametrize("position", [0, 300, -1])
def test_an_altered_byte_is_refused_by_file(bank, position):
    path = bank / "raw.pt"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"^\S*raw\.pt: altered since it was written"):
        load_tensors(bank, "raw")


def test_a_truncated_file_is_refused_by_name(bank):
    path = bank / "raw.pt"
    path.write_bytes(path.read_bytes()[:-10])

    with pytest.raises(DataError, match=r"raw\.pt: altered"):
        load_tensors(bank, "raw")


def test_a_missing_file_is_refused_by_name(bank):
    (bank / "raw.pt").unlink()

    with pytest.raises(DataError, match=r"raw\.pt: no such file"):
        load_tensors(bank, "raw")


def test_an_unknown_name_lists_what_there_is(bank):
    with pytest.raises(DataError, match=r"bank: holds no 'swa', only raw, ema-0\.9"):
        load_tensors(bank, "swa")


def test_a_folder_without_index_is_not_whole(bank):
    (bank / "index.json").unlink()

    with pytest.raises(DataError, match=r"index\.json: no such file"):
        load_tensors(bank, "raw")


def test_a_file_is_replaced_whole_and_leaves_no_other_behind(tmp_path):
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"old")

    write_bytes(path, b"new")

    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})

    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_broken_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"file\.json: not readable as JSON"):
        read_json(path)


def test_the_hash_is_of_the_bytes(tmp_path):
    write_bytes(tmp_path / "x", b"abc")

    assert sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_a_gang_of_one_reduces_to_itself():
    ranks = Ranks()

    assert ranks.is_first
    assert ranks.max(3.5) == 3.5
    assert ranks.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    with from_torchrun() as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)
    assert current(torch.device("cpu")) == Ranks()

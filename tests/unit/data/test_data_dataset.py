import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from trainer.data.bytecount import verify_dataset
from trainer.data.prepare import Settings, prepare
from trainer.data.shards import Dataset, load_dataset, write_shard
from trainer.errors import DataError, UsageError


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_path: Path, embedded_documents: list[str]) -> Dataset:
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(embedded_documents[:20]), encoding="utf-8")
    fractions = Settings(val_fraction=0.1, holdout_fraction=0.1, shard_tokens=10_000)
    return prepare([source], tmp_path / "toy", fractions, tokenizer=tokenizer_path)


def edit_manifest(dataset: Dataset, **changes: object) -> None:
    path = dataset.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_digest_stays_when_the_folder_moves(dataset: Dataset, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(dataset.folder, moved)

    assert load_dataset(moved, verify=True).digest == dataset.digest


def test_the_digest_stays_when_the_manifest_is_reformatted(dataset: Dataset):
    edit_manifest(dataset)

    assert load_dataset(dataset.folder).digest == dataset.digest


def test_the_splits_of_a_dataset_can_be_read(dataset: Dataset):
    lengths = {split: len(dataset.stream(split)) for split in ("train", "holdout", "val")}

    assert lengths == {split: dataset.num_tokens(split) for split in lengths}
    assert min(lengths.values()) > 0
    assert dataset.vocab_size == 1024


def test_an_unknown_split_is_a_usage_error(dataset: Dataset):
    with pytest.raises(UsageError, match="no split 'test'; use one of train, holdout, val"):
        dataset.stream("test")


def test_a_missing_shard_is_named_at_load(dataset: Dataset):
    gone = dataset.folder / "toy_train_000001.bin"
    gone.unlink()

    with pytest.raises(DataError, match=r"toy_train_000001\.bin: No such file"):
        load_dataset(dataset.folder)


def test_a_missing_tokenizer_is_named_in_one_line(dataset: Dataset):
    dataset.tokenizer_path.unlink()

    with pytest.raises(DataError) as caught:
        load_dataset(dataset.folder)

    assert str(caught.value).startswith(f"{dataset.tokenizer_path}: no such file")
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_length_is_refused(dataset: Dataset):
    path = dataset.folder / "toy_val_000000.bin"
    write_shard(path, np.ones(5, dtype=np.int64))

    with pytest.raises(DataError, match=r"toy_val_000000\.bin: 5 tokens, the manifest says"):
        load_dataset(dataset.folder)


@pytest.mark.parametrize("name", ["toy_train_000000.bin", "tokenizer.model"])
def test_a_flipped_bit_is_found_when_asked_to_verify(dataset: Dataset, name: str):
    path = dataset.folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    load_dataset(dataset.folder)
    with pytest.raises(DataError, match=f"{name}: changed or corrupted"):
        load_dataset(dataset.folder, verify=True)


def test_a_digest_that_does_not_follow_from_the_files_is_refused(dataset: Dataset):
    edit_manifest(dataset, digest="sha256:0")

    with pytest.raises(DataError, match=r"manifest\.json: digest=sha256:0 does not follow"):
        load_dataset(dataset.folder)


def test_a_manifest_cannot_name_a_file_outside_its_folder(dataset: Dataset):
    splits = json.loads((dataset.folder / "manifest.json").read_text())["splits"]
    splits["val"]["shards"][0]["file"] = "../x.bin"
    edit_manifest(dataset, splits=splits)

    with pytest.raises(DataError, match="is not a plain file name"):
        load_dataset(dataset.folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', '{"splits": {"train": 3}}'])
def test_a_broken_manifest_is_one_line_with_its_path(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)

    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path)

    assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(DataError, match="no such file; make the dataset with `fairway data"):
        load_dataset(tmp_path / "nothing")


def test_a_recount_that_disagrees_with_the_manifest_is_refused(dataset: Dataset):
    splits = json.loads((dataset.folder / "manifest.json").read_text())["splits"]
    splits["holdout"]["bytes"] += 1
    edit_manifest(dataset, splits=splits)

    verify_dataset(dataset)
    with pytest.raises(DataError, match="holdout holds"):
        verify_dataset(load_dataset(dataset.folder))

import gzip
import json
import lzma
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from trainer.data.bytecount import verify_dataset
from trainer.data.overlap import SHINGLE_TOKENS, shingles
from trainer.data.prepare import EMBEDDED_DIGEST, Settings, prepare, prepare_embedded
from trainer.data.shards import Dataset, load_dataset
from trainer.data.tokenizer import open_tokenizer
from trainer.errors import DataError, UsageError

FRACTIONS = Settings(val_fraction=0.2, holdout_fraction=0.1, shard_tokens=5_000)


@pytest.fixture
def documents(embedded_documents: list[str]) -> list[str]:
    return [document[:1500].strip() for document in embedded_documents[:30]]


@pytest.fixture
def source(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def texts(dataset: Dataset, split: str) -> list[str]:
    tokenizer = open_tokenizer(dataset.tokenizer_path)
    stream = dataset.stream(split)
    tokens = stream.read(0, len(stream))
    rows = np.split(tokens, np.flatnonzero(tokens == 1))[1:]
    return [tokenizer.decode(row.tolist()) for row in rows]


def folded(tokenizer_path: Path, text: str) -> str:
    tokenizer = open_tokenizer(tokenizer_path)
    return tokenizer.decode(tokenizer.encode(text))


def test_every_document_is_in_exactly_one_split(tmp_path, source, documents, tokenizer_path):
    dataset = prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)

    found = {split: texts(dataset, split) for split in ("train", "holdout", "val")}

    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 21,
        "holdout": 3,
        "val": 6,
    }
    expected = sorted(folded(tokenizer_path, text) for text in documents)
    assert sorted(text for rows in found.values() for text in rows) == expected


def test_the_manifest_counts_what_the_shards_decode_to(tmp_path, source, tokenizer_path):
    dataset = prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)

    verify_dataset(dataset)
    for split in ("train", "holdout", "val"):
        rows = texts(dataset, split)
        assert dataset.num_documents(split) == len(rows)
        assert dataset.num_bytes(split) == sum(len(text.encode()) for text in rows)


def test_raw_bytes_are_those_of_the_source(tmp_path, source, documents, tokenizer_path):
    dataset = prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)

    raw = sum(split.raw_bytes for split in dataset.manifest.splits.values())

    assert raw == sum(len(text.encode()) for text in documents)


def test_shards_are_cut_at_their_size(tmp_path, source, tokenizer_path):
    dataset = prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)

    sizes = [shard.tokens for shard in dataset.manifest.splits["train"].shards]

    assert len(sizes) > 1
    assert set(sizes[:-1]) == {5_000}
    assert 0 < sizes[-1] <= 5_000


def test_the_same_text_gives_the_same_digest_in_any_packing(tmp_path, documents, source):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    packed = {
        "a.jsonl": lines.encode(),
        "b.jsonl.xz": lzma.compress(lines.encode()),
        "c.txt.gz": gzip.compress(source.read_bytes()),
    }
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)

    with_tokenizer = Settings(vocab_size=400, val_fraction=0.2)
    digests = {
        prepare([tmp_path / name], tmp_path / name[0] / "toy", with_tokenizer).digest
        for name in ("text.txt", *packed)
    }

    assert len(digests) == 1


def test_another_seed_deals_other_documents(tmp_path, source, tokenizer_path):
    datasets = [
        prepare(
            [source],
            tmp_path / f"seed{seed}",
            Settings(val_fraction=0.2, seed=seed),
            tokenizer=tokenizer_path,
        )
        for seed in (1, 2)
    ]

    assert texts(datasets[0], "val") != texts(datasets[1], "val")


def test_a_tokenizer_is_trained_without_the_val_documents(tmp_path):
    plain = [f"the common word number {chr(97 + i)}" * 3 for i in range(20)]
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"{text} zzq{i}zzq" for i, text in enumerate(plain)))
    settings = Settings(vocab_size=290, val_fraction=0.9, holdout_fraction=0.0)
    before = prepare([source], tmp_path / "before", settings)
    changed = source.read_text()
    for text in texts(before, "val"):
        changed = changed.replace(text, text.replace("common", "qqqqqq"))
    source.write_text(changed)

    after = prepare([source], tmp_path / "after", settings)

    assert after.digest != before.digest
    assert after.manifest.tokenizer == before.manifest.tokenizer


def test_duplicates_up_to_white_space_are_kept_once(tmp_path, source, documents, tokenizer_path):
    copies = [text.replace(" ", "  ") for text in documents]
    source.write_text("\n\n".join([*documents, *copies]), encoding="utf-8")

    dataset = prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)

    assert dataset.manifest.settings["duplicates_dropped"] == len(documents)
    val, train = set(texts(dataset, "val")), set(texts(dataset, "train"))
    assert not val & train
    assert len(val) + len(train) + dataset.num_documents("holdout") == len(documents)


def test_documents_a_tokenizer_cannot_tell_apart_are_refused(tmp_path, source, documents):
    model = tmp_path / "fold"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(model),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc_cf",
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    source.write_text("\n\n".join([*documents, *map(str.upper, documents)]), encoding="utf-8")

    with pytest.raises(DataError, match=r"text\.txt: line \d+: the same tokens as .* line \d+"):
        prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=model.with_suffix(".model"))


def test_near_duplicates_of_val_documents_are_counted(tmp_path, source, documents, tokenizer_path):
    source.write_text(
        "\n\n".join([*documents, *(f"Reprint. {text}" for text in documents)]), encoding="utf-8"
    )

    dataset = prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)

    overlap = dataset.manifest.overlap
    assert overlap is not None
    assert overlap["identical_documents"] == 0
    assert 0 < overlap["near_duplicate_val_documents"] <= overlap["val_documents"] == 12
    assert 0 < overlap["val_shingles_met"] <= overlap["val_shingles"]


def test_text_without_repeats_has_no_overlap(tmp_path, source, tokenizer_path):
    dataset = prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)

    assert dataset.manifest.overlap["near_duplicate_val_documents"] == 0


def test_equal_runs_have_equal_shingles_wherever_they_stand():
    tokens = np.random.Generator(np.random.PCG64(0)).integers(0, 1024, 300)
    run = tokens[100 : 100 + SHINGLE_TOKENS]

    found = shingles(tokens)

    assert len(set(found.tolist())) == len(found) == 300 - SHINGLE_TOKENS + 1
    assert shingles(run).tolist() == [found[100]]


def test_an_interrupted_preparation_leaves_nothing(tmp_path, source, tokenizer_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            [source],
            tmp_path / "home" / "toy",
            FRACTIONS,
            tokenizer=tokenizer_path,
            progress=interrupt,
        )

    assert list((tmp_path / "home").iterdir()) == []


def test_progress_ends_at_the_number_of_documents(tmp_path, source, tokenizer_path):
    calls: list[tuple[int, int]] = []

    prepare(
        [source],
        tmp_path / "toy",
        FRACTIONS,
        tokenizer=tokenizer_path,
        progress=lambda done, total: calls.append((done, total)),
    )

    assert calls[-1] == (30, 30)


def test_an_existing_folder_is_not_touched(tmp_path, source, tokenizer_path):
    (tmp_path / "toy").mkdir()

    with pytest.raises(UsageError, match="toy: exists already; remove it"):
        prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path)


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path, source, tokenizer_path):
    def intrude(done: int, total: int) -> None:
        (tmp_path / "toy").mkdir()
        (tmp_path / "toy" / "other.bin").write_bytes(b"theirs")

    with pytest.raises(UsageError, match="toy: another process made it meanwhile"):
        prepare([source], tmp_path / "toy", FRACTIONS, tokenizer=tokenizer_path, progress=intrude)

    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["other.bin"]


def test_a_home_that_is_a_file_is_refused(tmp_path, source, tokenizer_path):
    with pytest.raises(UsageError, match=r"toy: cannot write \(Not a directory\)"):
        prepare([source], source / "toy", FRACTIONS, tokenizer=tokenizer_path)


def test_a_tokenizer_or_a_vocabulary_must_be_given(tmp_path, source):
    with pytest.raises(UsageError, match="give either a tokenizer or a vocab_size"):
        prepare([source], tmp_path / "toy")


@pytest.mark.parametrize(("val", "holdout"), [(0.0, 0.1), (0.6, 0.5), (0.1, -0.1)])
def test_fractions_that_make_no_sense_are_refused(tmp_path, source, tokenizer_path, val, holdout):
    settings = Settings(val_fraction=val, holdout_fraction=holdout)

    with pytest.raises(UsageError, match="val must be above 0"):
        prepare([source], tmp_path / "toy", settings, tokenizer=tokenizer_path)


def test_too_few_documents_for_a_val_split_are_refused(tmp_path, tokenizer_path):
    source = tmp_path / "one.txt"
    source.write_text("Only one document.")

    with pytest.raises(DataError, match="1 documents leave 0 for val"):
        prepare([source], tmp_path / "toy", tokenizer=tokenizer_path)


def test_the_embedded_dataset_is_the_pinned_one(tmp_path):
    dataset = prepare_embedded(tmp_path / "anywhere")

    assert (dataset.name, dataset.digest) == ("embedded", EMBEDDED_DIGEST)
    verify_dataset(dataset)


def test_a_second_call_finds_the_embedded_dataset(tmp_path):
    out = tmp_path / "embedded"
    before = prepare_embedded(out).folder.stat().st_ino

    assert prepare_embedded(out).folder.stat().st_ino == before


def test_a_damaged_embedded_dataset_is_made_again(tmp_path):
    out = tmp_path / "embedded"
    shard = prepare_embedded(out).folder / "embedded_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")

    prepare_embedded(out)

    assert load_dataset(out, verify=True).digest == EMBEDDED_DIGEST


def test_callers_that_arrive_together_get_one_dataset(tmp_path):
    context = multiprocessing.get_context("spawn")

    with context.Pool(2) as pool:
        datasets = pool.map(prepare_embedded, [tmp_path / "embedded"] * 2)

    assert {dataset.digest for dataset in datasets} == {EMBEDDED_DIGEST}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".embedded.lock", "embedded"]

import io
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.bytecount_reference import count_bytes
from trainer.data.bytecount import ByteTable, count_stream, verify_decoded
from trainer.data.tokenizer import open_tokenizer, train_tokenizer
from trainer.errors import DataError, UsageError
from trainer.protocol import BOS_ID

WHERE = Path("x.bin")


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return open_tokenizer(Path(str(files("trainer.data") / "embedded" / "tokenizer.model")))


def encode(tokenizer: sentencepiece.SentencePieceProcessor, *texts: str) -> np.ndarray:
    rows = [[BOS_ID, *tokenizer.encode(text)] for text in texts]
    return np.array([token for row in rows for token in row])


@given(tokens=st.lists(st.integers(0, 1023), min_size=2, max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_table_agrees_with_its_slow_twin_on_any_tokens(tokenizer, tokens):
    pairs = np.array(tokens)

    counted = ByteTable.build(tokenizer).count(pairs[:-1], pairs[1:])

    assert counted.dtype == np.int64
    assert counted.tolist() == count_bytes(tokenizer, tokens)


@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_table_counts_the_bytes_of_any_decoded_text(tokenizer, texts):
    tokens = encode(tokenizer, *texts)

    counted = ByteTable.build(tokenizer).count(tokens[:-1], tokens[1:]).sum()

    assert counted == verify_decoded(tokenizer, tokens, WHERE)
    assert counted == sum(len(tokenizer.decode(tokenizer.encode(t)).encode()) for t in texts)


def test_a_space_is_charged_only_inside_a_document(tokenizer):
    table = ByteTable.build(tokenizer)
    word = tokenizer.piece_to_id("\u2581the")

    counts = table.count(np.array([BOS_ID, word, 3]), np.array([word, word, word]))

    assert counts.tolist() == [3, 4, 3]


def test_boundaries_weigh_nothing_and_byte_pieces_one(tokenizer):
    table = ByteTable.build(tokenizer)
    byte = tokenizer.piece_to_id("<0xE2>")

    assert table.lut[:4].tolist() == [0, 0, 0, 0]
    assert table.is_boundary[:5].tolist() == [True, True, True, True, False]
    assert (table.lut[byte], table.has_leading_space[byte]) == (1, False)


def test_an_unused_piece_is_a_boundary(tmp_path: Path, embedded_documents):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(embedded_documents[:5]),
        model_writer=model,
        model_type="bpe",
        vocab_size=200,
        user_defined_symbols=["zqz"],
        minloglevel=2,
    )
    entry = re.compile(rb"(zqz\x15.{4}\x18)\x04", re.DOTALL)  # its type: 4 user defined, 5 unused
    unused = entry.sub(lambda found: found[1] + b"\x05", model.getvalue())

    defined_table, unused_table = (
        ByteTable.load(_written(tmp_path, content)) for content in (model.getvalue(), unused)
    )

    assert (defined_table.lut[3], defined_table.is_boundary[3]) == (3, False)
    assert (unused_table.lut[3], unused_table.is_boundary[3]) == (0, True)


def _written(folder: Path, content: bytes) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.model"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("vocab_size", "size"), [(0, 1024), (512, 1024), (1100, 1100)])
def test_the_table_is_as_long_as_the_larger_vocabulary(tokenizer_path, vocab_size, size):
    table = ByteTable.load(tokenizer_path, vocab_size)

    assert len(table.lut) == len(table.has_leading_space) == len(table.is_boundary) == size
    assert table.is_boundary[1024:].all()
    assert not table.lut[1024:].any()


def test_a_multibyte_piece_counts_its_utf8_bytes(tokenizer):
    tokens = encode(tokenizer, "caf\u00e9 \u2014 \u6f22")

    assert verify_decoded(tokenizer, tokens, WHERE) == len("caf\u00e9 \u2014 \u6f22".encode())


def test_a_stream_cut_inside_a_character_still_verifies(tokenizer):
    tokens = encode(tokenizer, "\u6f22\u5b57 and \u6f22\u5b57")

    assert verify_decoded(tokenizer, tokens[2:-1], WHERE) == len("\u5b57 and \u6f22".encode())


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path, embedded_documents):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(embedded_documents[:5]),
        model_prefix=str(tmp_path / "lossy"),
        model_type="bpe",
        vocab_size=200,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    lossy = open_tokenizer(tmp_path / "lossy.model")

    with pytest.raises(DataError, match=r"^x\.bin: document 1: decodes to .* byte fallback"):
        verify_decoded(lossy, encode(lossy, "plain", "\u6f22"), WHERE)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_a_stream_is_counted_alike_in_chunks_of_any_size(make_stream, tokenizer, chunk_tokens):
    tokens = encode(tokenizer, "One document.", "Another one, longer.", "A third.")
    stream = make_stream(tokens[:7], tokens[7:])

    counted = count_stream(stream, ByteTable.build(tokenizer), WHERE, chunk_tokens)

    assert counted == (3, verify_decoded(tokenizer, tokens, WHERE))


def test_a_token_outside_the_vocabulary_is_named(make_stream, tokenizer):
    stream = make_stream(np.array([1, 5, 1024]))

    with pytest.raises(DataError, match=r"x\.bin: token id 1024 lies outside .* 1024 pieces"):
        count_stream(stream, ByteTable.build(tokenizer), WHERE)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_a_broken_tokenizer_is_one_line_with_its_path(tmp_path: Path, capfd, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        ByteTable.load(path, 1024)

    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_truncated_tokenizer_is_refused(tmp_path: Path, tokenizer_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_path.read_bytes()[:100_000])

    with pytest.raises(DataError, match="not a SentencePiece model, or corrupted"):
        open_tokenizer(path)


def test_a_trained_tokenizer_has_the_challenges_settings(tmp_path: Path, embedded_documents):
    path = tmp_path / "tokenizer.model"

    train_tokenizer([*embedded_documents[:40], "2020 " * 5000], 400, path)

    trained = open_tokenizer(path)
    ids = trained.pad_id(), trained.bos_id(), trained.eos_id(), trained.unk_id()
    assert (ids, trained.vocab_size()) == ((0, 1, 2, 3), 400)
    assert trained.encode("2020", out_type=str) == ["2", "0", "2", "0"]
    assert trained.decode(trained.encode("\u6f22")) == "\u6f22"


def test_a_vocabulary_beyond_the_text_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"vocab_size=600: the training text gives only \d+"):
        train_tokenizer(["a b c hello"], 600, tmp_path / "tokenizer.model")


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="vocab_size=100: the training text does not give"):
        train_tokenizer(["a b c hello"], 100, tmp_path / "tokenizer.model")

"""The byte audit: what targets decode to, wherever the tokens begin and end."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import golden_pr414
from trainer.data.bytecount import ByteTable, decoded_bytes, table_for
from trainer.data.tokenizer import open_tokenizer
from trainer.errors import DataError

BOS, EOS = 1, 2
PATH = golden_pr414.FOLDER / "tokenizer.model"
TOKENIZER = open_tokenizer(PATH)
UNK = TOKENIZER.unk_id()
TABLE = ByteTable.build(TOKENIZER)
WORDS = "the naïve 😀 sees 日本, “twice” — and\n\n runs  away…"


def encoded(*texts, between=BOS):
    return np.concatenate([[between, *TOKENIZER.encode(text)] for text in texts]).astype(np.uint16)


def counted(tokens):
    return int(TABLE.count(tokens[:-1], tokens[1:]).sum())


@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=3),
    st.integers(0, 40),
    st.integers(0, 40),
)
@example([WORDS, WORDS], 7, 5)
def test_any_stretch_of_any_texts_decodes_to_what_it_counts(texts, head, tail):
    tokens = encoded(*texts)
    tokens = tokens[min(head, len(tokens) - 2) :]
    tokens = tokens[: max(2, len(tokens) - tail)]

    assert decoded_bytes(TOKENIZER, tokens, "x") == (counted(tokens), 0)


def test_every_cut_of_wide_characters_counts_its_bytes():
    tokens = encoded("naïve 😀 日本", "“twice” — and")

    for first in range(len(tokens) - 1):
        for stop in range(first + 2, len(tokens) + 1):
            part = tokens[first:stop]
            assert decoded_bytes(TOKENIZER, part, "x") == (counted(part), 0)


def test_whole_documents_count_the_bytes_of_their_texts():
    texts = ["a cat", "über 日本 — twice"]

    found = decoded_bytes(TOKENIZER, encoded(*texts), "x")

    assert found == (sum(len(text.encode()) for text in texts), 0)


@pytest.mark.parametrize("between", [BOS, EOS])
def test_any_control_token_ends_a_text(between):
    tokens = encoded("one text", "another", between=between)

    assert decoded_bytes(TOKENIZER, tokens, "x") == (len("one textanother"), 0)


def test_what_is_no_text_is_counted_and_told():
    broken = TOKENIZER.piece_to_id("<0xA9>")  # the end of a character that never began
    tokens = np.array(
        [BOS, *TOKENIZER.encode("a b"), broken, *TOKENIZER.encode("c"), BOS, UNK, 400]
    )

    assert decoded_bytes(TOKENIZER, tokens, "x") == (counted(tokens), 2)


def test_ids_beyond_the_tokenizer_are_no_text():
    tokens = np.array([BOS, *TOKENIZER.encode("a b"), 5_000, *TOKENIZER.encode("c")])

    assert decoded_bytes(TOKENIZER, tokens, "x") == (4, 0)


def test_a_table_that_counts_otherwise_is_refused(monkeypatch):
    build = ByteTable.build

    def charged(tokenizer, vocab_size=0):
        table = build(tokenizer, vocab_size)
        return ByteTable(table.lut + table.has_leading_space, *[getattr(table, name) for name in (
            "has_leading_space", "is_boundary")])  # fmt: skip

    monkeypatch.setattr(ByteTable, "build", charged)

    with pytest.raises(
        DataError, match=r"x: tokens 0\.\.\d+: decodes to 7 bytes but counts 9; bits"
    ):
        decoded_bytes(TOKENIZER, encoded("the cat"), "x")


def test_the_table_of_a_text_is_as_long_as_the_models_vocabulary():
    assert len(table_for(np.array([1, 1023]), PATH, 1024, "x").lut) == 1024


@pytest.mark.parametrize(
    ("largest", "vocab_size", "line"),
    [
        (1024, 1024, "x: token id 1024, but the model's vocab_size is 1024; score tokens of its"),
        (5, 1000, f"{Path(PATH)}: 1024 tokens, but the model's vocab_size is 1000; give the tok"),
    ],
)
def test_a_text_or_tokenizer_of_another_model_is_refused(largest, vocab_size, line):
    with pytest.raises(DataError) as error:
        table_for(np.array([1, largest]), PATH, vocab_size, "x")

    assert str(error.value).startswith(line)

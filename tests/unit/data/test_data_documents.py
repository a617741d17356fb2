import gzip
import json
import lzma
from pathlib import Path

import pytest

from trainer.data.documents import read_documents
from trainer.errors import DataError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_blank_lines_separate_documents(tmp_path):
    path = write(tmp_path / "a.txt", b"\n\nTitle\nBody\r\n \t\n\n\nSecond\n")

    found = [(document.text, document.line) for document in read_documents(path)]

    assert found == [("Title\nBody", 3), ("Second", 8)]


def test_json_lines_are_one_document_each(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b'{"text": "One\\n\\nTwo"}\n\n{"text": " "}\n{"text": "3"}\n'
    )

    found = [(document.text, document.line) for document in read_documents(path)]

    assert found == [("One\n\nTwo", 1), ("3", 4)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfText")

    assert [document.text for document in read_documents(path)] == ["Text"]


def test_invalid_utf8_names_line_and_byte(tmp_path):
    path = write(tmp_path / "a.txt", b"fine\nb\xff\n")

    assert fault(path).startswith("line 2: not UTF-8 (byte 6 of the text)")


def test_broken_json_names_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": \n')

    assert fault(path).startswith("line 2: not JSON (Expecting value)")


@pytest.mark.parametrize("record", ["3", "[]", '{"body": "x"}', '{"text": 3}', '{"text": null}'])
def test_a_line_without_text_is_named(tmp_path, record):
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{record}\n'.encode())

    assert fault(path).startswith("line 2: no text")


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "\ud800"}).encode())

    assert fault(path).startswith("line 1: half a surrogate pair")


def test_json_nested_without_end_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", b"[" * 100_000)

    assert fault(path).startswith("line 1: not JSON")


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt.xz", lzma.compress), ("a.txt.gz", gzip.compress)]
)
def test_a_truncated_archive_is_refused(tmp_path, name, pack):
    path = write(tmp_path / name, pack(b"words and more words\n" * 100)[:-20])

    assert fault(path).startswith("truncated or corrupted")


@pytest.mark.parametrize("name", ["a.txt.xz", "a.txt.gz"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, name):
    path = write(tmp_path / name, b"plain text")

    assert fault(path).startswith("truncated or corrupted")


def test_a_line_that_unpacks_without_end_is_refused(tmp_path):
    path = write(tmp_path / "a.txt.xz", lzma.compress(b"0" * (65 * 1024 * 1024), preset=0))

    assert fault(path).startswith("line 1: longer than 67,108,864 bytes")


def test_a_missing_file_is_refused(tmp_path):
    assert fault(tmp_path / "gone.txt").startswith("No such file")

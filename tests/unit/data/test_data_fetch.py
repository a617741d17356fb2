import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.export_server import Export, serving
from trainer.data.bytecount import verify_dataset
from trainer.data.download import Patience
from trainer.data.fetch import Origin, fetch
from trainer.data.shards import Dataset, load_dataset, write_shard
from trainer.data.tokenizer import open_tokenizer
from trainer.errors import BackendError, DataError, UsageError

FOLDER = "datasets/fineweb10B_sp1024"
TRAIN_0, TRAIN_1 = f"{FOLDER}/fineweb_train_000000.bin", f"{FOLDER}/fineweb_train_000001.bin"
VAL = f"{FOLDER}/fineweb_val_000000.bin"
MODEL = "tokenizers/fineweb_1024_bpe.model"


@pytest.fixture
def export(tmp_path, tokenizer_path, embedded_documents, monkeypatch) -> Iterator[Export]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tokenizer = open_tokenizer(tokenizer_path)
    export = Export(files={MODEL: tokenizer_path.read_bytes()})
    rows = [np.array([1, *tokenizer.encode(text)]) for text in embedded_documents[:9]]
    for index, path in enumerate((TRAIN_0, TRAIN_1, VAL)):
        shard = tmp_path / "shard.bin"
        write_shard(shard, np.concatenate(rows[3 * index : 3 * index + 3]))
        export.files[path] = shard.read_bytes()
    export.put_manifest(files_train=2, files_val=1)
    with serving(export):
        yield export


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "home" / "fineweb"


def fetch_from(export: Export, out: Path, **options: object) -> Dataset:
    patience = Patience(timeout_s=240.0, attempts=2, backoff_s=0.0)
    origin = Origin(base_url=export.url, repo="owner/export", patience=patience)
    return fetch("sp1024", out, **{"train_shards": 2, "origin": origin} | options)


def test_a_fetched_export_is_a_dataset(export, out):
    dataset = fetch_from(export, out)

    verify_dataset(load_dataset(out, verify=True))
    assert dataset.name == "fineweb"
    assert [dataset.num_documents(split) for split in ("train", "holdout", "val")] == [3, 3, 3]
    assert (out / "fineweb_val_000000.bin").read_bytes() == export.files[VAL]
    assert not list(out.glob("*.part*"))


def test_the_holdout_is_the_last_train_shard(export, out):
    dataset = fetch_from(export, out)

    names = [shard.file for shard in dataset.manifest.splits["holdout"].shards]
    assert names == ["fineweb_train_000001.bin"]


def test_the_same_files_split_otherwise_have_another_digest(export, out):
    with_holdout = fetch_from(export, out)

    without = fetch_from(export, out, holdout=False)

    assert without.num_tokens("train") == sum(map(with_holdout.num_tokens, ("train", "holdout")))
    assert without.digest != with_holdout.digest


def test_a_second_fetch_asks_only_for_what_is_missing(export, out):
    before = fetch_from(export, out)
    (out / "fineweb_train_000001.bin").unlink()
    export.seen.clear()

    after = fetch_from(export, out)

    assert export.fetched() == ["fineweb_train_000001.bin"]
    assert after.digest == before.digest


def test_the_remote_manifest_is_read_anew_every_time(export, out):
    fetch_from(export, out)
    export.put_manifest(files_train=1, files_val=1)

    with pytest.raises(UsageError, match="fineweb10B_sp1024 has 1; use 2 to 1"):
        fetch_from(export, out)


def test_a_dropped_connection_is_resumed_where_it_broke(export, out):
    export.drop_after[TRAIN_0] = 2000

    fetch_from(export, out)

    assert (out / "fineweb_train_000000.bin").read_bytes() == export.files[TRAIN_0]
    assert [asked for path, asked in export.seen if path == TRAIN_0] == [None, "bytes=2000-"]


def test_what_an_earlier_call_left_is_resumed(export, out):
    out.mkdir(parents=True)
    (out / "fineweb_train_000000.bin.part").write_bytes(export.files[TRAIN_0][:5000])

    fetch_from(export, out)

    assert (out / "fineweb_train_000000.bin").read_bytes() == export.files[TRAIN_0]
    assert (TRAIN_0, "bytes=5000-") in export.seen


def test_a_finished_part_is_not_fetched_again(export, out):
    out.mkdir(parents=True)
    (out / "fineweb_train_000000.bin.part").write_bytes(export.files[TRAIN_0])

    fetch_from(export, out)

    assert (out / "fineweb_train_000000.bin").read_bytes() == export.files[TRAIN_0]
    assert export.fetched().count("fineweb_train_000000.bin") == 1


def test_a_part_of_an_older_publication_is_thrown_away(export, out):
    out.mkdir(parents=True)
    older = export.files[TRAIN_0][:3000] + b"\x01\x00" * 1000
    (out / "fineweb_train_000000.bin.part").write_bytes(older)
    (out / "fineweb_train_000000.bin.part.etag").write_text('"older"')

    fetch_from(export, out)

    assert (out / "fineweb_train_000000.bin").read_bytes() == export.files[TRAIN_0]


def test_a_server_without_ranges_sends_the_file_again(export, out):
    export.ranges_work = False
    export.drop_after[TRAIN_0] = 2000

    fetch_from(export, out)

    assert (out / "fineweb_train_000000.bin").read_bytes() == export.files[TRAIN_0]
    assert export.fetched().count("fineweb_train_000000.bin") == 2


def test_a_busy_server_is_asked_again(export, out):
    export.statuses = {"manifest.json": [503], TRAIN_0: [429]}

    assert fetch_from(export, out).num_documents("train") == 3


def test_a_corrupted_shard_is_refused_and_leaves_nothing(export, out):
    export.files[TRAIN_0] = b"<html>" * 1000

    with pytest.raises(DataError, match=r"train_000000\.bin: http.* broken file \(not a shard"):
        fetch_from(export, out)

    assert not list(out.glob("fineweb_train_000000*"))
    assert not (out / "manifest.json").exists()


def test_a_published_checksum_is_held_against_the_file(export, out):
    manifest = json.loads(export.files["manifest.json"])
    manifest["datasets"][0]["sha256"] = {"fineweb_train_000000.bin": "0" * 64}
    export.files["manifest.json"] = json.dumps(manifest).encode()

    with pytest.raises(DataError, match=r"train_000000\.bin: .*\(sha256 is not the published"):
        fetch_from(export, out)


def test_a_damaged_local_shard_is_fetched_again(export, out):
    fetch_from(export, out)
    (out / "fineweb_train_000000.bin").write_bytes(b"damaged")

    fetch_from(export, out)

    assert (out / "fineweb_train_000000.bin").read_bytes() == export.files[TRAIN_0]


def test_a_shard_that_cannot_be_replaced_withdraws_the_manifest(export, out):
    fetch_from(export, out)
    (out / "fineweb_train_000000.bin").write_bytes(b"damaged")
    export.files[TRAIN_0] = b"damaged too"

    with pytest.raises(DataError):
        fetch_from(export, out)

    assert not (out / "manifest.json").exists()


def test_a_val_split_of_another_size_than_published_is_refused(export, out):
    export.put_manifest(files_train=2, files_val=1, tokens_val=7)

    with pytest.raises(DataError, match=r"val holds [\d,]+ tokens, the published manifest says 7"):
        fetch_from(export, out)


def test_no_network_is_one_line_that_says_what_to_do(tmp_path, out):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = Export(url=f"http://127.0.0.1:{closed.getsockname()[1]}")

        with pytest.raises(BackendError) as caught:
            fetch_from(nowhere, out)

    message = str(caught.value)
    assert "the network cannot be reached" in message
    assert "`fairway data prepare`" in message
    assert "--base-url" in message
    assert "\n" not in message
    assert not out.exists()


def test_an_export_that_is_not_there_is_a_usage_error(export, out):
    del export.files["manifest.json"]

    with pytest.raises(UsageError, match=r"manifest\.json: no such file \(HTTP 404\)"):
        fetch_from(export, out)


def test_a_variant_the_export_lacks_is_named(export, out):
    origin = Origin(base_url=export.url, repo="owner/export")

    with pytest.raises(DataError, match="no 'fineweb10B_sp512' among fineweb10B_sp1024"):
        fetch("sp512", out, origin=origin)


def test_a_variant_without_a_known_repository_asks_for_one(out):
    with pytest.raises(UsageError, match="variant 'sp512': known are sp1024"):
        fetch("sp512", out)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"<html>", b'{"datasets": 3}'])
def test_a_remote_manifest_of_another_kind_is_refused(export, out, content):
    export.files["manifest.json"] = content

    with pytest.raises(DataError, match=r"manifest\.json: does not list sp1024") as caught:
        fetch_from(export, out)

    assert "\n" not in str(caught.value)


def test_an_address_that_is_no_web_address_is_refused(tmp_path, out):
    with pytest.raises(UsageError, match="not an http or https address"):
        fetch_from(Export(url=f"file://{tmp_path}"), out)


def test_progress_names_every_file_and_ends_full(export, out):
    last: dict[str, tuple[int, int]] = {}

    fetch_from(
        export, out, progress=lambda name, done, total: last.__setitem__(name, (done, total))
    )

    assert last["fineweb_train_000000.bin"] == (len(export.files[TRAIN_0]),) * 2
    assert set(last) == {path.name for path in out.iterdir()} - {"manifest.json"}

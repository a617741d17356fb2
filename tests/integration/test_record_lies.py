"""Records that were forged with care: one seed, its papers written anew from an edited sheet."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.clean_room import CleanRoom
from service.record import By, Entry, Record, claims_of, log_name, requirements_of, sheet_name
from service.record_folder import open_folder
from service.record_log import log_text
from service.record_readme import readme_of
from service.sheet import read_sheet
from service.verify import Verification, verify
from tests.command import fairway
from tests.scored import Scored, scored_home
from trainer.errors import UsageError
from trainer.runtime.files import sha256_file

LAST_STEP = '{"step": 6, "at": 3.5, "train/loss": 3.7379, "train/clock_s": 0.075}'
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return scored_home(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def exported(home: Scored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "record"
    done = fairway("export", home.sweep_id, "-o", folder, "--home", home.paths.home)
    assert done.status == 0, done.lines
    return folder


@pytest.fixture
def record(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "record"))


def found_in(folder: Path, home: Scored, room: CleanRoom | None = None) -> Verification:
    return verify(open_folder(folder), lambda _: home.dataset, room or CleanRoom(os.environ))


def lines(found: Verification) -> list[str]:
    return [each.line() for each in found.mismatches]


def said_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "submission.json").read_text())


def forge(folder: Path, change: Change, **words: str) -> None:
    """Edit the sheet, or what people say, and write every paper anew from that."""
    said, path = said_in(folder), folder / sheet_name(7)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    weights_bytes = said["seed_results"]["7"]["weights_bytes"]
    entry = Entry(read_sheet(path), weights_bytes)
    people = {key: said[key] for key in ("author", "github_id", "name", "blurb", "date")}
    record = Record((entry,), By(**{**people, **words}), said["bytes_code"])
    last = LAST_STEP.replace('"step": 6', f'"step": {entry.sheet.result.steps}')
    (folder / log_name(7)).write_text(log_text(record, entry, [last]))
    (folder / "requirements.txt").write_text(requirements_of(record))
    (folder / "README.md").write_text(readme_of(record))
    hashes = {name: sha256_file(folder / name) for name in record.hashed_names}
    (folder / "submission.json").write_text(json.dumps(claims_of(record, hashes)))


def nothing(_: dict[str, Any]) -> None:
    pass


def result_of(**values: Any) -> Change:
    return lambda data: data["result"].update(values)


def one_rule(data: dict[str, Any]) -> None:
    trust_me = {"id": "clocks", "verdict": "pass", "detail": "8xH100, trust me", "source": "x"}
    data["result"]["audit"] = [trust_me]


def clocks_passed(data: dict[str, Any]) -> None:
    [rule] = [rule for rule in data["result"]["audit"] if rule["id"] == "clocks"]
    rule["verdict"] = "pass"


def huge(data: dict[str, Any]) -> None:
    for part in ("recipe", "train_task"):
        data[part]["model"]["num_layers"] = 300_000


def another_text(data: dict[str, Any]) -> None:
    [val] = [file for file in data["data"]["files"] if file["split"] == "val"]
    val["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (result_of(num_params=999_999_999), "result.num_params: claimed 999999999, found "),
        (one_rule, "audit coverage: claimed a whole audit, found no such rule"),
        (clocks_passed, "audit clocks: claimed pass: "),
        (huge, "train_task.model.num_layers: claimed 300000, found 2 in weights_seed7.fw"),
        (lambda data: data.update(threads=10**9), "threads: claimed 1000000000, found at most"),
        (lambda data: data.update(code_digest=None), "code_digest: claimed nothing, found what"),
        (lambda data: data["recipe"]["data"].update(name="x"), "data: claimed name "),
    ],
)
def test_a_sheet_that_lies_is_named_though_all_papers_agree_and_nothing_is_run(
    record: Path, home: Scored, change: Change, said: str
) -> None:
    forge(record, change)

    found = found_in(record, home)

    assert any(line.startswith(f"sheet_seed7.json: {said}") for line in lines(found)), lines(found)
    assert found.scored == {}
    assert any("train_gpt.py was not run" in note for note in found.notes)


def test_a_verdict_is_one_of_three_words(record: Path, home: Scored) -> None:
    sheet = record / sheet_name(7)
    sheet.write_text(sheet.read_text().replace('"verdict": "pass"', '"verdict": "PASS"', 1))

    [line] = lines(found_in(record, home))

    assert line.startswith("sheet_seed7.json: sheet: claimed readable, found result.audit")


def test_numbers_in_the_words_of_people_are_claims(record: Path, home: Scored) -> None:
    forge(
        record, nothing, name="Record with val_bpb 1.0123", blurb="val_bpb: 1.01234567 on 8 seeds"
    )
    readme = record / "README.md"
    readme.write_text(f"{readme.read_text()}\n**val_bpb: 1.01234567**\n")

    found = lines(found_in(record, home))

    nobody = "found nothing that was recorded"
    assert f"submission.json: name: claimed 1.0123, {nobody}" in found
    assert f"submission.json: blurb: claimed 1.01234567, {nobody}" in found
    assert any(line.startswith("README.md: line ") and nobody in line for line in found)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seeds_left_out": 1.5}, "seeds_left_out: expected scores by seed"),
        ({"author": []}, "author: expected a text"),
        ({"author": 0}, "author: expected a text"),
        ({"name": "a\nb"}, "name: one line of printable characters"),
        ({"date": "yesterday"}, "date: 'yesterday' is no date"),
    ],
)
def test_claims_of_another_form_are_refused_in_one_line(
    record: Path, home: Scored, values: dict[str, Any], said: str
) -> None:
    (record / "submission.json").write_text(json.dumps(said_in(record) | values))

    with pytest.raises(UsageError, match=r"submission\.json") as error:
        found_in(record, home)

    assert said in str(error.value)


def test_a_null_for_no_seeds_left_out_is_no_claim(record: Path, home: Scored) -> None:
    path = record / "submission.json"
    path.write_text(json.dumps(said_in(record) | {"seeds_left_out": None}))

    found = found_in(record, home)

    assert lines(found) == []
    assert any("what only `fairway replay` tells" in note for note in found.notes)


def test_an_edited_digest_is_named_and_not_taken_for_missing_data(
    record: Path, home: Scored
) -> None:
    sheet = record / sheet_name(7)
    data = json.loads(sheet.read_text())
    another_text(data)
    sheet.write_text(json.dumps(data))
    (record / log_name(7)).unlink()

    done = fairway("verify", record, "--home", home.paths.home)

    assert done.status == 3
    files = {line.split(":")[0] for line in done.out.splitlines()}
    assert files == {sheet_name(7), log_name(7)}


def test_a_score_without_an_end_is_a_mismatch(record: Path, home: Scored) -> None:
    [line] = lines(found_in(record, home, CleanRoom(os.environ, max_s=0.01)))

    assert line == "weights_seed7.fw: clean run: claimed a score, found no end within 0 s"


def test_a_score_is_the_same_where_sockets_are_refused(
    record: Path, home: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.clean_room._namespace", lambda: ())

    found = found_in(record, home)

    assert (lines(found), found.network) == ([], "sockets refused")


def test_export_refuses_what_other_code_has_scored(home: Scored, tmp_path: Path) -> None:
    copy = replace(home, paths=replace(home.paths, home=tmp_path / "home"))
    shutil.copytree(home.paths.home, copy.paths.home)
    for final in copy.finals():
        sheet = copy.sheet(final)
        data = json.loads(sheet.read_text())
        sheet.write_text(json.dumps(data | {"code_digest": "0" * 64}))

    done = fairway("export", home.sweep_id, "-o", tmp_path / "out", "--home", copy.paths.home)

    assert done.status == 2
    assert "scored by code 000000000000" in done.lines[0]
    assert "and export there" in done.lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--blurb", "val_bpb: 1.01234567"), "--blurb: 1.01234567 is nothing that was recorded"),
        (("--name", "a\nb"), "--name: one line of printable characters"),
        (("--date", "22.11.2026"), "--date: '22.11.2026' is no date"),
    ],
)
def test_export_writes_no_words_that_verify_would_refuse(
    home: Scored, tmp_path: Path, words: tuple[str, str], said: str
) -> None:
    done = fairway("export", home.sweep_id, "-o", tmp_path / "x", *words, "--home", home.paths.home)

    assert (done.status, len(done.lines)) == (2, 1)
    assert said in done.lines[0]
    assert list(tmp_path.iterdir()) == []


def test_export_fills_the_empty_folder_that_one_stands_in(
    home: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, theirs = tmp_path / "here", tmp_path / ".here.tmp"
    here.mkdir()
    theirs.mkdir()
    (theirs / "note").write_text("mine")
    paths = home.paths.home.resolve()
    monkeypatch.chdir(here)

    done = fairway("export", home.sweep_id, "-o", ".", "--home", paths)

    assert done.status == 0, done.lines
    assert (Path.cwd() / "submission.json").is_file()
    assert (theirs / "note").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".here.tmp", "here"]

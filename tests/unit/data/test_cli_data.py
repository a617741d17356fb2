import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli_data import app
from trainer.errors import DataError, UsageError


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    assert run(home, "prepare", "--embedded").exit_code == 0
    return home


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"FAIRWAY_HOME": str(home)})


def test_prepare_makes_a_dataset_and_prints_its_digest(tmp_path, embedded_documents):
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(embedded_documents[:20]), encoding="utf-8")
    options = ["--name", "mine", "--vocab-size", "400", "--val-fraction", "0.1"]

    result = run(tmp_path, "prepare", str(source), *options)

    manifest = json.loads((tmp_path / "data" / "mine" / "manifest.json").read_text())
    assert result.stdout == f"{manifest['digest']}\n"
    assert "stage=prepare item=documents total=20\n" in result.stderr
    assert manifest["tokenizer"]["vocab_size"] == 400


def test_prepare_without_text_says_what_to_give(tmp_path):
    error = run(tmp_path, "prepare").exception

    assert isinstance(error, UsageError)
    assert str(error).endswith("give text files and --name, or --embedded")


def test_a_name_that_leaves_the_home_is_refused(tmp_path):
    error = run(tmp_path, "verify", "../x").exception

    assert isinstance(error, UsageError)


def test_ls_shows_a_table(home):
    header, row = run(home, "ls").stdout.splitlines()

    assert header.split()[:2] == ["name", "state"]
    assert row.split()[:3] == ["embedded", "ready", "1024"]


def test_ls_prints_json_for_programs(home):
    rows = json.loads(run(home, "ls", "-o", "json").stdout)

    assert rows[0]["name"] == "embedded"
    assert rows[0]["documents"] == {"train": 415, "holdout": 13, "val": 13}


def test_ls_of_an_empty_home_is_an_empty_list(tmp_path):
    assert json.loads(run(tmp_path, "ls", "-o", "json").stdout) == []


def test_ls_shows_what_is_wrong_with_a_broken_dataset(tmp_path):
    (tmp_path / "data" / "half").mkdir(parents=True)

    row = json.loads(run(tmp_path, "ls", "-o", "json").stdout)[0]

    assert row["state"] == "broken"
    assert "manifest.json: no such file" in row["fault"]


def test_verify_prints_the_digest_of_a_sound_dataset(home):
    result = run(home, "verify", "embedded")

    assert result.exit_code == 0
    assert result.stdout.startswith("sha256:")


def test_verify_names_a_dataset_that_is_not_there(home):
    error = run(home, "verify", "nothing").exception

    assert isinstance(error, DataError)
    assert "nothing" in str(error)


def test_fetch_from_an_unreachable_address_is_refused(home):
    error = run(home, "fetch", "sp1024", "--base-url", "ftp://mirror").exception

    assert isinstance(error, UsageError)
    assert "--base-url" in str(error)

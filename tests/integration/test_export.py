"""Record folders: exported from a scored sweep, verified in a clean process, and tampered with."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.export import Given, export, find_configuration
from service.ledger import Ledger
from service.paths import Paths
from service.record import By, Entry, Record, claims_of, log_name, sheet_name
from service.record_log import log_text
from service.record_readme import readme_of
from service.sheet import read_sheet, write_sheet
from tests.command import Done, fairway
from tests.scored import Scored, scored_home
from trainer.runtime.files import sha256_file

SEEDS = (7, 8)
SWEEP = """\
name: two-clips
recipe: {recipe}
space:
  final.quantize.clip: {{values: [none, p5]}}
seeds: {{search: [7, 8]}}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Two configurations of two seeds each."""
    return scored_home(tmp_path_factory.mktemp("scored"), SWEEP)


@pytest.fixture(scope="module")
def exported(home: Scored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the sweep's best."""
    folder = tmp_path_factory.mktemp("records") / "best"
    words = ("--author", "A. Author", "--github", "author", "--name", "Two clips")
    done = fairway("export", home.sweep_id, "-o", folder, *words, "--home", home.paths.home)
    assert done.status == 0, done.lines
    return folder


@pytest.fixture(scope="module")
def exported_alone(home: Scored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of one seed, which is faster to verify."""
    folder = tmp_path_factory.mktemp("records") / "alone"
    where = ("-o", folder, "--home", home.paths.home)
    done = fairway("export", home.sweep_id, "--seeds", "one", *where)
    assert done.status == 0, done.lines
    return folder


@pytest.fixture
def alone(exported_alone: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_alone, tmp_path / "alone"))


@pytest.fixture
def record(exported: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(exported, tmp_path / "record"))


def verified(folder: Path, home: Scored, *words: object) -> Done:
    return fairway("verify", folder, "--home", home.paths.home, *words)


def edit(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert old in text, f"{old} is not in {path.name}"
    path.write_text(text.replace(old, new, count))


def claims(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "submission.json").read_text())


def other_digit(text: str) -> str:
    """The text with its last digit changed."""
    return text[:-1] + str((int(text[-1]) + 1) % 10)


def refresh(folder: Path) -> None:
    """Let submission.json have the sha256 that the files have."""
    data = claims(folder)
    data["files"] = {name: sha256_file(folder / name) for name in data["files"]}
    (folder / "submission.json").write_text(json.dumps(data))


def test_an_exported_record_verifies_in_a_clean_room(exported: Path, home: Scored) -> None:
    done = verified(exported, home, "-o", "json")

    assert done.status == 0, done.out
    found = json.loads(done.out)
    assert found["verified"]
    assert found["mismatches"] == []
    by_seed = claims(exported)["seed_results"]
    assert {int(seed): each["val_bpb"] for seed, each in by_seed.items()} == {
        int(seed): round(bpb, 8) for seed, bpb in found["val_bpb"].items()
    }
    assert found["network"] in ("network namespace", "sockets refused")


def test_a_record_has_the_fields_keys_and_every_seed(exported: Path) -> None:
    said = claims(exported)

    assert (said["author"], said["github_id"]) == ("A. Author", "author")
    assert said["name"] == "Two clips"
    assert said["track"] == "non_record_16mb"  # no H100s here
    assert sorted(said["seeds"]) == list(SEEDS)
    code = (exported / "train_gpt.py").stat().st_size
    weights = {seed: (exported / f"weights_seed{seed}.fw").stat().st_size for seed in SEEDS}
    assert said["bytes_code"] == code
    assert said["bytes_total"] == code + max(weights.values())
    assert {log_name(seed) for seed in SEEDS} == {path.name for path in exported.glob("*.log")}


def test_the_single_file_trains_every_seed_to_the_weights_of_the_record(
    exported: Path, home: Scored, tmp_path: Path
) -> None:
    shutil.copy(exported / "train_gpt.py", tmp_path)
    words = ["--data", str(home.dataset.folder.resolve()), "--seed", "8", "--out", "out"]

    done = subprocess.run(
        [sys.executable, "-I", "train_gpt.py", *words],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    result, said = json.loads(done.stdout), claims(exported)["seed_results"]["8"]
    assert result["weights_sha256"] == said["weights_sha256"]
    assert round(result["val_bpb"], 8) == said["val_bpb"]
    assert result["artifact_bytes"] == said["artifact_bytes"]


def test_an_exported_record_can_be_imported_as_a_baseline(exported: Path, tmp_path: Path) -> None:
    done = fairway("import", exported, "-o", tmp_path / "ours.yaml")

    assert done.status == 0, done.lines
    assert "remarks: []" in done.out  # all of its papers agree
    assert "within: 0.0" in done.out
    assert f"value: {claims(exported)['seed_results']['7']['val_bpb']}" in done.out


def test_one_edited_digit_anywhere_is_named_with_its_file_and_field(
    record: Path, home: Scored
) -> None:
    seven = claims(record)["seed_results"]["7"]
    bpb, loss = f"{seven['val_bpb']:.8f}", f"{seven['val_loss']:.8f}"
    torch = read_sheet(record / "sheet_seed7.json").final_worker
    assert torch is not None
    edit(record / "README.md", bpb, other_digit(bpb))
    edit(record / "README.md", "  dim: 32", "  dim: 33")
    edit(record / "submission.json", f'"val_loss": {seven["val_loss"]}',
         f'"val_loss": {other_digit(str(seven["val_loss"]))}')  # fmt: skip
    edit(record / "train_seed7.log", f"val_loss:{loss}", f"val_loss:{other_digit(loss)}")
    edit(record / "train_seed8.log", "step:2/6 train_loss:", "step:2/6 train_loss:1")
    edit(record / "requirements.txt", "torch==2", "torch==3")

    done = verified(record, home)

    assert done.status == 3
    lines = done.out.splitlines()
    assert lines == [
        line
        for line in lines
        if line.startswith(
            (
                f"submission.json: seed_results.7.val_loss: claimed {other_digit(loss)[:6]}",
                f"README.md: Seed 7, val_bpb: claimed {other_digit(bpb)}, found {bpb}",
                "README.md: dim: claimed 33, found 32",
                f"train_seed7.log: val_loss: claimed {other_digit(loss)}, found {loss}",
                "train_seed8.log: sha256: claimed ",
                "requirements.txt: line 2: claimed torch==3.",
            )
        )
    ]
    assert len(lines) == 6


def test_a_flipped_byte_a_missing_log_and_a_changed_sheet_are_named(
    record: Path, home: Scored
) -> None:
    weights = record / "weights_seed7.fw"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (record / "train_seed8.log").unlink()
    edit(record / "sheet_seed8.json", '"steps": 6', '"steps": 7')

    done = verified(record, home)

    assert done.status == 3
    found = {line.split(": claimed")[0]: line for line in done.out.splitlines()}
    assert "weights_seed7.fw: sha256" in found
    assert found["train_seed8.log: file"].endswith("found missing")
    assert found["README.md: Seed 8, Steps"] == "README.md: Seed 8, Steps: claimed 6, found 7"
    assert "sheet_seed8.json: sha256" in found


def test_weights_of_another_seed_and_a_failed_rule_are_named(alone: Path, home: Scored) -> None:
    [seed] = claims(alone)["seeds"]
    other = next(
        home.paths.store / "finals" / final / "artifact/weights.fw"
        for final, event in home.view().finals.items()
        if event["seed"] != seed
    )
    shutil.copy(other, alone / f"weights_seed{seed}.fw")
    edit(alone / f"sheet_seed{seed}.json", '"verdict": "pass"', '"verdict": "fail"')
    refresh(alone)

    done = verified(alone, home)

    assert done.status == 3
    assert f"weights_seed{seed}.fw: sha256: claimed" in done.out
    assert f"sheet_seed{seed}.json: audit coverage: claimed legal, found fail" in done.out


LAST_STEP = '{"step": 6, "at": 3.5, "train/loss": 3.7379, "train/clock_s": 0.075}'


def lie(folder: Path) -> str:
    """Write the whole record anew from a sheet with a better score than its weights have; return
    the sheet's name."""
    said = claims(folder)
    [seed] = said["seeds"]
    name = sheet_name(seed)
    sheet = read_sheet(folder / name)
    result = replace(sheet.result, val_bpb=sheet.result.val_bpb - 0.01)
    write_sheet(folder / name, replace(sheet, result=result))
    entry = Entry(read_sheet(folder / name), said["seed_results"][str(seed)]["weights_bytes"])
    people = By(**{key: said[key] for key in ("author", "github_id", "name", "blurb", "date")})
    left_out = {int(key): score for key, score in said["seeds_left_out"].items()}
    record = Record((entry,), people, said["bytes_code"], left_out)
    (folder / log_name(seed)).write_text(log_text(record, entry, [LAST_STEP]))
    (folder / "README.md").write_text(readme_of(record))
    hashes = {name: sha256_file(folder / name) for name in record.hashed_names}
    (folder / "submission.json").write_text(json.dumps(claims_of(record, hashes)))
    return name


def test_a_record_whose_papers_agree_on_a_lie_is_found_out_by_its_weights(
    alone: Path, home: Scored
) -> None:
    name = lie(alone)

    done = verified(alone, home)

    assert done.status == 3
    [line] = done.out.splitlines()
    assert line.startswith(f"{name}: result.val_bpb: claimed 3.")


def test_words_may_be_added_to_a_readme_but_no_number_of_their_own(
    alone: Path, home: Scored
) -> None:
    readme = alone / "README.md"
    known = f"{claims(alone)['val_bpb']:.4f}"
    words = f"\n## Why it works\n\nTwo clips, see #1855: {known}.\nWith luck 1.0451.\n"
    readme.write_text(readme.read_text() + words)

    done = verified(alone, home)

    assert done.status == 3
    [line] = done.out.splitlines()
    assert line.startswith("README.md: line ")
    assert line.endswith("claimed 1.0451, found nothing that was recorded")


def test_code_that_the_sheet_does_not_make_is_not_run_unless_it_is_trusted(
    record: Path, home: Scored, tmp_path: Path
) -> None:
    marker = tmp_path / "was run"
    code = f"open({str(marker)!r}, 'w').close(); print('{{}}')\n"
    (record / "train_gpt.py").write_text(code)
    refresh(record)

    done = verified(record, home)

    assert done.status == 3
    assert not marker.exists()
    assert any(line.startswith("train_gpt.py: sha256, as cut") for line in done.out.splitlines())
    trusted = verified(record, home, "--trust")
    assert trusted.status == 3
    assert marker.exists()
    assert "weights_seed7.fw: clean run: claimed a score" in trusted.out


def test_another_source_beside_the_counted_code_is_named_and_the_code_is_run(
    alone: Path, home: Scored
) -> None:
    edit(alone / "source/train_gpt.py", "import", "import sys\nimport")
    refresh(alone)

    done = verified(alone, home, "-o", "json")

    found = json.loads(done.out)
    assert done.status == 3
    assert [each["file"] for each in found["mismatches"]] == ["source/train_gpt.py"]
    assert len(found["val_bpb"]) == 1


def test_trusted_code_has_no_network_either(record: Path, home: Scored) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)\n"
        (record / "train_gpt.py").write_text(code)

        done = verified(record, home, "--trust")

        assert done.status == 3
        with pytest.raises(TimeoutError):
            server.accept()


def a_link(folder: Path) -> None:
    (folder / "weights_seed7.fw").unlink()
    (folder / "weights_seed7.fw").symlink_to("/dev/zero")


def endless(folder: Path) -> None:
    with (folder / "weights_seed7.fw").open("r+b") as file:
        file.truncate(1 << 40)


def outside(folder: Path) -> None:
    edit(folder / "submission.json", "7,", '"../../etc/passwd",')


def twice(folder: Path) -> None:
    edit(folder / "submission.json", "  8", "  7")


def deep(folder: Path) -> None:
    (folder / "submission.json").write_text('{"seeds":' + "[" * 100_000)


def no_name(folder: Path) -> None:
    edit(folder / "submission.json", '"name": "Two clips"', '"name": ["x"]')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (a_link, "'weights_seed7.fw' is a link"),
        (endless, "weights_seed7.fw: 1,099,511,627,776 bytes; at most"),
        (outside, "seeds: expected a list of whole numbers"),
        (twice, "seeds: one is listed twice"),
        (deep, "submission.json: not readable as JSON (nested too deep)"),
        (no_name, "submission.json: name: expected a text"),
    ],
)
def test_a_hostile_folder_is_refused_in_one_line(record: Path, home: Scored, spoil, said) -> None:
    spoil(record)

    done = verified(record, home)

    assert (done.status, len(done.lines), done.out) == (2, 1, "")
    assert said in done.lines[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"version": 1',
            '"version": 2',
            "sheet_seed7.json: sheet: claimed readable, found version",
        ),
        (
            '"device": "cpu"',
            '"device": "tpu"',
            "sheet_seed7.json: sheet: claimed readable, found d",
        ),
        ("{", "", "sheet_seed7.json: sheet: claimed readable, found not readable as JSON"),
    ],
)
def test_a_damaged_sheet_is_named(
    record: Path, home: Scored, old: str, new: str, said: str
) -> None:
    edit(record / "sheet_seed7.json", old, new)

    done = verified(record, home)

    assert done.status == 3
    assert done.out.splitlines()[0].startswith(said)


def test_a_recipe_that_is_not_the_one_that_ran_is_named_and_not_run(
    record: Path, home: Scored
) -> None:
    edit(record / "sheet_seed7.json", '"lr": 0.02', '"lr": 0.03', count=9)

    done = verified(record, home)

    assert done.status == 3
    assert any(line.startswith("sheet_seed7.json: training") for line in done.out.splitlines())
    assert any("train_gpt.py was not run" in line for line in done.lines)


def test_other_data_than_was_scored_is_refused_by_its_file(
    record: Path, home: Scored, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(home.dataset.folder, tmp_path / "data"))
    shard = next(data.glob("*val*.bin"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)

    done = verified(record, home, "--data", data)

    assert (done.status, len(done.lines)) == (2, 1)
    assert f"{shard}: sha256 differs from the sheet's" in done.lines[0]


def test_a_prefix_of_a_final_exports_its_configuration(home: Scored, tmp_path: Path) -> None:
    worst = max(
        home.finals(), key=lambda final: home.view().finals[final]["result"]["score"]["val_bpb"]
    )

    made = export(home.paths, worst[:8], tmp_path / "worst", Given())

    assert worst in [entry.sheet.final for entry in made.entries]
    assert sorted(entry.seed for entry in made.entries) == list(SEEDS)
    said = claims(tmp_path / "worst")
    assert (said["author"], said["github_id"]) == (None, None)
    assert "final.quantize.clip=" in said["blurb"]


def test_one_seed_alone_says_which_are_left_out(alone: Path, home: Scored) -> None:
    said = claims(alone)
    [seed], [left] = said["seeds"], said["seeds_left_out"]
    readme = (alone / "README.md").read_text()

    done = verified(alone, home)

    assert {seed, int(left)} == set(SEEDS)
    assert f"Not in this record, of the same configuration: seed {left} (3." in readme
    assert done.status == 0, done.out
    assert any("seeds_left_out was not checked" in line for line in done.lines)


def test_no_seed_without_a_result_is_dropped_in_silence(home: Scored, tmp_path: Path) -> None:
    paths = Paths(Path(shutil.copytree(home.paths.home, tmp_path / "home")))
    ledger = paths.sweep(home.sweep_id).ledger
    finals = find_configuration(paths, home.sweep_id).group.finals
    gone = finals[8]["final"]
    lines = [line for line in ledger.read_text().splitlines() if gone not in line]
    rewrite(lines, tmp_path / "events.jsonl")
    shutil.copy(tmp_path / "events.jsonl", ledger)
    out = tmp_path / "out"

    done = fairway("export", finals[7]["final"], "-o", out, "--home", paths.home)

    assert done.status == 3
    assert "no result for its seed 8" in done.lines[-1]
    assert not out.exists()


def rewrite(lines: list[str], path: Path) -> None:
    """Write events as a ledger of their own."""
    with Ledger(path) as ledger:
        for line in lines:
            event = json.loads(line)
            facts = {k: v for k, v in event.items() if k not in ("seq", "at", "event", "crc")}
            ledger.append(event["event"], **facts)


def test_export_refuses_a_folder_that_holds_something(home: Scored, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")

    done = fairway("export", home.sweep_id, "-o", tmp_path, "--home", home.paths.home)

    assert done.status == 2
    assert "not empty" in done.lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_export_refuses_weights_that_were_altered(home: Scored, tmp_path: Path) -> None:
    paths = Paths(Path(shutil.copytree(home.paths.home, tmp_path / "home")))
    for weights in paths.store.glob("finals/*/artifact/weights.fw"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")

    done = fairway("export", home.sweep_id, "-o", tmp_path / "out", "--home", paths.home)

    assert done.status == 2
    assert "altered since it was written" in done.lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]

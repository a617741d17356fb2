"""Published record folders as baselines: facts of real ones, and folders that are broken."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from service.baselines import Baseline, read_baseline
from service.published import read_published
from service.record_folder import open_folder
from tests.command import fairway
from trainer.errors import UsageError

RECORDS = Path(__file__).resolve().parents[1] / "golden/records"
# The tail of a log of the first script; its folder's submission.json was of another run for a time.
FIRST_LOG = """\
val_loader:shards pattern=data/fineweb_val_*.bin tokens:62021632
seed:1337
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""


@pytest.fixture
def pr414(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDS / "pr414", tmp_path / "pr414"))


@pytest.fixture
def pr1855(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDS / "pr1855", tmp_path / "pr1855"))


def imported(folder: Path, tokens: int | None = None) -> Baseline:
    return read_published(open_folder(folder), tokens)


def values(baseline: Baseline) -> dict[int, float]:
    return {result.seed: result.value for result in baseline.results}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def claims(folder: Path, **changes: object) -> None:
    """Change keys of submission.json; None removes one."""
    path = folder / "submission.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_a_records_logs_give_its_results_by_seed(pr414: Path) -> None:
    baseline = imported(pr414)

    assert values(baseline) == {1337: 1.12278022, 42: 1.12360306, 2024: 1.12356596}
    shipped = read_baseline("pr414")
    assert (baseline.tokens, baseline.bytes) == (shipped.tokens, shipped.bytes)


def test_a_later_form_of_record_is_read_too_and_its_papers_agree(pr1855: Path) -> None:
    baseline = imported(pr1855)

    assert values(baseline) == {42: 1.05989454, 0: 1.06124613, 1234: 1.06208695}
    assert baseline.remarks == ()
    shipped = read_baseline("pr1855")
    assert abs(baseline.bytes - shipped.bytes) < baseline.within * shipped.bytes
    assert "by Benjamin Hadad" in baseline.source


def test_where_a_published_record_disagrees_with_itself_is_remarked(pr414: Path) -> None:
    remarks = imported(pr414).remarks

    # Both are in the folder as it was published.
    assert remarks == (
        "submission.json: val_bpb 1.12278022 is seed 1337's; the mean of 3 seeds is 1.12331641",
        "seed 1337: README.md says steps 7101, the log 7096",
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("README.md", "**1.05989", "**1.05889", "README.md says post-ttt val_bpb 1.05889"),
        ("README.md", "15,900,947", "15,900,946", "seed 0: README.md says artifact 15,900,946"),
        ("README.md", "val_bpb: 1.06108", "val_bpb: 1.05989", None),
        ("README.md", "val_bpb: 1.06108", "val_bpb: 1.06009", "README.md begins with val_bpb 1.0"),
        ("README.md", "| 1234 |", "| 4321 |", "a result of seed 4321, which nothing else knows"),
        ("submission.json", "1.06124613", "1.06124614", "says val_bpb 1.06124614, train_seed0.log"),
        ("submission.json", '"steps": 4917', '"steps": 4918', "steps 4918, train_seed1234.log 49"),
        ("submission.json", "1.06107587", "1.06107486", "is neither the mean of its seeds"),
        ("submission.json", '_total": 159', '_total": 160', "16,007,550 bytes are no run's"),
        ("submission.json", "[42, 0, 1234]", "[42, 0, 7]", "seed 7 is listed in submission.json"),
    ],
)
def test_a_digit_that_disagrees_is_remarked(
    pr1855: Path, file: str, old: str, new: str, said: str | None
) -> None:
    edit(pr1855 / file, old, new)

    baseline = imported(pr1855)

    found = [remark for remark in baseline.remarks if said and said in remark]
    assert len(found) == (0 if said is None else 1), baseline.remarks
    assert values(baseline)[0] == 1.06124613  # the log's


def test_a_seed_that_only_a_log_knows_is_no_longer_left_out(pr1855: Path) -> None:
    data = json.loads((pr1855 / "submission.json").read_text())
    worst = data["seed_results"].pop("1234")
    claims(pr1855, seed_results=data["seed_results"], seeds=[42, 0])

    baseline = imported(pr1855)

    assert values(baseline)[1234] == worst["val_bpb"]
    assert any("seed 1234 has a log" in remark for remark in baseline.remarks)


def test_a_seed_without_a_log_counts_as_it_is_claimed_and_is_remarked(pr1855: Path) -> None:
    (pr1855 / "train_seed0.log").unlink()

    baseline = imported(pr1855)

    assert values(baseline)[0] == 1.06124613
    assert any("seed 0 has no log" in remark for remark in baseline.remarks)


def test_a_run_with_other_settings_is_told_apart(pr1855: Path) -> None:
    edit(pr1855 / "train_seed0.log", "reserve_seconds: 0.5", "reserve_seconds: 8.0")

    results = imported(pr1855).results

    odd = {result.seed: result.configuration for result in results}
    assert odd == {42: None, 0: "gptq_reserve_seconds=8.0", 1234: None}


def test_a_claim_of_another_score_in_the_log_is_found_there(pr414: Path) -> None:
    # The sliding window is the claim; a script may print another score after it.
    with (pr414 / "train_seed1337.log").open("a") as log:
        log.write("diagnostic_again val_loss:1.93592275 val_bpb:1.14656250\n")
    three = {"1337": {"val_bpb": 1.12278022}, "42": {"val_bpb": 1.123603}, "2024": {}}
    claims(pr414, seed_results=three)

    assert values(imported(pr414))[1337] == 1.12278022


def test_a_record_of_one_run_needs_no_results_by_seed(pr1855: Path) -> None:
    fatal_gap(pr1855)
    (pr1855 / "README.md").write_text("Exact: `final_int8_zlib_roundtrip_exact val_bpb:1.22436570`")
    claims(pr1855, val_bpb=1.2243657, val_loss=2.07269931, bytes_total=15863489, bytes_code=47642)

    baseline = imported(pr1855)

    assert values(baseline) == {1337: 1.2243657}
    assert baseline.remarks == ()


def test_what_else_a_published_folder_holds_is_no_obstacle(pr1855: Path) -> None:
    (pr1855 / ".DS_Store").write_bytes(b"\0")
    (pr1855 / "runs/lr 0.02").mkdir(parents=True)
    shutil.copy(pr1855 / "train_seed0.log", pr1855 / "runs/lr 0.02/train.log")

    baseline = imported(pr1855)

    assert values(baseline).keys() == {42, 0, 1234}
    said = "1 logs in subfolders were not read, such as runs/lr 0.02/train.log"
    assert baseline.remarks == (said,)


def test_an_artifact_over_the_cap_is_remarked(pr1855: Path) -> None:
    edit(pr1855 / "train_seed42.log", "pergroup: 15897259", "pergroup: 16000001")

    assert "seed 42: 16,000,001 bytes, 1 over the cap" in imported(pr1855).remarks


def test_without_a_token_count_in_a_log_it_has_to_be_given(pr1855: Path) -> None:
    for log in pr1855.glob("*.log"):
        edit(log, "val_tokens: 47851520\n", "")

    with pytest.raises(UsageError, match="how many tokens were scored; give them with --tokens"):
        imported(pr1855)
    assert imported(pr1855, tokens=47853343).tokens == 47853343


def fatal_gap(folder: Path) -> None:
    for log in folder.glob("*.log"):
        log.unlink()
    (folder / "train.log").write_text(FIRST_LOG)
    claims(folder, seed_results=None, seeds=None, val_bpb=1.21687994, val_loss=2.06035852)


def other_text(folder: Path) -> None:
    edit(folder / "train_seed0.log", "val_tokens: 47851520", "val_tokens: 40540160")


def other_ratio(folder: Path) -> None:
    edit(folder / "train_seed0.log", "val_loss:2.32239991", "val_loss:2.32239001")


def coarse(folder: Path) -> None:
    for log in folder.glob("*.log"):
        log.write_text("seed: 42\nval_tokens: 100\nfinal val_loss:2.3 val_bpb:0.1\n")
        (folder / "train.log").write_text(log.read_text())
        log.unlink()
    claims(folder, seed_results=None, seeds=None, val_bpb=0.1, val_loss=2.3)


def two_logs(folder: Path) -> None:
    shutil.copy(folder / "train_seed0.log", folder / "rerun_seed0.log")


def no_scores(folder: Path) -> None:
    for log in folder.glob("*.log"):
        log.write_text("Traceback\n")
    claims(folder, seed_results=None)


def no_seed(folder: Path) -> None:
    text = (folder / "train_seed0.log").read_text().replace("  seed: 0\n", "")
    (folder / "train.log").write_text(text)


def strange_total(folder: Path) -> None:
    claims(folder, val_bpb=1.0451)


def strange_seeds(folder: Path) -> None:
    claims(folder, seed_results={"best": {"val_bpb": 1.0}})


def a_link(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("/etc/hostname")


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "train.log")


def a_name(folder: Path) -> None:
    (folder / "train\x1b[2J.log").write_text("")


def a_long_log(folder: Path) -> None:
    with (folder / "train_seed0.log").open("ab") as file:
        file.truncate(1 << 26)


def deep_json(folder: Path) -> None:
    (folder / "submission.json").write_text('{"a":' * 100_000)


def twice(folder: Path) -> None:
    (folder / "submission.json").write_text('{"val_bpb": 1.0, "val_bpb": 1.2}')


def not_a_number(folder: Path) -> None:
    (folder / "submission.json").write_text('{"val_bpb": NaN}')


def endless_number(folder: Path) -> None:
    (folder / "submission.json").write_text('{"val_bpb": 1e99999999999}')


def a_list(folder: Path) -> None:
    (folder / "submission.json").write_text("[]")


def no_json(folder: Path) -> None:
    (folder / "submission.json").unlink()


def no_text(folder: Path) -> None:
    (folder / "train_seed0.log").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (fatal_gap, "val_bpb 1.21687994, train.log 1.22436570: nobody can tell"),
        (other_text, "different texts: 40,540,160 and 47,851,520 tokens"),
        (other_ratio, "were scored on different texts: val_loss / val_bpb amounts to"),
        (coarse, "have too few digits to tell how many bytes"),
        (two_logs, "seed 0 has 2 logs, rerun_seed0.log, train_seed0.log, and submission.json"),
        (no_scores, "no result by seed"),
        (no_seed, "train.log: says no seed"),
        (strange_total, "nobody can tell what it is of"),
        (strange_seeds, "seed_results: expected an object by seed"),
        (a_link, "'LICENSE' is a link"),
        (a_pipe, "'train.log' is neither a file nor a folder"),
        (a_name, "a name that can be printed is needed"),
        (a_long_log, "train_seed0.log: 67,108,864 bytes; at most 33,554,432 are read"),
        (deep_json, "submission.json: not readable as JSON (nested too deep)"),
        (twice, "key 'val_bpb' is given twice"),
        (not_a_number, "NaN is no number of JSON"),
        (endless_number, "is no number to work with"),
        (a_list, "submission.json: expected a JSON object"),
        (no_json, "submission.json: no such file"),
        (no_text, "train_seed0.log: not UTF-8 text (byte 0)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_be_believed_is_refused_in_one_line(
    pr1855: Path, spoil, said: str
) -> None:
    spoil(pr1855)

    with pytest.raises(UsageError, match=re.escape(said)) as refused:
        imported(pr1855)

    assert "\n" not in str(refused.value)


def test_import_writes_a_baseline_that_gates_take(pr414: Path, tmp_path: Path) -> None:
    out = tmp_path / "theirs.yaml"

    done = fairway("import", pr414, "-o", out)

    assert done.status == 0, done.lines
    assert values(read_baseline(str(out)))[42] == 1.12360306
    held = fairway("compare", "pr374", out)
    assert held.status == 0, held.lines
    assert "seed 1337: README.md says steps 7101" in held.out


def test_a_number_of_any_length_is_refused_in_one_line(pr414: Path, tmp_path: Path) -> None:
    path = pr414 / "submission.json"
    path.write_text(path.read_text().replace("{", '{"scored_tokens": 1' + "0" * 400 + ",", 1))

    done = fairway("import", pr414, "-o", tmp_path / "theirs.yaml")

    assert (done.status, len(done.lines)) == (2, 1)
    assert "submission.json: not readable as JSON (1000000000" in done.lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--recipe", "pr414"), "a record folder takes no --recipe"),
        (("-o", "theirs"), "name a new file that ends in .yaml"),
    ],
)
def test_import_says_what_a_record_folder_needs(pr414: Path, words, said: str) -> None:
    done = fairway("import", pr414, "-o", "theirs.yaml", *words)

    assert (done.status, len(done.lines)) == (2, 1)
    assert said in done.lines[0]


def test_import_keeps_a_file_that_is_there(pr414: Path, tmp_path: Path) -> None:
    out = tmp_path / "theirs.yaml"
    out.write_text("mine")

    done = fairway("import", pr414, "-o", out)

    assert done.status == 2
    assert out.read_text() == "mine"


def test_a_checkpoint_still_needs_its_recipe(tmp_path: Path) -> None:
    done = fairway("import", tmp_path / "final_model.pt", "-o", tmp_path / "bank")

    assert done.status == 2
    assert "name the recipe that fits it with --recipe" in done.lines[0]

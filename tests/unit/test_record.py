"""What a record claims, and that no digit of it can change unseen."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from service.facts import Gpu
from service.record import (
    By,
    Entry,
    Record,
    claims_of,
    facts_by_name,
    fault_in,
    requirements_of,
)
from service.record_audit import AUDIT_IDS, audit_mismatches
from service.record_folder import read_object
from service.record_log import head_of, log_text, tail_of
from service.record_readme import readme_of, texts_of
from service.record_text import (
    claim_mismatches,
    log_mismatches,
    people_mismatches,
    readme_mismatches,
    text_mismatches,
)
from service.run_logs import agree, read_log
from service.sheet import Sheet, sheet_of
from service.singlefile.packages import ATTENTION
from service.singlefile.write import write_single_file
from tests.scored import scored_home
from trainer.errors import DataError
from trainer.kernels.attention import PACKAGES
from trainer.specs.final import Brotli, Lzma, RangeCoder, Zlib, Zstd

BY = By(author="A. Author", github_id="author", name="Two", blurb="One | line.", date="2026-11-22")
JOURNAL = [
    '{"step": 0, "at": 1.5, "val/bpb": 4.98893846}',
    '{"step": 3, "at": 2.5, "train/loss": 4.30751, "train/clock_s": 0.055, "qat/on_grid": 0.5}',
    '{"step": 6, "at": 3.5, "train/loss": 3.7379, "train/clock_s": 0.075}',
]


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Sheet:
    home = scored_home(tmp_path_factory.mktemp("scored"))
    return sheet_of(home.paths, home.finals()[0])


@pytest.fixture(scope="module")
def record(sheet: Sheet) -> Record:
    """Two seeds; the second is the first one's sheet with a number of its own."""
    other = replace(sheet, seed=8, final="f" * 20, result=replace(sheet.result, val_bpb=3.5))
    return Record((Entry(sheet, 25_541), Entry(other, 25_600)), BY, 34_985)


def digits_changed(text: str) -> Iterator[tuple[str, str]]:
    """Each digit replaced by another: the text, and what was changed where."""
    for found in re.finditer(r"\d", text):
        at = found.start()
        yield text[:at] + str((int(found[0]) + 3) % 10) + text[at + 1 :], text[at - 20 : at + 9]


def test_no_digit_of_a_readme_changes_unseen(record: Record) -> None:
    text, known = readme_of(record), texts_of(record.wordless())

    unseen = [
        where
        for changed, where in digits_changed(text)
        if not list(readme_mismatches(text, changed, known))
    ]

    assert unseen == []
    assert list(readme_mismatches(text, text, known)) == []


def test_no_digit_of_a_logs_head_or_tail_changes_unseen(record: Record) -> None:
    entry = record.entries[0]
    head, tail = head_of(entry), tail_of(record, entry)
    steps = entry.sheet.result.steps
    text = log_text(record, entry, JOURNAL)
    curve = "\n".join(text.splitlines()[len(head) : -len(tail)])

    for changed, where in digits_changed("\n".join([*head, "CURVE", *tail])):
        found = list(log_mismatches("x.log", head, tail, changed.replace("CURVE", curve), steps))
        assert found, where
    assert list(log_mismatches("x.log", head, tail, text, steps)) == []


def test_a_logs_curve_is_in_order_and_ends_with_its_steps(record: Record) -> None:
    entry = record.entries[0]
    head, tail = head_of(entry), tail_of(record, entry)
    text = log_text(record, entry, [*JOURNAL, '{"step": 9, "at": 4.5, "val/bpb": 1.0}'])

    [found] = log_mismatches("x.log", head, tail, text, entry.sheet.result.steps)

    assert (
        found.line()
        == "x.log: training curve: claimed step 9 after step 6 of 6, found steps in order"
    )


def test_a_log_of_ours_reads_like_one_of_the_fields(record: Record) -> None:
    entry = record.entries[0]

    log = read_log("train_seed7.log", log_text(record, entry, JOURNAL))

    assert (log.seed, log.steps, log.tokens) == (7, 6, entry.sheet.result.tokens)
    assert (log.artifact_bytes, log.code_bytes) == (record.artifact_bytes(entry), 34_985)
    assert [str(score.val_bpb) for score in log.scores] == [f"{entry.sheet.result.val_bpb:.8f}"]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{path}.{key}" if path else key)


def with_leaf(value: Any, path: str, new: Any) -> Any:
    head, dot, rest = path.partition(".")
    return {**value, head: with_leaf(value[head], rest, new) if dot else new}


def test_every_claim_of_submission_json_that_changes_is_named_by_its_path(record: Record) -> None:
    expected = claims_of(record, {})
    said = read_object(json.dumps(expected), "submission.json")

    for path, value in leaves(said):
        others = [None, "x", Decimal("0.123"), [1], True]
        others += [value + 1] if isinstance(value, int | Decimal) else []
        for other in (each for each in others if (type(each), each) != (type(value), value)):
            [found] = claim_mismatches(expected, with_leaf(said, path, other))
            assert (found.file, found.field) == ("submission.json", path)
    assert list(claim_mismatches(expected, said)) == []


def test_a_claim_that_is_missing_or_that_nobody_made_is_named(record: Record) -> None:
    expected = claims_of(record, {})
    said = read_object(json.dumps({**expected, "p_value": 0.001}), "submission.json")
    del said["seed_results"]["8"]

    lines = [found.line() for found in claim_mismatches(expected, said)]

    assert lines[0].startswith("submission.json: seed_results.8: claimed nothing, found {")
    assert lines[1] == ("submission.json: p_value: claimed 0.001, found nothing that was recorded")


def test_a_table_names_row_and_column_and_another_line_its_words(record: Record) -> None:
    text, known = readme_of(record), texts_of(record.wordless())
    changed = text.replace("| 25,541 |", "| 25,540 |").replace("34,985 bytes,", "34,986 bytes,")

    lines = [found.line() for found in readme_mismatches(text, changed, known)]

    assert lines == [
        "README.md: Seed 7, Weights: claimed 25,540, found 25,541",
        "README.md: bytes. Artifact: train_gpt.py: claimed 34,986, found 34,985",
    ]


@pytest.mark.parametrize(
    ("added", "is_seen"),
    [
        ("We use 11 layers and PR #1855, of 2026-04-27.", False),
        ("Scores 3.5000 with seed 8.", False),
        ("Scores 3.4900 with seed 8.", True),
        ("The artifact has 12,345 bytes.", True),
        ("The artifact has 12345 bytes.", True),
        ("Runs on torch 2.13.0.", False),
        ("We reach 3.4900bpb.", True),
        ("It is bpb-3.4900 here.", True),
        ("And 3.5000bpb with seed 8.", False),
    ],
)
def test_an_added_line_may_repeat_numbers_but_not_bring_its_own(
    record: Record, added: str, is_seen: bool
) -> None:
    text, known = readme_of(record), texts_of(record.wordless())

    found = list(readme_mismatches(text, f"{text}\n{added}\n", known))

    assert bool(found) == is_seen


def test_no_row_is_added_to_a_table_of_the_record_nor_another_table_of_seeds(
    record: Record,
) -> None:
    text, known = readme_of(record), texts_of(record.wordless())
    row = next(line for line in text.splitlines() if line.startswith("| 7 |"))
    again = text.replace(row, f"{row}\n{row.replace('| 7 |', '| 1337 |')}")
    table = f"{text}\n| Seed | val_bpb |\n| --- | --- |\n| 1337 | 3.5000 |\n"
    own = f"{text}\n| Idea | val_bpb |\n| --- | --- |\n| two clips | 3.5000 |\n"

    [found] = readme_mismatches(text, again, known)
    seeds = list(readme_mismatches(text, table, known))

    assert found.claimed.startswith("| 1337 |") or found.claimed.startswith("| 7 |")
    assert found.found == "no such row was recorded"
    assert {each.found for each in seeds} == {"no such row was recorded"}
    assert list(readme_mismatches(text, own, known)) == []


def test_peoples_words_make_no_number_known(record: Record) -> None:
    lying = replace(record, by=replace(BY, name="val_bpb 1.0123", blurb="1.01234567bpb, lr 3.5000"))
    text, known = readme_of(lying), texts_of(lying.wordless())

    [added] = readme_mismatches(text, f"{text}\n**val_bpb: 1.01234567**\n", known)
    words = {"name": lying.by.name, "blurb": lying.by.blurb}
    lines = [each.line() for each in people_mismatches(words, known)]

    assert added.claimed == "1.01234567"
    assert lines == [
        "submission.json: name: claimed 1.0123, found nothing that was recorded",
        "submission.json: blurb: claimed 1.01234567, found nothing that was recorded",
    ]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"name": "a\nb"}, "name"),
        ({"author": "a\x1b[2J"}, "author"),
        ({"blurb": "| a |\n| 1 |"}, "blurb"),
        ({"blurb": "x" * 1_001}, "blurb"),
        ({"name": " "}, "name"),
        ({"date": "2026-13-01"}, "date"),
        ({"date": "20261122"}, "date"),
    ],
)
def test_peoples_words_are_short_lines_and_a_date(words: dict[str, str], field: str) -> None:
    assert fault_in(BY) is None

    fault = fault_in(replace(BY, **words))

    assert fault is not None
    assert fault[0] == field


def test_long_lines_are_refused_and_like_ones_compared_in_no_time(record: Record) -> None:
    text, known = readme_of(record), texts_of(record.wordless())
    letters = "".join(chr(0x4E00 + i * 7 % 4001) for i in range(60_000))

    with pytest.raises(DataError, match="line 1: 60,000 characters; at most"):
        list(readme_mismatches(text, letters, known))
    began = time.monotonic()
    [found, *_] = text_mismatches("x.log", letters, letters[:500] + "!" + letters[502:])

    assert found.file == "x.log"
    assert time.monotonic() - began < 1


def test_a_logs_curve_that_ends_early_is_named(record: Record) -> None:
    entry = record.entries[0]
    head, tail, steps = head_of(entry), tail_of(record, entry), entry.sheet.result.steps

    [none] = log_mismatches("x.log", head, tail, log_text(record, entry, []), steps)
    [early] = log_mismatches("x.log", head, tail, log_text(record, entry, JOURNAL[:2]), steps)

    assert none.line() == "x.log: training curve: claimed no step, found steps in order"
    assert early.claimed == "no step 6, the last is 3"


def test_an_audit_of_ours_has_every_rule(record: Record) -> None:
    assert {rule.id for rule in record.first.result.audit} == set(AUDIT_IDS)
    assert list(audit_mismatches(record.entries[0])) == []


def test_a_line_that_is_removed_or_put_into_a_log_is_named() -> None:
    text = "one:1\ntwo:2\nthree:3\n"

    [gone] = text_mismatches("x.log", text, "one:1\nthree:3\n")
    [new] = text_mismatches("x.log", text, text + "val_bpb:1.0\n")

    assert gone.line() == "x.log: line 2: claimed nothing, found two:2"
    assert new.line() == "x.log: line 4: claimed val_bpb:1.0, found nothing that was recorded"


def test_the_bytes_claimed_are_the_largest_seeds(record: Record) -> None:
    said = claims_of(record, {})

    assert said["bytes_total"] == 34_985 + 25_600
    assert said["seed_results"]["7"]["artifact_bytes"] == 34_985 + 25_541
    assert said["val_bpb"] == round((record.first.result.val_bpb + 3.5) / 2, 8)


def test_the_records_track_needs_both_clocks_kept_on_the_challenges_hardware(sheet: Sheet) -> None:
    def track(verdict: str) -> str:
        rules = tuple(
            replace(rule, verdict=verdict) if rule.id == "clocks" else rule
            for rule in sheet.result.audit
        )
        timed = replace(sheet, result=replace(sheet.result, audit=rules))
        return claims_of(Record((Entry(timed, 1),), BY, 1), {})["track"]

    assert track("pass") == "10min_16mb"
    assert track("not checked") == "non_record_16mb"


def test_what_was_not_recorded_is_left_out(sheet: Sheet) -> None:
    bare = replace(sheet, train_worker=None, final_worker=None, code_digest=None)
    record = Record((Entry(bare, 1),), BY, 1)

    said = claims_of(record, {})

    assert {"hardware", "pytorch_version", "val_bpb_std"} & said.keys() == set()
    assert "code_digest" not in said["fairway"]
    assert "# torch: not recorded" in requirements_of(record)
    assert "None" not in readme_of(record)


def test_facts_that_differ_between_seeds_are_told_by_seed(sheet: Sheet) -> None:
    worker = sheet.train_worker
    assert worker is not None
    h100 = replace(worker, device="cuda", torch="2.14.0", gpus=(Gpu(name="NVIDIA H100"),) * 8)
    other = replace(sheet, seed=8, train_worker=h100, world_size=8)

    rows = dict(facts_by_name([sheet, other]))

    assert (rows["torch, seed 7"], rows["torch, seed 8"]) == (worker.torch, "2.14.0")
    assert "torch" not in rows
    assert rows["numpy"] == worker.numpy
    said = claims_of(Record((Entry(other, 1),), BY, 1), {})
    assert said["hardware"] == "8x NVIDIA H100"
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in readme_of(
        Record((Entry(other, 1),), BY, 1)
    )


def test_the_commands_of_a_cpus_record_say_its_threads(sheet: Sheet) -> None:
    two = replace(sheet, threads=2, world_size=2)

    text = readme_of(Record((Entry(two, 1),), BY, 1))

    assert "\nOMP_NUM_THREADS=2 torchrun --standalone --nproc_per_node=2 train_gpt.py" in text
    assert "\nOMP_NUM_THREADS=2 python train_gpt.py --score" in text
    on_gpus = replace(two, device="cuda")
    assert "OMP_NUM_THREADS" not in readme_of(Record((Entry(on_gpus, 1),), BY, 1))


@pytest.mark.parametrize(
    ("compress", "packages"),
    [
        (Zstd(), {"zstandard"}),
        (Brotli(), {"brotli"}),
        (RangeCoder(), {"brotli", "constriction"}),
        (Lzma(), set()),
        (Zlib(), set()),
    ],
)
def test_requirements_are_what_the_single_file_needs(
    sheet: Sheet, compress: Any, packages: set[str], tmp_path: Path
) -> None:
    task = replace(sheet.final_task, final=replace(sheet.final_task.final, compress=compress))
    text = requirements_of(Record((Entry(replace(sheet, final_task=task), 1),), BY, 1))

    required = set(re.findall(r"^(\w+)==", text, re.MULTILINE))
    file = write_single_file(sheet.train_task, task, tmp_path, world_size=1)
    assert required == {"torch", "numpy", "sentencepiece", *packages} == set(file.packages)
    assert re.search(r"^torch==\d+\.\d+\.\d+(  # \S+)?$", text, re.MULTILINE)


def test_requirements_name_the_package_that_the_attention_came_from(sheet: Sheet) -> None:
    trained, scored = sheet.train_worker, sheet.final_worker
    assert trained is not None
    assert scored is not None
    fast = replace(trained, attention="flash_attn_4", flash_attn="4.0.0b36", fused=True)
    built = replace(scored, attention="flash_attn_3", flash_attn="3.0.0", fused=False)
    other = replace(sheet, train_worker=fast, final_worker=built)

    text = requirements_of(Record((Entry(other, 1),), BY, 1))

    assert text.endswith(
        "\n# flash-attn-3==3.0.0: build it from its source\nflash-attn-4==4.0.0b36\n"
    )
    assert "flash" not in requirements_of(Record((Entry(sheet, 1),), BY, 1))
    rows = dict(facts_by_name([other]))
    shown = ("attention", "flash_attn", "fused", "attention of evaluation", "fused of evaluation")
    told = [rows[name] for name in shown]
    assert told == ["flash_attn_4", "4.0.0b36", "True", "flash_attn_3", "False"]


def test_requirements_pin_a_package_once(sheet: Sheet) -> None:
    trained, scored = (
        replace(worker, attention="flash_attn_2", flash_attn=version)
        for worker, version in ((sheet.train_worker, "2.8.2"), (sheet.final_worker, "2.8.3+cu13"))
        if worker is not None
    )
    other = replace(sheet, train_worker=trained, final_worker=scored)

    text = requirements_of(Record((Entry(other, 1),), BY, 1))

    assert text.endswith("\nflash-attn==2.8.3  # 2.8.3+cu13\n# trained with flash-attn==2.8.2\n")


def test_the_distributions_of_attentions_are_those_that_are_looked_for() -> None:
    assert {name: each.distribution for name, each in PACKAGES.items()} == ATTENTION


@pytest.mark.parametrize(
    ("one", "other", "may_be"),
    [
        ("1.1233", "1.12331641", True),
        ("1.1233", "1.12335001", False),
        ("1.12278022", "1.12278022", True),
        ("1.12278022", "1.12278023", False),
        ("15.56", "15.555017", True),
        ("15.55", "15.555017", False),
        ("4945", "4946", False),
    ],
)
def test_printed_numbers_agree_where_one_may_be_rounded_to_the_other(
    one: str, other: str, may_be: bool
) -> None:
    assert agree(Decimal(one), Decimal(other)) == may_be

"""What keeps a replay from running, by name, and what is only noted."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.facts import WorkerFacts, process_facts
from service.replay import prepare
from service.replay_checks import check_workers, wanted_of
from service.sheet import Sheet, read_sheet
from tests.scored import Scored, on_both, on_final, scored_home
from trainer.errors import UsageError
from trainer.specs.final import Brotli


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return scored_home(tmp_path_factory.mktemp("scored"))


@pytest.fixture
def sheet(home: Scored) -> Sheet:
    return read_sheet(home.sheet(home.finals()[0]))


@pytest.fixture
def data(home: Scored, tmp_path: Path) -> Path:
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(home.dataset.folder, tmp_path / "data"))


def refusal(home: Scored, sheet: Sheet, data: Path | None = None, **words: Any) -> str:
    with pytest.raises(UsageError) as caught:
        prepare(home.paths, sheet, data, **words)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_where_nothing_differs_nothing_is_named(home: Scored, sheet: Sheet) -> None:
    prepared = prepare(home.paths, sheet, None)

    assert prepared.allowed == ()
    assert prepared.data == home.dataset.folder
    assert (prepared.device, prepared.num_ranks) == ("cpu", 1)


def test_one_changed_byte_of_the_data_is_named_by_its_file(
    home: Scored, sheet: Sheet, data: Path
) -> None:
    shard = data / "tiny_train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    told = refusal(home, sheet, data)

    was = next(file.sha256 for file in sheet.data.files if file.name == shard.name)
    assert "nothing was spent" in told
    assert f"data: {shard.name} sha256 {was[:12]} → {shard}: " in told
    assert "--allow data" in told


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), ": missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), ": 4,014 bytes"),
    ],
)
def test_a_missing_or_shortened_shard_is_named(
    home: Scored, sheet: Sheet, data: Path, damage: Any, fault: str
) -> None:
    damage(data / "tiny_val_000000.bin")

    assert f"tiny_val_000000.bin{fault}" in refusal(home, sheet, data)


def test_another_tokenizer_is_named(home: Scored, sheet: Sheet, data: Path) -> None:
    with (data / "tokenizer.model").open("ab") as file:
        file.write(b" ")

    assert "tokenizer.model sha256 " in refusal(home, sheet, data)


def test_totals_that_the_manifest_does_not_have_are_named(home: Scored, sheet: Sheet) -> None:
    splits = tuple(replace(split, documents=4) for split in sheet.data.splits[-1:])
    other = replace(sheet, data=replace(sheet.data, splits=splits))

    assert "data: val.documents 4 → 5 in " in refusal(home, other)


def test_a_gang_that_cannot_have_trained_it_is_refused(home: Scored, sheet: Sheet) -> None:
    told = refusal(home, replace(sheet, world_size=3))

    assert "world_size=3 workers do not share train.batch_tokens=256 evenly" in told


def test_data_that_is_not_here_is_asked_for(sheet: Sheet, home: Scored, tmp_path: Path) -> None:
    elsewhere = replace(home, paths=replace(home.paths, home=tmp_path))

    assert "name its folder with --data" in refusal(elsewhere, sheet)


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("torch", "2.9.1"),
        ("numpy", "1.26.4"),
        ("python", "3.10.14"),
        ("zstandard", "0.22.0"),
        ("libzstd", "1.5.5"),
        ("zlib", "1.2.11"),
        ("threads", 3),
        ("cpu_capability", "NEON"),
        ("matmul_precision", "medium"),
    ],
)
def test_what_can_change_a_byte_refuses_by_name(
    home: Scored, sheet: Sheet, name: str, recorded: Any
) -> None:
    told = refusal(home, on_both(sheet, **{name: recorded}))

    assert f"{name}: {recorded} → " in told
    assert f"--allow {name}" in told


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("brotli", "1.0.0"),  # this final is written by zstd
        ("liblzma", "5.2.0"),
        ("platform", "Linux-5.4"),
        ("cpu", "Another CPU"),
        ("num_cpus", 96),
        ("driver", "550.1"),
    ],
)
def test_what_moves_no_byte_is_noted_and_does_not_refuse(
    home: Scored, sheet: Sheet, name: str, recorded: Any
) -> None:
    prepared = prepare(home.paths, on_both(sheet, **{name: recorded}), None)

    assert [note.name for note in prepared.notes] == [name]


def test_each_stages_kernel_is_held_against_the_one_that_it_would_get_here(
    home: Scored, sheet: Sheet
) -> None:
    here = sheet.final_worker
    assert here is not None
    trained = replace(here, attention="flash_attn_4", flash_attn="4.0.0b36")

    def differing(trains: WorkerFacts) -> list[str]:
        told = replace(sheet, train_worker=trained)
        found = check_workers(told, trains, here, num_gpus=0)
        return [each.name for each in found if each.name in ("attention", "flash_attn")]

    assert differing(trained) == []
    assert differing(replace(trained, attention="cudnn", flash_attn=None)) == [
        "attention",
        "flash_attn",
    ]


def with_variable(sheet: Sheet, variable: str) -> Sheet:
    """The sheet of a final whose stages were computed with one more variable."""
    assert sheet.final_worker is not None
    return on_both(sheet, environment=(*sheet.final_worker.environment, variable))


def test_a_variable_that_sets_the_order_of_a_cpus_sums_refuses(home: Scored, sheet: Sheet) -> None:
    told = refusal(home, with_variable(sheet, "MKL_CBWR=COMPATIBLE"))

    assert "MKL_CBWR: COMPATIBLE → absent" in told
    assert told.endswith("--allow MKL_CBWR")


@pytest.fixture
def facts_read_anew() -> Iterator[None]:
    process_facts.cache_clear()
    yield
    process_facts.cache_clear()


@pytest.mark.usefixtures("facts_read_anew")
def test_such_a_variable_refuses_where_it_is_set_here_alone(
    home: Scored, sheet: Sheet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")

    assert "ONEDNN_MAX_CPU_ISA: absent → AVX2" in refusal(home, sheet)


@pytest.mark.parametrize("variable", ["MKL_NUM_THREADS=2", "NCCL_ALGO=Ring"])
def test_a_variable_that_moves_no_sum_of_a_cpu_is_noted(
    home: Scored, sheet: Sheet, variable: str
) -> None:
    prepared = prepare(home.paths, with_variable(sheet, variable), None)

    name, _, value = variable.partition("=")
    assert [(note.name, note.recorded, note.here) for note in prepared.notes] == [
        (name, value, "absent")
    ]


def test_who_went_on_with_a_training_is_held_against_this_machine_too(
    home: Scored, sheet: Sheet
) -> None:
    assert sheet.train_worker is not None
    later = replace(sheet.train_worker, torch="2.9.1")
    other = replace(sheet, train_worker=replace(sheet.train_worker, resumed=(later,)))

    assert "torch: 2.9.1 (training, resumed 1) → " in refusal(home, other)


def test_the_compressor_that_counts_is_the_one_of_the_final(home: Scored, sheet: Sheet) -> None:
    task = sheet.final_task
    by_brotli = replace(task, final=replace(task.final, compress=Brotli()))
    recipe = replace(sheet.recipe, final=by_brotli.final)
    other = replace(sheet, final_task=by_brotli, recipe=recipe, fitted=True)

    told = refusal(home, on_both(other, brotli="1.0.0", libzstd="1.5.5"))

    assert "brotli: 1.0.0 → " in told
    assert "libzstd" not in told


def test_a_patch_of_python_is_noted_only(home: Scored, sheet: Sheet) -> None:
    assert sheet.final_worker is not None
    minor = ".".join((sheet.final_worker.python or "").split(".")[:2])

    prepared = prepare(home.paths, on_both(sheet, python=f"{minor}.999"), None)

    assert [note.name for note in prepared.notes] == ["python"]


def test_a_fact_of_one_stage_alone_says_of_which(home: Scored, sheet: Sheet) -> None:
    assert "libzstd: 1.5.5 (final) → " in refusal(home, on_final(sheet, libzstd="1.5.5"))


def test_every_difference_is_named_at_once(home: Scored, sheet: Sheet) -> None:
    told = refusal(home, on_both(sheet, torch="2.9.1", libzstd="1.5.5"))

    assert "torch: 2.9.1 → " in told
    assert "libzstd: 1.5.5 → " in told
    assert told.endswith("--allow torch --allow libzstd")


def test_an_allowed_difference_lets_it_run(home: Scored, sheet: Sheet) -> None:
    prepared = prepare(home.paths, on_both(sheet, libzstd="1.5.5"), None, (), ["libzstd"])

    assert [(each.name, each.recorded) for each in prepared.allowed] == [("libzstd", "1.5.5")]


def test_one_allowed_difference_does_not_allow_another(home: Scored, sheet: Sheet) -> None:
    told = refusal(home, on_both(sheet, torch="2.9.1", libzstd="1.5.5"), allowed=["libzstd"])

    assert "torch: 2.9.1" in told
    assert "libzstd" not in told


def test_a_name_that_no_fact_has_is_refused(home: Scored, sheet: Sheet) -> None:
    assert "did you mean libzstd?" in refusal(home, sheet, allowed=["libzst"])


@pytest.mark.parametrize("name", ["train.sede", "train.seed", "driver", "code_digest"])
def test_a_name_that_nothing_which_counts_can_have_is_refused(
    home: Scored, sheet: Sheet, name: str
) -> None:
    told = refusal(home, sheet, values=[("train.seed", 8)], allowed=["seed", name])

    assert f"--allow {name}: nothing that counts, and no path of the recipe" in told


def test_a_name_like_none_is_refused_with_those_that_there_are(home: Scored, sheet: Sheet) -> None:
    told = refusal(home, sheet, allowed=["train.sede"])

    assert "known here: MKL_CBWR, ONEDNN_MAX_CPU_ISA, brotli, code, " in told
    assert "seed" in told.partition("known here: ")[2].split(", ")


@pytest.mark.parametrize("path", ["train.iterations", "final.prune", "final.quantize"])
def test_a_path_of_the_recipe_may_be_allowed_though_it_does_not_differ(
    home: Scored, sheet: Sheet, path: str
) -> None:
    values = [("train.iterations", 6), ("final.prune", None)]

    assert prepare(home.paths, sheet, None, values, [path]).allowed == ()


def test_another_seed_is_named(home: Scored, sheet: Sheet) -> None:
    assert "seed: 7 → 8;" in refusal(home, sheet, values=[("train.seed", 8)])


def test_another_value_is_named_by_its_path(home: Scored, sheet: Sheet) -> None:
    values = [("train.iterations", 9), ("final.prune", {"ratio": 0.1})]

    told = refusal(home, sheet, values=values)

    assert "train.iterations: 6 → 9; final.prune: absent → ratio=0.1" in told
    assert told.endswith("--allow train.iterations --allow final.prune")


def test_the_value_that_was_recorded_is_no_difference(home: Scored, sheet: Sheet) -> None:
    assert prepare(home.paths, sheet, None, [("train.seed", 7)]).allowed == ()


def test_a_clock_that_ended_nothing_is_left_out(sheet: Sheet) -> None:
    train = replace(sheet.train_task.train, max_clock_s=600.0)
    idle = replace(sheet, train_task=replace(sheet.train_task, train=train))
    ended = replace(idle, result=replace(sheet.result, steps=5))

    assert wanted_of(idle, ()).train_task.train.max_clock_s is None
    assert wanted_of(ended, ()).train_task.train.max_clock_s == 600.0


def test_what_the_sweep_was_started_from_is_noted(home: Scored, sheet: Sheet) -> None:
    driver = replace(sheet.driver, git_commit="9f1c2ab", image_digest="sha256:77", mlflow="3.0")

    prepared = prepare(home.paths, replace(sheet, driver=driver), None)

    notes = {note.name: note.recorded for note in prepared.notes}
    assert notes.items() >= {"git_commit": "9f1c2ab", "mlflow": "3.0"}.items()


def test_other_code_is_named(home: Scored, sheet: Sheet) -> None:
    told = refusal(home, replace(sheet, code_digest="0" * 64))

    assert "code: 000000000000 → " in told


def test_another_spec_version_is_named(home: Scored, sheet: Sheet) -> None:
    assert "spec: version 2 → version " in refusal(home, replace(sheet, spec_version=2))


def test_a_sheet_whose_seed_was_edited_everywhere_is_found_out_by_its_ids(
    home: Scored, sheet: Sheet
) -> None:
    train = replace(sheet.train_task.train, seed=8)
    task = replace(sheet.train_task, train=train)
    recipe = replace(sheet.recipe, train=replace(sheet.recipe.train, seed=8))

    told = refusal(home, replace(sheet, seed=8, train_task=task, recipe=recipe))

    assert f"training: {sheet.training} → " in told


def test_a_recipe_that_says_other_than_the_tasks_is_named_by_path(
    home: Scored, sheet: Sheet
) -> None:
    recipe = replace(sheet.recipe, train=replace(sheet.recipe.train, iterations=9))

    told = refusal(home, replace(sheet, recipe=recipe))

    assert "train.train.iterations: 6 in the tasks → 9 in the recipe" in told


@pytest.mark.parametrize("part", ["name", "digest"])
def test_a_recipe_that_names_other_data_than_the_sheet_is_found_out(
    home: Scored, sheet: Sheet, part: str
) -> None:
    data = replace(sheet.recipe.data, **{part: "f" * 64})
    told = refusal(home, replace(sheet, recipe=replace(sheet.recipe, data=data)))
    assert f"in the sheet → {'f' * 64} in the recipe" in told


def test_that_the_id_of_a_fitted_final_is_not_checked_is_noted(home: Scored, sheet: Sheet) -> None:
    prepared = prepare(home.paths, replace(sheet, fitted=True, final="f" * 20), None)
    assert "not checked: it was fitted" in " ".join(map(str, prepared.notes))


def test_facts_that_were_not_recorded_are_noted(home: Scored, sheet: Sheet) -> None:
    bare = replace(sheet, train_worker=None, final_worker=None, code_digest=None)

    prepared = prepare(home.paths, bare, None)

    assert [note.name for note in prepared.notes] == ["training facts", "final facts", "code"]

"""What keeps a replay from running, by name, and what is only noted; what counts as the same."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.facts import Gpu
from service.replay import DEFAULT_SD_BPB, PAIRS, Outcome, Prepared, compare, is_exact, prepare
from service.replay_checks import wanted_of
from service.sheet import Branch, Noise, Sheet, read_sheet
from tests.scored import Scored, scored_home
from trainer.codec import parse
from trainer.errors import UsageError
from trainer.results import FinalResult, TrainResult
from trainer.runtime.files import read_json
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


def on_final(sheet: Sheet, **facts: Any) -> Sheet:
    """The sheet of a final that was computed with other things."""
    assert sheet.final_worker is not None
    return replace(sheet, final_worker=replace(sheet.final_worker, **facts))


def on_both(sheet: Sheet, **facts: Any) -> Sheet:
    assert sheet.train_worker is not None
    return replace(on_final(sheet, **facts), train_worker=replace(sheet.train_worker, **facts))


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
        ("environment", ("MKL_NUM_THREADS=2",)),
    ],
)
def test_what_moves_no_byte_is_noted_and_does_not_refuse(
    home: Scored, sheet: Sheet, name: str, recorded: Any
) -> None:
    prepared = prepare(home.paths, on_both(sheet, **{name: recorded}), None)

    assert [note.name for note in prepared.notes] == [name]


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
    idle = with_train(sheet, max_clock_s=600.0)
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


def test_facts_that_were_not_recorded_are_noted(home: Scored, sheet: Sheet) -> None:
    bare = replace(sheet, train_worker=None, final_worker=None, code_digest=None)

    prepared = prepare(home.paths, bare, None)

    assert [note.name for note in prepared.notes] == ["training facts", "final facts", "code"]


@pytest.fixture
def on_gpus(sheet: Sheet) -> Sheet:
    """A sheet of a gang of eight GPUs, to be run on none."""
    gpus = tuple(Gpu(name="NVIDIA H200", uuid=f"GPU-{rank}") for rank in range(8))
    return replace(on_both(sheet, device="cuda", gpus=gpus), device="cuda", world_size=8)


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="is about a machine without")
def test_a_machine_without_the_gpus_is_refused(home: Scored, on_gpus: Sheet) -> None:
    told = refusal(home, on_gpus)

    assert "device: cuda → cpu" in told
    assert "world_size: 8 GPUs → 0 GPUs" in told


def results(home: Scored, sheet: Sheet) -> Outcome:
    """What the sheet's own stages returned."""
    final = home.paths.store / "finals" / sheet.final / "result.json"
    training = home.paths.store / "trainings" / sheet.training / "result.json"
    return Outcome(
        parse(TrainResult, read_json(training), "training"),
        parse(FinalResult, read_json(final), "final"),
    )


def prepared_for(home: Scored, sheet: Sheet, noise: Noise | None = None) -> Prepared:
    ready = prepare(home.paths, read_sheet(home.sheet(sheet.final)), None)
    return replace(ready, sheet=sheet, noise=noise or Noise())


def scored_as(outcome: Outcome, off_bpb: float) -> Outcome:
    assert outcome.final is not None
    score = outcome.final.score
    moved = replace(score, val_bpb=score.val_bpb + off_bpb)
    return replace(outcome, final=replace(outcome.final, score=moved, weights_sha256="1" * 64))


def test_on_a_cpu_one_other_byte_is_not_the_same(home: Scored, sheet: Sheet) -> None:
    same = compare(prepared_for(home, sheet), results(home, sheet))
    other = compare(prepared_for(home, sheet), scored_as(results(home, sheet), 0.0))

    assert (same["same"], same["criterion"]) == (True, "the same bytes")
    assert not other["same"]
    assert f"weights_sha256 {sheet.result.weights_sha256} → {'1' * 64}" in other["verdict"]


def test_what_is_not_the_same_says_which_fact_differs(home: Scored, sheet: Sheet) -> None:
    other = on_both(sheet, libzstd="1.5.5")
    prepared = prepare(home.paths, other, None, (), ["libzstd"])

    document = compare(prepared, scored_as(results(home, sheet), 0.0))

    assert "what differs here: libzstd: 1.5.5 → " in document["verdict"]


@pytest.mark.parametrize(("off", "same"), [(0.9, True), (1.1, False)])
def test_on_gpus_the_bpb_must_lie_within_the_noise_of_seeds(
    home: Scored, on_gpus: Sheet, off: float, same: bool
) -> None:
    outcome = scored_as(results(home, on_gpus), off * PAIRS * DEFAULT_SD_BPB)

    document = compare(prepared_for(home, on_gpus), outcome)

    assert document["same"] is same
    assert document["noise"]["source"] == "techniques 1.8"


def test_measured_noise_comes_before_the_stated_one(home: Scored, on_gpus: Sheet) -> None:
    outcome = scored_as(results(home, on_gpus), PAIRS * DEFAULT_SD_BPB)

    document = compare(prepared_for(home, on_gpus, Noise(sd_bpb=0.002, df=2)), outcome)

    assert document["same"]
    assert document["noise"] == {"sd_bpb": 0.002, "source": "measured"}


def test_a_quarantined_bank_is_not_the_same(home: Scored, sheet: Sheet) -> None:
    outcome = replace(results(home, sheet), final=None, quarantined="bank quarantined: 1e-3 apart")

    document = compare(prepared_for(home, sheet), outcome)

    assert (document["same"], document["verdict"]) == (False, "bank quarantined: 1e-3 apart")


def with_train(sheet: Sheet, **changes: Any) -> Sheet:
    task = replace(sheet.train_task, train=replace(sheet.train_task.train, **changes))
    return replace(sheet, train_task=task)


def test_bytes_are_asked_for_only_where_they_can_be_equal(sheet: Sheet, on_gpus: Sheet) -> None:
    branch = Branch(state="s0", step=4)
    unbound = with_train(sheet, max_clock_s=600.0)
    ended = replace(unbound, result=replace(sheet.result, steps=5))

    assert is_exact(sheet)
    assert is_exact(replace(sheet, branch=branch))
    assert is_exact(unbound)
    assert not is_exact(ended)  # by its clock
    assert not is_exact(with_train(replace(sheet, branch=branch), compile=True))
    assert not is_exact(on_gpus)

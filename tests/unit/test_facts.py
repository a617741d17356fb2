"""The facts that a run records: what it was started from, and what it was computed with."""

import hashlib
import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import brotli
import numpy
import pytest
import torch
import zstandard

from service import worker_facts as worker_facts_module
from service.attention import Kernel, ask, choice, of_evaluation, of_training, question_of
from service.facts import (
    Gpu,
    dirty_diff,
    driver_facts,
    of_gang,
    read_facts,
    write_facts,
)
from service.worker_facts import worker_facts
from tests import tiny
from trainer.errors import UsageError
from trainer.finalize.code import code_digest
from trainer.runtime.environment import without_secrets
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.kernels import AttentionKernel

CPU = torch.device("cpu")


def git(folder: Path, *words: str, text: bytes | None = None) -> str:
    """Run git there, whoever the machine's user is."""
    own = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *own, *words], input=text, capture_output=True, check=True
    )
    return done.stdout.decode().strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean checkout with one of our packages in it."""
    folder = tmp_path / "checkout"
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer" / "run.py").write_text("a = 1\n")
    (folder / "constraints.txt").write_text("torch==2.13.0\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_checkout_is_told_by_its_commit_alone(checkout: Path) -> None:
    facts = driver_facts(dirty_diff(checkout), checkout)

    assert facts.git_commit == git(checkout, "rev-parse", "HEAD")
    assert facts.git_dirty is False
    assert (facts.git_diff_sha256, facts.git_diff_bytes) == (None, None)


def test_the_diff_of_a_dirty_checkout_makes_its_commit_the_same_code(
    checkout: Path, tmp_path: Path
) -> None:
    (checkout / "trainer" / "run.py").write_text("a = 2  # ä\n")
    (checkout / "trainer" / "new.py").write_text("b = 3\n")
    (checkout / "notes.txt").write_text("no code of ours\n")

    diff = dirty_diff(checkout)
    facts = driver_facts(diff, checkout)

    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(checkout), str(other))
    git(other, "apply", text=diff)
    assert facts.git_dirty is True
    assert diff is not None
    assert facts.git_diff_bytes == len(diff)
    assert (other / "trainer" / "run.py").read_text() == "a = 2  # ä\n"
    assert (other / "trainer" / "new.py").read_text() == "b = 3\n"
    assert not (other / "notes.txt").exists()


def test_where_git_fails_nothing_is_known_of_the_tree(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRWAY_GIT_DIRTY", "false")  # of an image, and this is none
    (checkout / "trainer" / "run.py").write_text("a = 2\n")
    (checkout / ".git" / "index").write_bytes(b"junk")

    diff = dirty_diff(checkout)
    facts = driver_facts(diff, checkout)

    assert diff is None
    assert facts.git_dirty is None
    assert facts.git_commit is not None
    assert facts.git_diff_sha256 is None


def test_a_commit_that_git_cannot_tell_is_none(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRWAY_GIT_COMMIT", "9f1c2ab")
    (checkout / ".git" / "HEAD").write_text("ref: refs/heads/gone\n")

    assert driver_facts(dirty_diff(checkout), checkout).git_commit is None


def test_files_that_git_does_not_know_are_all_in_the_diff(checkout: Path, tmp_path: Path) -> None:
    names = ["empty.py", "grün.py", "two words.py"]
    for name in names:
        (checkout / "trainer" / name).write_text("" if name == "empty.py" else "b = 3\n")

    diff = dirty_diff(checkout)

    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(checkout), str(other))
    git(other, "apply", text=diff)
    assert {path.name for path in (other / "trainer").iterdir()} == {*names, "run.py"}


def test_a_diff_that_would_leave_files_out_is_none(checkout: Path) -> None:
    for number in range(201):
        (checkout / "trainer" / f"new{number}.py").write_text("b = 3\n")

    diff = dirty_diff(checkout)

    assert diff is None
    assert driver_facts(diff, checkout).git_dirty is True


def test_the_lock_file_is_named_and_hashed(checkout: Path) -> None:
    before = driver_facts(None, checkout)

    (checkout / "constraints.txt").write_text("torch==2.14.0\n")

    after = driver_facts(None, checkout)
    assert before.lock_file == "constraints.txt"
    assert before.lock_sha256 != after.lock_sha256


def test_an_image_says_what_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==2.13.0 --hash=sha256:0\n")
    monkeypatch.setenv("FAIRWAY_GIT_COMMIT", "9f1c2ab")
    monkeypatch.setenv("FAIRWAY_GIT_DIRTY", "false")
    monkeypatch.setenv("FAIRWAY_IMAGE_DIGEST", "sha256:77")
    monkeypatch.setenv("FAIRWAY_LOCK_FILE", str(lock))

    facts = driver_facts(None, tmp_path)

    assert (facts.git_commit, facts.git_dirty) == ("9f1c2ab", False)
    assert facts.image_digest == "sha256:77"
    assert facts.lock_file == "requirements.lock"
    assert len(facts.lock_sha256 or "") == 64


def test_the_diff_of_an_image_is_the_file_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dirty.diff").write_bytes(b"--- a/trainer/run.py\n")
    monkeypatch.setenv("FAIRWAY_GIT_COMMIT", "9f1c2ab")
    monkeypatch.setenv("FAIRWAY_GIT_DIFF", str(tmp_path / "dirty.diff"))

    diff = dirty_diff(tmp_path)
    facts = driver_facts(diff, tmp_path)

    assert diff == b"--- a/trainer/run.py\n"
    assert (facts.git_diff_sha256, facts.git_diff_bytes) == (hashlib.sha256(diff).hexdigest(), 21)


@pytest.mark.parametrize(
    ("commit", "name", "text"),
    [
        ("", "dirty.diff", b"-a\n"),
        ("9f1c2ab", "gone.diff", b"-a\n"),
        ("9f1c2ab", "dirty.diff", b""),
    ],
)
def test_an_image_without_a_commit_or_a_file_has_no_diff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str, name: str, text: bytes
) -> None:
    (tmp_path / "dirty.diff").write_bytes(text)
    monkeypatch.setenv("FAIRWAY_GIT_COMMIT", commit)
    monkeypatch.setenv("FAIRWAY_GIT_DIFF", str(tmp_path / name))

    assert dirty_diff(tmp_path) is None


@pytest.mark.parametrize("told", ["", "perhaps"])
def test_what_nobody_tells_is_none_and_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setenv("FAIRWAY_GIT_COMMIT", "")
    monkeypatch.setenv("FAIRWAY_GIT_DIRTY", told)

    facts = driver_facts(None, tmp_path)

    assert (facts.git_commit, facts.git_dirty) == (None, None)
    assert (facts.lock_file, facts.lock_sha256, facts.image_digest) == (None, None, None)


def test_a_sweeps_own_process_is_told_of_the_image_but_of_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAIRWAY_GIT_COMMIT", "9f1c2ab")
    monkeypatch.setenv("FAIRWAY_GIT_DIFF", "/opt/dirty.diff")
    monkeypatch.setenv("FAIRWAY_TOKEN", "secret")

    handed = without_secrets()

    assert handed["FAIRWAY_GIT_COMMIT"] == "9f1c2ab"
    assert handed["FAIRWAY_GIT_DIFF"] == "/opt/dirty.diff"
    assert "FAIRWAY_TOKEN" not in handed


def test_a_worker_tells_the_libraries_that_it_has_loaded() -> None:
    facts = worker_facts(CPU)

    assert facts.device == "cpu"
    assert (facts.torch, facts.numpy) == (torch.__version__, numpy.__version__)
    assert facts.libzstd == ".".join(map(str, zstandard.ZSTD_VERSION))
    assert facts.brotli == brotli.__version__
    assert facts.threads == torch.get_num_threads()
    assert facts.code_digest == code_digest()
    assert "OMP_NUM_THREADS=1" in facts.environment  # as tests/conftest.py sets it


def test_a_worker_on_a_cpu_names_no_gpu() -> None:
    facts = worker_facts(CPU)

    assert facts.gpus == ()
    assert (facts.cuda, facts.cudnn, facts.nccl, facts.driver) == (torch.version.cuda, *3 * [None])


def test_a_gang_has_the_gpus_of_all_its_ranks() -> None:
    ranks = [
        replace(worker_facts(CPU), gpus=(Gpu(name="H200", uuid=f"GPU-{rank}"),)) for rank in "01"
    ]

    assert [gpu.uuid for gpu in of_gang(ranks).gpus] == ["GPU-0", "GPU-1"]


def test_the_kernel_of_a_model_is_one_that_torch_has() -> None:
    asked = question_of(tiny.bare_model(), "cpu", "float32", 32)

    assert choice(asked, learns=True) in ("flash", "math")


def test_the_kernel_of_a_spec_is_the_one_it_gets_here() -> None:
    kernel = AttentionKernel(name="flash_attn_4")
    evaluate = EvaluateSpec(window=32, stride=16, attention=kernel)
    asked = of_evaluation(tiny.bare_model(), "cpu", "float32", evaluate)
    other = replace(evaluate, attention=replace(kernel, substitute="torch"))
    substituted = of_evaluation(tiny.bare_model(), "cpu", "float32", other)

    with pytest.raises(UsageError, match=r"^evaluate.attention.name=flash_attn_4: .*CUDA"):
        choice(asked, learns=False)
    plain = question_of(tiny.bare_model(), "cpu", "float32", 32)
    assert choice(substituted, learns=False) == choice(plain, learns=False)


def test_a_kernel_that_is_asked_for_is_run_apart() -> None:
    train = replace(
        tiny.recipe({"train.dtype": "bfloat16"}).train, attention=AttentionKernel(name="cudnn")
    )
    asked = of_training(tiny.bare_model(), "cpu", train)

    told = ask(asked)
    beside = ask(replace(asked, kernel=Kernel("train.attention"), others=(asked.kernel,)))

    assert (told.backend, beside.backend) == (None, None)
    assert told.at_hand == ("torch",)
    assert told.why == beside.why
    assert told.why.startswith("train.attention.name=cudnn: it needs a CUDA device")


def test_the_version_of_the_attentions_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_facts_module, "version_of", {"flash-attn-4": "4.0.0b36"}.get)

    assert worker_facts(CPU, attention="flash_attn_4").flash_attn == "4.0.0b36"
    assert worker_facts(CPU, attention="flash_attn_3").flash_attn is None
    assert worker_facts(CPU, attention="flash").flash_attn is None


def test_facts_from_before_there_were_kernels_are_read(tmp_path: Path) -> None:
    old = asdict(worker_facts(CPU, attention="flash"))
    for name in ("fused", "triton", "flash_attn"):
        del old[name]
    (tmp_path / "facts.json").write_text(json.dumps(old))

    found = read_facts(tmp_path)

    assert found is not None
    assert (found.attention, found.fused, found.flash_attn) == ("flash", None, None)


def test_facts_are_read_as_they_were_written(tmp_path: Path) -> None:
    facts = worker_facts(CPU, attention="flash")

    write_facts(tmp_path, facts)

    assert read_facts(tmp_path) == facts


def test_who_goes_on_with_a_stage_is_told_beside_who_began_it(tmp_path: Path) -> None:
    first = worker_facts(CPU)
    second = replace(first, torch="2.9.1")
    write_facts(tmp_path, first)

    for facts in (second, first, second):
        write_facts(tmp_path, facts, goes_on=True)

    assert read_facts(tmp_path) == replace(first, resumed=(second,))


def test_who_starts_a_stage_over_is_told_alone(tmp_path: Path) -> None:
    second = replace(worker_facts(CPU), torch="2.9.1")
    write_facts(tmp_path, worker_facts(CPU))

    write_facts(tmp_path, second)

    assert read_facts(tmp_path) == second


def test_who_resumed_is_resumed_by_nobody(tmp_path: Path) -> None:
    facts = json.loads('{"device": "cpu"}')
    nested = {**facts, "resumed": [{**facts, "resumed": [facts]}]}
    (tmp_path / "facts.json").write_text(json.dumps(nested))

    with pytest.raises(UsageError, match=r"resumed: holds no further resumed"):
        read_facts(tmp_path)


def test_a_missing_fact_is_written_as_null(tmp_path: Path) -> None:
    write_facts(tmp_path, worker_facts(CPU))

    written = json.loads((tmp_path / "facts.json").read_text())

    assert written["attention"] is None
    assert set(written) == set(asdict(worker_facts(CPU)))


def test_a_stage_from_before_facts_were_kept_has_none(tmp_path: Path) -> None:
    assert read_facts(tmp_path) is None


def test_an_unknown_fact_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text('{"device": "cpu", "torhc": "2.13"}')

    with pytest.raises(UsageError, match=r"facts\.json: torhc: unknown key; did you mean torch"):
        read_facts(tmp_path)

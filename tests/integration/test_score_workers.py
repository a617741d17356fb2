"""`fairway score` in several processes and within a budget, on the public script's checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from service.cli import main
from service.local_ranks import WorkerLost, run_ranks
from service.rescore import Asked, Job, Model, score_job, undisturbed
from service.scored_text import Source
from tests import golden_pr414, local_work, tiny
from tests.integration.test_import import SMALL
from trainer.artifacts import make_artifact
from trainer.codec import dump
from trainer.errors import DataError, UsageError
from trainer.evaluate.progress import Silent
from trainer.model.build import build
from trainer.protocol import UNKNOWN_TOKENIZER
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import write_json
from trainer.scoring import Text
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.task import artifact_task, final_task, train_task

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0
FOLDER = golden_pr414.FOLDER
SCORE = (
    "score", FOLDER / "final_model.pt.xz", "--recipe", "pr414", *SMALL,
    "--tokens", FOLDER / "tokens.npy", "--tokenizer", FOLDER / "tokenizer.model",
    "--window", 128, "--stride", 64, "--limit", 700, "-o", "json",
)  # fmt: skip


def fairway(home, *words):
    """Call the command line in this process; its status, standard output and lines of talk."""
    out, err, status = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fairway", *map(str, words), "--home", str(home)])
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
    return status, out.getvalue(), err.getvalue().splitlines()


def scored(home, *words):
    status, out, lines = fairway(home, *SCORE, *words)
    assert status == 0, lines
    return json.loads(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return scored(tmp_path_factory.mktemp("home"))


def gone(pids):
    """Whether these processes end within a while."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() and is_alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_in(folder, num_ranks):
    deadline = time.monotonic() + PATIENCE_S
    while len(list(folder.glob("*.pid"))) < num_ranks:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [int((folder / f"{rank}.pid").read_text()) for rank in range(num_ranks)]


def test_four_workers_give_the_totals_of_one(alone, tmp_path):
    shared = scored(tmp_path, "--workers", 4)

    for result in (alone, shared):
        del result["eval_clock_s"]
    assert shared == alone
    assert alone["tokens"] == 700


def test_the_evaluation_is_told_by_path_and_by_flag(alone, tmp_path):
    ttt = ("-S", "evaluate.ttt.kind=sgd", "-S", "evaluate.ttt.chunk_tokens=256")

    still = scored(tmp_path, *ttt, "-S", "evaluate.ttt.epochs=1", "-S", "evaluate.ttt.lr=0")
    apart = scored(tmp_path, "--documents")

    assert still["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)
    assert apart["val_loss"] != alone["val_loss"]
    assert apart["bytes"] == alone["bytes"]


def test_a_budget_picks_what_fits_and_says_why(alone, tmp_path):
    status, out, lines = fairway(tmp_path, *SCORE, "--limit", 130, "--budget-seconds", 1e6)

    assert status == 0
    assert json.loads(out)["picked"] == {"stride": 4}
    estimates = [line for line in lines if line.startswith("event=estimate")]
    assert len(estimates) == 6
    assert all(line.endswith("fits=yes") for line in estimates)
    assert any(line.startswith("event=picked stride=4 seconds=") for line in lines)


def test_a_budget_that_nothing_fits_spends_nothing(tmp_path):
    status, out, lines = fairway(tmp_path, *SCORE, "--budget-seconds", 1e-6)

    assert (status, out) == (3, "")
    assert "the quickest way (stride=128) takes about" in lines[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("-S", "evaluate.windows=3"), "score: windows: unknown key; did you mean window?"),
        (("--entry", "raw"), "is no bank; leave it out"),
        (("--workers", 0), None),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, words, line):
    status, out, lines = fairway(tmp_path, *SCORE, *words)

    assert (status, out) == (2, "")
    assert line is None or line in lines[-1]


def test_a_public_file_without_its_recipe_asks_for_it(tmp_path):
    status, _, lines = fairway(tmp_path, *SCORE[:2], *SCORE[SCORE.index("--tokens") :])

    assert status == 2
    assert lines[-1].endswith("a public script's file needs --recipe")


def test_a_value_of_the_recipe_needs_one(tmp_path):
    words = (*SCORE[:2], "-S", "model.dim=8", *SCORE[SCORE.index("--tokens") :])

    status, _, lines = fairway(tmp_path, *words)

    assert status == 2
    assert lines == ["-S model.dim: only evaluate.… is set here, or a --recipe's value"]


def test_text_that_counts_other_bytes_than_it_decodes_to_is_refused(tmp_path):
    """A tokenizer that keeps spaces inside its pieces: the byte table would be wrong."""
    words = list(SCORE)
    words[words.index("--tokens") + 1] = spaced_tokens(tmp_path)
    words[words.index("--tokenizer") + 1] = tmp_path / "spaced.model"

    status, out, lines = fairway(tmp_path, *words[: words.index("--limit")])

    assert (status, out) == (2, "")
    assert "bits per byte would be wrong" in lines[-1]


def spaced_tokens(folder):
    """Train a tokenizer whose pieces hold spaces, and write a text in it."""
    words = [
        "the old clock sees the river again and again",
        "a small dog paints the old clock",
    ] * 30
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=300, model_type="bpe",
        split_by_whitespace=False, byte_fallback=True, hard_vocab_limit=False, bos_id=1, eos_id=2,
        pad_id=0, unk_id=3, minloglevel=2,
    )  # fmt: skip
    (folder / "spaced.model").write_bytes(model.getvalue())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    np.save(folder / "spaced.npy", np.array([1, *tokenizer.encode(words[0])]))
    return folder / "spaced.npy"


def test_an_entry_of_a_trainings_bank_scores_as_its_training_did(tiny_dataset, tmp_path):
    folder = tmp_path / "store" / "trainings" / "4bc"
    trained = train(train_task(tiny.recipe()), tiny_dataset, folder, Ranks())
    shutil.copytree(tiny_dataset.folder, tmp_path / "data" / "tiny")
    words = ("--data", "tiny", "--window", 32, "-o", "json")

    found = [
        json.loads(fairway(tmp_path, "score", ref, "--entry", trained.parity_entry, *words)[1])
        for ref in (folder, folder / "bank", "4b")
    ]
    status, _, lines = fairway(tmp_path, "score", folder, *words)

    bpb = [score["val_bpb"] for score in found]
    assert bpb == [pytest.approx(trained.parity_bpb, rel=1e-9)] * 3
    assert status == 2
    assert lines[-1].endswith("say which entry of the bank: --entry raw | ema-0.5 | ema-0.9 | swa")


def test_a_final_is_scored_again_by_torchs_own_kernels_unless_others_are_named(
    tiny_dataset, tmp_path
):
    shutil.copytree(tiny_dataset.folder, tmp_path / "data" / "tiny")
    recipe = tiny.recipe({"train.dtype": "bfloat16", "evaluate.attention": {"name": "cudnn"}})
    training, final = tmp_path / "training", tmp_path / "store" / "finals" / "abc"
    train(train_task(recipe), tiny_dataset, training, Ranks())
    task = final_task(recipe)
    make_artifact(artifact_task(task), training, tiny_dataset, final, None, Ranks())
    write_json(final / "task.json", dump(task))
    words = ("score", "abc", "--data", "tiny")

    status, out, lines = fairway(tmp_path, *words, "-o", "json")
    named = fairway(tmp_path, *words, "-S", "evaluate.attention.name=cudnn")

    assert status == 0, lines
    assert json.loads(out)["val_bpb"] > 0
    assert named[0] == 2
    assert named[2][-1].startswith("evaluate.attention.name=cudnn: it needs a CUDA device")


def test_a_score_that_was_cut_short_goes_on(tmp_path):
    class Cut(Silent):
        predictions, most, before = 0, 10**6, 0

        def resumed(self, predictions):
            self.before = predictions

        def advance(self, predictions):
            self.predictions += predictions
            if self.predictions > self.most:
                raise KeyboardInterrupt

    spec = tiny.full_model(vocab_size=1024)
    model = Model(spec, build(spec, seed=0).state_dict(), UNKNOWN_TOKENIZER, tmp_path)
    text = Text(np.load(FOLDER / "tokens.npy")[:501], FOLDER / "tokenizer.model", "text")
    evaluate = EvaluateSpec(window=32, stride=8, batch_windows=4)
    job = Job(tmp_path, Asked(), tmp_path, Source(), evaluate, tmp_path / "a" / "b", "key", 0.0)
    whole = score_job(replace(job, journal=tmp_path / "whole"), model, text, Ranks(), Cut())
    cut, later = Cut(), Cut()
    cut.most = 300

    with pytest.raises(KeyboardInterrupt), undisturbed(job.journal):
        score_job(job, model, text, Ranks(), cut)
    with undisturbed(job.journal):
        again = score_job(job, model, text, Ranks(), later)

    assert 0 < later.before < 500 == later.before + later.predictions
    assert replace(again, eval_clock_s=0.0) == replace(whole, eval_clock_s=0.0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_finished_score_and_a_second_process_is_told_to_wait(tmp_path):
    journal = tmp_path / "scores" / "key"

    with undisturbed(journal):
        second = undisturbed(journal)
        with pytest.raises(UsageError, match="key: another process is at the same score; wait"):
            second.__enter__()

    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")

    status, _, lines = fairway(tmp_path / "file", *SCORE)

    assert status == 2
    assert lines[-1].endswith(".lock: Not a directory; take another --home")


def test_ranks_add_up_and_their_progress_is_heard():
    class Heard(Silent):
        predictions = 0

        def advance(self, predictions):
            self.predictions += predictions

    heard = Heard()

    assert run_ranks(local_work.add_up, 10, 2, heard) == 21
    assert heard.predictions == 3


def test_a_killed_worker_is_one_error_and_takes_the_others_along(tmp_path):
    killer = subprocess.Popen(
        [sys.executable, "-c", "import os, sys, time, signal, pathlib\n"
         "f = pathlib.Path(sys.argv[1])\n"
         "while len([*f.glob('*.pid')]) < 2: time.sleep(0.05)\n"
         "os.kill(int((f / '1.pid').read_text()), signal.SIGKILL)", str(tmp_path)]
    )  # fmt: skip

    with pytest.raises(WorkerLost, match="worker 1 of 2 was killed by SIGKILL; run the same"):
        run_ranks(local_work.wait_for_ever, tmp_path, 2, Silent())

    killer.wait()
    assert gone(pids_in(tmp_path, 2))


def test_workers_do_not_outlive_their_caller(tmp_path):
    call = (
        "import sys; from pathlib import Path; from service.local_ranks import run_ranks; "
        "from tests import local_work; from trainer.evaluate.progress import Silent; "
        "run_ranks(local_work.wait_for_ever, Path(sys.argv[1]), 2, Silent())"
    )
    caller = subprocess.Popen([sys.executable, "-c", call, str(tmp_path)], cwd=ROOT)
    pids = pids_in(tmp_path, 2)

    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()

    assert gone(pids)


def test_an_error_of_a_worker_is_the_callers():
    with pytest.raises(DataError, match=r"x\.npy: broken"):
        run_ranks(local_work.fail, "foreseen", 2, Silent())


def test_a_bug_in_a_worker_comes_with_its_trace():
    with pytest.raises(RuntimeError, match=r"(?s)worker 1 of 2 failed:.*ZeroDivisionError: a bug"):
        run_ranks(local_work.fail, "bug", 2, Silent())

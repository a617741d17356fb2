"""The single file by itself: it trains, finalizes and scores to what the trainer leaves."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from service.singlefile.write import write_single_file
from tests import tiny
from trainer.__main__ import main
from trainer.codec import parse, read_recipe, to_yaml, with_values
from trainer.data.shards import Dataset
from trainer.specs.final import Brotli, Compress, Lzma, RangeCoder, Zlib
from trainer.specs.recipe import Recipe
from trainer.specs.task import final_task, train_task

RECIPES = Path(__file__).resolve().parents[2] / "tune_spaces/recipes"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Where Fairway and what only it needs cannot be imported.
ALONE = """\
import runpy, sys
for name in ("trainer", "service", "tune_spaces", "pydantic", "yaml"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MICRO = {
    "data.name": "tiny",
    "train.iterations": 6,
    "train.batch_tokens": 512,
    "train.seq_len": 64,
    "train.schedule.warmdown_iters": 3,
    "evaluate.window": 64,
    "evaluate.stride": 32,
}


class Pair(NamedTuple):
    """A recipe's file, and what the trainer says of the same recipe."""

    folder: Path
    path: Path
    result: dict[str, Any]


def shipped(name: str) -> Recipe:
    data = with_values(read_recipe(RECIPES / f"{name}.yaml"), MICRO.items())
    return parse(Recipe, data, name)


def adapting() -> Recipe:
    """Hessians of training text, and SGD on what is scored."""
    ttt = {"kind": "sgd", "chunk_tokens": 256, "freeze_tables": True}
    gptq = {"sequences": 4, "seq_len": 32}
    return tiny.recipe({"final.average": "swa", "final.quantize.gptq": gptq, "evaluate.ttt": ttt})


def adapting_by_document() -> Recipe:
    """Hessians of the model's own text, repairs, our own coder, LoRA in phases, late QAT."""
    plain = tiny.recipe(
        {
            "model.head": {},
            "train.qat": {"mlp_bits": 6, "start": {"progress": 0.5}},
            "final.quantize.gptq": {"calibration": "generated", "sequences": 2, "seq_len": 16},
            "final.quantize.lqer": {},
            "final.prune": {"larger_than": 100},
            "evaluate.documents": {},
            "evaluate.ttt": {
                "kind": "lora",
                "rank": 2,
                "batch_documents": 4,
                "phases": {"documents": 4, "count": 2},
            },
        }
    )
    return replace(plain, final=replace(plain.final, compress=RangeCoder()))


# Every optional part of the model at once.
RICH = {
    "model.num_layers": 4,
    "model.bigram": {"num_buckets": 32, "dim": 8},
    "model.trigram": {"num_buckets": 16, "dim": 8},
    "model.smear": {"kind": "v2", "width": 6},
    "model.attention.xsa": {"last": 2},
    "model.attention.shared_kv": {},
    "model.attention.rope": {"dims": 4, "ntk_reference": 6},
    "model.value_embedding": {"dim": 8, "last": 2},
    "model.mlp": {"activation": {"kind": "swiglu"}},
    "model.ln_scale": {"learned": True},
    "model.dtg": {},
    "model.unet": {"gate": {}},
    "model.recurrence": {"first": 1, "last": 2},
    "model.head": {},
    "model.mtp": {"num_heads": 2},
}
QAT_NOW = {
    "train.qat": {"mlp_bits": 6, "attention_bits": 5, "other_bits": 4, "scale": "tensor"},
    "final.quantize.clip": "p5",
    "final.quantize.clip_scope": "matrix",
    "final.quantize.symmetric": False,
}
QAT_LATE_LR = {
    "train.qat": {"mlp_bits": 6, "start": {"lr_scale": 0.5}},
    "final.average": "swa",
    "final.quantize.clip": "sd12",
    "final.prune": {"larger_than": 100, "tables": True, "ratio": 0.2},
}
FLASH = {"name": "flash_attn_4", "substitute": "torch"}
KERNELS = {
    "train.fused": True,
    "train.attention": FLASH,
    "train.documents": {},
    "evaluate.fused": True,
    "evaluate.attention": {"name": "cudnn", "substitute": "torch"},
}
ORACLE = {"evaluate.ttt": {"kind": "oracle", "epochs": 1}}
PARTS: dict[str, tuple[dict[str, Any], Compress | None]] = {
    "rich": (RICH, Brotli()),
    "qat-now": (QAT_NOW, Lzma()),
    "qat-late-lr": (QAT_LATE_LR, Zlib()),
    "oracle": (ORACLE, None),
}
CASES: dict[str, Callable[[], Recipe]] = {
    "tiny": lambda: shipped("tiny"),
    "baseline": lambda: shipped("baseline-tiny"),
    "pr414": lambda: shipped("pr414-tiny"),
    "compile": lambda: tiny.recipe({"train.compile": True}),
    "kernels": lambda: tiny.recipe(KERNELS),
    "gptq-sgd": adapting,
    "gptq-lora": adapting_by_document,
}


def call(*words: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=500,
        check=False,
    )


def trained(recipe: Recipe, dataset: Dataset, folder: Path, *launcher: str) -> dict[str, Any]:
    """Walk the trainer's own line and return its result."""
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    words = ("-m", "trainer") if not launcher else (*launcher, "-m", "trainer")
    done = call(*words, path, "--data", dataset.folder, "-o", folder / "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def paired(recipe: Recipe, dataset: Dataset, folder: Path, world_size: int = 1) -> Pair:
    made = write_single_file(train_task(recipe), final_task(recipe), folder / "record", world_size)
    return Pair(folder, made.path, trained(recipe, dataset, folder))


@pytest.fixture(scope="module")
def plain(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return paired(tiny.recipe(), tiny_dataset, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def finished(plain: Pair, tiny_dataset: Dataset) -> Path:
    """The folder in which the plain recipe's file has run."""
    out = plain.folder / "alone"
    done = call(plain.path, "--data", tiny_dataset.folder, "--out", out, cwd=plain.folder)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_file_alone_leaves_the_weights_and_the_score_of_the_trainer(
    name: str, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    pair = paired(CASES[name](), tiny_dataset, tmp_path)

    out = ("--out", tmp_path / "alone")
    done = call("-I", "-c", ALONE, pair.path, "--data", tiny_dataset.folder, *out, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["weights_sha256"] == pair.result["weights_sha256"]
    assert result["val_bpb"] == pair.result["score"]["val_bpb"]
    assert result["weights_bytes"] == pair.result["weights_bytes"]


@pytest.mark.parametrize("name", PARTS)
def test_the_source_leaves_the_weights_and_the_score_of_the_trainer(
    name: str,
    tiny_dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, compress = PARTS[name]
    recipe = tiny.recipe(values)
    if compress is not None:
        recipe = replace(recipe, final=replace(recipe.final, compress=compress))
    path, data = tmp_path / "recipe.yaml", ("--data", str(tiny_dataset.folder))
    path.write_text(to_yaml(recipe), encoding="utf-8")
    main([str(path), *data, "-o", str(tmp_path / "out")])
    expected = json.loads(capsys.readouterr().out)
    made = write_single_file(train_task(recipe), final_task(recipe), tmp_path, world_size=1)
    words = [str(made.source_path), *data, "--out", str(tmp_path / "alone")]
    monkeypatch.setattr(sys, "argv", words)

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(made.source_path), run_name="__main__")

    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert result["val_bpb"] == expected["score"]["val_bpb"]
    assert result["audit"] == "not done by this file"


def test_what_counts_is_the_file_itself_beside_the_weights(plain: Pair, finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text(encoding="utf-8"))
    files = {path.name: path.stat().st_size for path in (finished / "artifact").iterdir()}

    assert set(files) == {"weights.fw", "train_gpt.py"}
    assert (finished / "artifact/train_gpt.py").read_bytes() == plain.path.read_bytes()
    assert result["artifact_bytes"] == sum(files.values())
    assert result["code_bytes"] < plain.result["code_bytes"]


def test_a_weights_file_is_scored_in_a_fresh_model(
    plain: Pair, finished: Path, tiny_dataset: Dataset
) -> None:
    weights = finished / "artifact/weights.fw"

    done = call(plain.path, "--score", weights, "--data", tiny_dataset.folder, cwd=plain.folder)

    assert json.loads(done.stdout)["val_bpb"] == plain.result["score"]["val_bpb"]


def test_the_readable_source_scores_like_the_packed_file(
    plain: Pair, finished: Path, tiny_dataset: Dataset
) -> None:
    source = plain.path.parent / "source/train_gpt.py"
    weights = finished / "artifact/weights.fw"

    done = call(source, "--score", weights, "--data", tiny_dataset.folder, cwd=plain.folder)

    assert json.loads(done.stdout)["val_bpb"] == plain.result["score"]["val_bpb"]


def test_another_seed_is_trained_as_the_trainer_does(
    plain: Pair, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    result = trained(tiny.recipe({"train.seed": 7}), tiny_dataset, tmp_path)

    words = ("--data", tiny_dataset.folder, "--out", tmp_path / "alone", "--seed", "7")
    done = call(plain.path, *words, cwd=tmp_path)

    assert json.loads(done.stdout)["weights_sha256"] == result["weights_sha256"]
    assert result["weights_sha256"] != plain.result["weights_sha256"]


def test_two_workers_train_under_torchrun_as_the_trainer_does(
    plain: Pair, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    result = trained(tiny.recipe(), tiny_dataset, tmp_path, *TORCHRUN)

    words = ("--data", tiny_dataset.folder, "--out", tmp_path / "alone", "--any-workers")
    done = call(*TORCHRUN, plain.path, *words, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "alone/result.json").read_text(encoding="utf-8"))
    assert found["weights_sha256"] == result["weights_sha256"]
    assert found["world_size"] == 2


def test_a_file_says_in_one_line_what_it_cannot_do(
    plain: Pair, finished: Path, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.fw"
    shutil.copy(finished / "artifact/weights.fw", weights)
    with weights.open("r+b") as file:
        file.seek(5)
        file.write(b"\x01")  # said to be written by brotli
    calls = {
        "holds an earlier training": ("--data", tiny_dataset.folder, "--out", finished),
        "manifest.json": ("--data", tmp_path),
        "written by brotli": ("--data", tiny_dataset.folder, "--score", weights),
    }

    for said, words in calls.items():
        done = call(plain.path, *words, cwd=tmp_path)

        assert (done.returncode, done.stdout) == (2, ""), said
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_another_number_of_workers_than_recorded_is_refused_in_one_line(
    tiny_dataset: Dataset, tmp_path: Path
) -> None:
    recipe, data = tiny.recipe(), ("--data", tiny_dataset.folder)
    made = write_single_file(train_task(recipe), final_task(recipe), tmp_path, world_size=2)

    done = call(made.path, *data, "--out", tmp_path / "alone", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("1 workers: the recorded weights are of 2;")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "alone").exists()


def test_a_missing_compressor_is_asked_for_before_the_training(
    tiny_dataset: Dataset, tmp_path: Path
) -> None:
    plain = tiny.recipe()
    recipe = replace(plain, final=replace(plain.final, compress=RangeCoder()))
    made = write_single_file(train_task(recipe), final_task(recipe), tmp_path, world_size=1)
    words = ("--data", tiny_dataset.folder, "--out", tmp_path / "alone")

    done = call("-c", ALONE.replace('"yaml"', '"brotli"'), made.path, *words, cwd=tmp_path)

    assert done.returncode == 2
    assert "the brotli package is missing" in done.stderr
    assert not (tmp_path / "alone").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have it")
def test_a_missing_attention_is_asked_for_before_the_training(
    tiny_dataset: Dataset, tmp_path: Path
) -> None:
    recipe = tiny.recipe({"evaluate.attention": {"name": "flash_attn_4"}})
    made = write_single_file(train_task(recipe), final_task(recipe), tmp_path, world_size=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    data = ("--data", tiny_dataset.folder)

    alone = call(made.path, *data, "--out", tmp_path / "alone", cwd=tmp_path)
    ours = call("-m", "trainer", path, *data, "-o", tmp_path / "ours", cwd=tmp_path)

    for done, folder in ((alone, "alone"), (ours, "ours")):
        assert done.returncode == 2
        assert done.stderr.startswith("evaluate.attention.name=flash_attn_4: it needs a CUDA")
        assert not (tmp_path / folder).exists()


def test_weights_of_another_model_are_refused(
    finished: Path, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    other = tiny.recipe({"model.dim": 64})
    made = write_single_file(train_task(other), final_task(other), tmp_path, world_size=1)

    weights = finished / "artifact/weights.fw"
    done = call(made.path, "--data", tiny_dataset.folder, "--score", weights, cwd=tmp_path)

    assert done.returncode == 2
    assert "holds another model than this file's" in done.stderr

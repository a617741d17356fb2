"""The single file on CUDA devices: compiled, in bfloat16, over NCCL, as the trainer does it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.singlefile.write import write_single_file
from trainer.codec import parse, read_recipe, to_yaml, with_values
from trainer.data.prepare import prepare_embedded
from trainer.specs.recipe import Recipe
from trainer.specs.task import final_task, train_task

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPE = Path("tune_spaces/recipes/baseline.yaml")
SMALL: dict[str, Any] = {
    "data.name": "embedded",
    "train.max_clock_s": None,
    "train.schedule": {"basis": "steps", "warmdown_iters": 20},
    "train.iterations": 60,
    "train.batch_tokens": 65_536,
    "train.micro_batch_tokens": 32_768,
    "model.num_layers": 4,
}


KERNELS: dict[str, Any] = {
    "train.fused": True,
    "train.attention": {"name": "flash_attn_4", "substitute": "cudnn"},
    "evaluate.attention": {"name": "flash_attn_4", "substitute": "cudnn"},
}


def call(*words: Any, workers: int = 1) -> str:
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}")
    launcher = torchrun if workers > 1 else ()
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "kernels"), [(1, {}), (2, {}), (1, KERNELS)])
def test_the_file_alone_scores_what_it_trains_as_the_trainer_does(
    workers: int, kernels: dict[str, Any], tmp_path: Path
) -> None:
    if torch.cuda.device_count() < workers:
        pytest.skip(f"fewer than {workers} CUDA devices")
    recipe = parse(Recipe, with_values(read_recipe(RECIPE), (SMALL | kernels).items()), "small")
    path, data = tmp_path / "recipe.yaml", prepare_embedded(tmp_path / "data").folder
    path.write_text(to_yaml(recipe), encoding="utf-8")
    words = ("-m", "trainer", path, "--data", data, "-o", tmp_path / "out")
    expected = json.loads(call(*words, workers=workers))
    file = write_single_file(train_task(recipe), final_task(recipe), tmp_path, workers).path

    call(file, "--data", data, "--out", tmp_path / "alone", workers=workers)

    result = json.loads((tmp_path / "alone/result.json").read_text(encoding="utf-8"))
    assert result["world_size"] == workers
    # Sums on a GPU come in no fixed order, so two trainings are a seed's noise apart.
    assert result["val_bpb"] == pytest.approx(expected["score"]["val_bpb"], abs=0.05)
    weights = tmp_path / "alone/artifact/weights.fw"
    again = json.loads(call(file, "--data", data, "--score", weights))
    assert again["val_bpb"] == pytest.approx(result["val_bpb"], abs=1e-3)

"""The trainer on a CUDA device: bfloat16, compiled, scored again by a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPE = Path("tune_spaces/recipes/baseline.yaml")
SMALL = (
    "data.name=embedded",
    "train.max_clock_s=null",
    "train.schedule={basis: steps, warmdown_iters: 20}",
    "train.iterations=60",
    "train.batch_tokens=65536",
    "train.order=shuffled",
    "model.num_layers=4",
)


def run(out: Path, *overrides: str) -> dict:
    words = [word for text in (*SMALL, *overrides) for word in ("-S", text)]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", str(RECIPE), "-o", str(out), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def trained(out: Path) -> dict:
    return json.loads((out / "training/result.json").read_text())


@pytest.mark.timeout(900)
def test_a_compiled_bfloat16_training_lands_where_the_eager_one_does(tmp_path: Path):
    run(tmp_path / "compiled")
    run(tmp_path / "eager", "train.compile=false")

    compiled, eager = trained(tmp_path / "compiled"), trained(tmp_path / "eager")
    assert compiled["parity_bpb"] == pytest.approx(eager["parity_bpb"], abs=0.05)
    assert compiled["parity_bpb"] < compiled["untrained_val_bpb"] - 1.0


@pytest.mark.timeout(900)
def test_a_fresh_process_scores_the_bank_as_the_trainer_did(tmp_path: Path):
    result = run(tmp_path)

    verdicts = {rule["id"]: rule["verdict"] for rule in result["audit"]}
    assert verdicts["parity"] == "pass"
    assert result["score"]["val_bpb"] == pytest.approx(trained(tmp_path)["parity_bpb"], abs=0.02)

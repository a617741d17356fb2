"""The techniques of the published systems on a CUDA device: bfloat16, compiled into one graph."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

COMPILED = ("train.dtype=bfloat16", "train.compile=true")


def train(recipe: str, out: Path, *overrides: str) -> tuple[dict, str]:
    """Train a shipped recipe compiled; return the training's result and what torch logged."""
    words = [word for text in (*COMPILED, *overrides) for word in ("-S", text)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trainer",
            f"tune_spaces/recipes/{recipe}.yaml",
            "-o",
            str(out),
            *words,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"TORCH_LOGS": "recompiles"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "training/result.json").read_text()), done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["pr361", "pr414", "pr951", "pr348", "pr610"])
def test_a_recipe_trains_compiled_and_no_graph_is_built_after_the_first(name: str, tmp_path: Path):
    result, log = train(f"{name}-tiny", tmp_path)

    assert result["parity_bpb"] < result["untrained_val_bpb"]
    assert "Recompiling" not in log


@pytest.mark.timeout(600)
def test_late_fake_quantization_acts_in_the_compiled_graph_without_a_new_one(tmp_path: Path):
    qat = "train.qat={mlp_bits: 6, attention_bits: 6, other_bits: 6, start: {progress: 0.5}}"

    result, log = train("pr414-tiny", tmp_path, qat)

    lines = (tmp_path / "training/metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line)["qat/on_grid"] for line in lines if "qat/on_grid" in line]
    assert result["qat_start_step"] > 0
    assert shares[0] < 0.9
    assert shares[1] == 1.0
    assert "Recompiling" not in log

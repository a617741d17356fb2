"""The command line: train, finalize and score, or score a weights file."""

# Only read as text: `service.singlefile.cut` starts here, and cuts it and all that it reaches into
# one file.

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from service.singlefile.recipe import FINAL, TRAIN, WORLD_SIZE
from service.singlefile.stand_ins import require_fresh
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import FairwayError, UsageError
from trainer.finalize.artifact import BESIDE, read_weights
from trainer.finalize.calibration import calibration_batches
from trainer.finalize.compress import compress
from trainer.finalize.hessians import collect_hessians
from trainer.finalize.pipeline import WEIGHTS_FILE, finalize
from trainer.kernels.chosen import kernels_of_score
from trainer.model.build import build, load_state
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.results import Score
from trainer.run import check_vocabulary
from trainer.runtime.distributed import Ranks, from_torchrun
from trainer.runtime.files import sha256_file, write_json
from trainer.runtime.logs import configure
from trainer.runtime.tensors import load_tensors
from trainer.scoring import check_tokenizer, score_state, val_text
from trainer.specs.final import RangeCoder
from trainer.specs.task import TrainTask
from trainer.train import loop


def main() -> int:
    """Run the command line; the result goes to stdout, a fault to stderr as one line."""
    arguments = _arguments()
    with from_torchrun() as ranks:
        configure(ranks.rank)
        try:
            if arguments.score is None:
                _require_all(ranks, takes_any=arguments.any_workers)
            dataset = load_dataset(arguments.data)
            if arguments.score is not None:
                result = _scored(arguments.score, dataset, ranks)
            else:
                task = replace(TRAIN, train=replace(TRAIN.train, seed=arguments.seed))
                result = _run(task, dataset, arguments.out, ranks)
        except FairwayError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
    if result is None:
        return 0
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    over = result.get("artifact_bytes", 0) - ARTIFACT_BYTES_CAP
    if over > 0:
        sys.stderr.write(f"artifact: {over:,} bytes over the cap of {ARTIFACT_BYTES_CAP:,}\n")
    return 3 if over > 0 else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train this file's recipe, finalize it and score what was written."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared shards")
    parser.add_argument("--out", type=Path, default=Path("out"), help="a new output folder")
    parser.add_argument("--seed", type=_seed, default=TRAIN.train.seed)
    parser.add_argument("--score", type=Path, metavar="WEIGHTS", help="only score this file")
    parser.add_argument(
        "--any-workers",
        action="store_true",
        help=f"train by another number of workers than {WORLD_SIZE}, to other weights",
    )
    return parser.parse_args()


def _require_all(ranks: Ranks, *, takes_any: bool) -> None:
    """Refuse before the training what would make it another one, or useless at its end."""
    if ranks.world_size != WORLD_SIZE and not takes_any:
        raise UsageError(
            f"{ranks.world_size} workers: the recorded weights are of {WORLD_SIZE}; start "
            f"`torchrun --standalone --nproc_per_node={WORLD_SIZE}`, or add --any-workers"
        )
    kernels_of_score(FINAL.evaluate, ranks.device, TRAIN.train.dtype)
    kind = FINAL.final.compress
    compress(b"", BESIDE if isinstance(kind, RangeCoder) else kind)  # fails where it is missing


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"{seed} is below 0")
    return seed


def _run(task: TrainTask, dataset: Dataset, out: Path, ranks: Ranks) -> dict[str, Any] | None:
    """Walk the line once and return the result, on the first rank."""
    check_vocabulary(task, dataset)
    ranks.together(lambda: require_fresh(out))
    out.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    trained = loop.train(task, dataset, out, ranks)
    if not ranks.is_first:
        return None
    alone = Ranks(device=ranks.device)
    loaded = load_tensors(out / "bank", FINAL.entry)
    state = {name: tensor.to(ranks.device) for name, tensor in loaded.items()}
    report = finalize(
        state,
        task.model,
        FINAL.final,
        out / "artifact",
        sha256_file(dataset.tokenizer_path),
        _hessians(task, state, dataset, alone),
    )
    result = {
        **_score(out / "artifact" / WEIGHTS_FILE, dataset, alone),
        "seed": task.train.seed,
        "world_size": ranks.world_size,
        "data_digest": dataset.digest,
        "steps": trained.steps,
        "train_clock_s": trained.train_clock_s,
        "artifact_bytes": report.artifact_bytes,
        "weights_bytes": report.weights_bytes,
        "code_bytes": report.code_bytes,
        "weights_sha256": report.weights_sha256,
    }
    write_json(out / "result.json", result)
    return result


def _hessians(
    task: TrainTask, state: dict[str, Tensor], dataset: Dataset, ranks: Ranks
) -> dict[str, Tensor] | None:
    """Run the averaged weights over the calibration text, if rounding asks for that."""
    gptq = FINAL.final.quantize.gptq
    if gptq is None:
        return None
    model = build(task.model.exported(), dtype=task.train.dtype)
    names = {name for name, _ in model.named_parameters()}
    load_state(model, {name: tensor for name, tensor in state.items() if name in names})
    model.to(ranks.device).eval()
    return collect_hessians(model, calibration_batches(model, gptq, dataset, ranks), ranks)


def _scored(weights: Path, dataset: Dataset, ranks: Ranks) -> dict[str, Any] | None:
    """Score a weights file, on the first rank."""
    return _score(weights, dataset, Ranks(device=ranks.device)) if ranks.is_first else None


def _score(weights: Path, dataset: Dataset, ranks: Ranks) -> dict[str, Any]:
    """Score what lies on disk in a fresh model."""
    model, state, facts = read_weights(weights)
    check_tokenizer(facts.tokenizer_sha256, dataset.tokenizer_path, weights)
    text, dtype = val_text(dataset), TRAIN.train.dtype
    score: Score = score_state(model, state, text, FINAL.evaluate, ranks, dtype=dtype).score
    return {
        "val_bpb": score.val_bpb,
        "val_loss": score.val_loss,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "eval_clock_s": score.eval_clock_s,
        "audit": "not done by this file",
    }

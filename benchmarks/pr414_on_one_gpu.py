"""Train the pr414 recipe on one GPU as a public run was, and print its milestones beside ours.

    python benchmarks/pr414_on_one_gpu.py --text chunk-*.jsonl.xz --val val.bin \
        --tokenizer fineweb_1024_bpe.model --out /tmp/pr414

The public script (parameter-golf PR #414) ran 340 s of training clock on one H200 over these
documents: 1,148 steps of 262,144 tokens at 296.3 ms; raw 1.4371 bpb on a FineWeb val prefix, EMA
0.997 1.4830, int6 in blocks 1.4867, int6 sliding by 64 (variant A) 1.4629. Here the same recipe
runs through this package: same batch, warmdown, momentum warm-up, clock and text, in another
order of documents.
"""

import argparse
import json
import lzma
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from trainer.artifacts import load_training, make_artifact
from trainer.codec import parse, with_values
from trainer.data.bytecount import ByteTable
from trainer.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    Split,
    Tokenizer,
    content_digest,
)
from trainer.data.manifest import write_manifest as write
from trainer.data.shards import Dataset, describe_shard, load_dataset, open_shard, write_shard
from trainer.data.tokenizer import open_tokenizer
from trainer.protocol import BOS_ID
from trainer.run import (
    check_parity,
    finalize,
    is_trained,
    score_artifact,
    train,
)
from trainer.runtime.distributed import from_torchrun
from trainer.runtime.files import sha256_file
from trainer.runtime.logs import configure
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.recipe import Recipe
from trainer.specs.task import artifact_task, final_task, train_task
from tune_spaces.catalogue import load_recipe

PUBLIC = {"raw": 1.4371, "ema": 1.4830, "int6 blocks": 1.48665914, "int6 sliding": 1.46285822}
PUBLIC_STEPS, PUBLIC_STEP_MS = 1148, 296.3
SETTINGS = {
    "train.max_clock_s": 340.0,
    "train.batch_tokens": 262_144,
    "train.micro_batch_tokens": 65_536,
    "train.warmup_steps": 5,
    "train.schedule.warmdown_iters": 600,
    "train.optimizer.matrix.momentum_warmup_steps": 400,
    "evaluate.stride": 2048,
    "observe.log_every": 100,
    "observe.validate_every": None,
    "observe.checkpoint_every": None,
}


def encode(task: tuple[Path, Path, int, int]) -> list[np.ndarray]:
    """Encode every `workers`-th document of a file, BOS first."""
    path, tokenizer, worker, workers = task
    model = open_tokenizer(tokenizer)
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for i, line in enumerate(lines) if i % workers == worker]
    return [np.array([BOS_ID, *ids], dtype="<u2") for ids in model.encode(texts)]


def prepare(arguments: argparse.Namespace, workers: int = 16) -> Dataset:
    """Make a dataset of the given documents, shuffled, and the given validation shard."""
    folder: Path = arguments.out / "data"
    if (folder / MANIFEST_FILE).is_file():
        return load_dataset(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        (path, arguments.tokenizer, w, workers) for path in arguments.text for w in range(workers)
    ]
    with ProcessPoolExecutor(workers) as pool:
        documents = [document for part in pool.map(encode, tasks) for document in part]
    random.Random(1337).shuffle(documents)
    write_shard(folder / "big_train_000000.bin", np.concatenate(documents))
    write_shard(folder / "big_val_000000.bin", np.array(open_shard(arguments.val)))
    model = folder / TOKENIZER_FILE
    model.write_bytes(arguments.tokenizer.read_bytes())
    table = ByteTable.load(model)
    splits = {
        split: _split(folder / f"big_{split}_000000.bin", table) for split in ("train", "val")
    }
    splits["holdout"] = Split(shards=(), tokens=0, documents=0, bytes=0)
    tokenizer = Tokenizer(sha256=sha256_file(model), vocab_size=open_tokenizer(model).vocab_size())
    digest = content_digest(tokenizer, splits)
    write(
        folder, Manifest(name="big", tokenizer=tokenizer, splits=splits, settings={}, digest=digest)
    )
    return load_dataset(folder)


def _split(path: Path, table: ByteTable) -> Split:
    shard, tokens = describe_shard(path), open_shard(path)
    num_bytes = int(table.count(tokens[:-1], tokens[1:]).sum())
    documents = int((tokens == BOS_ID).sum())
    return Split(shards=(shard,), tokens=shard.tokens, documents=documents, bytes=num_bytes)


def main() -> None:
    """Prepare, train, finalize, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="pr414")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--clock-s", type=float, default=SETTINGS["train.max_clock_s"])
    arguments = parser.parse_args()
    dataset = prepare(arguments)
    if arguments.prepare_only:
        return
    settings = SETTINGS | {"train.max_clock_s": arguments.clock_s}
    data = with_values(load_recipe(arguments.recipe, "benchmark"), settings.items())
    recipe = parse(Recipe, data, arguments.recipe)
    print(f"train {dataset.num_tokens('train'):,} tokens, val {dataset.num_tokens('val'):,}")
    with from_torchrun() as ranks:
        configure(ranks.rank)
        folder = arguments.out / "training"
        task = train_task(recipe)
        if not is_trained(task, dataset, folder, ranks):
            train(task, dataset, folder, ranks)
        _, trained = load_training(folder)
        parity = check_parity(folder, dataset, arguments.out / "parity", ranks)
        asked, made = final_task(recipe), arguments.out / "made"
        make_artifact(artifact_task(asked), folder, dataset, made, None, ranks)
        final = finalize(asked, folder, made, dataset, arguments.out / "final", parity.rule, ranks)
        sliding = EvaluateSpec(window=2048, stride=64, variant="A", batch_windows=32)
        slid = score_artifact(
            arguments.out / "final" / "artifact", dataset, sliding, ranks, dtype="bfloat16"
        )
    journal = (folder / "metrics.jsonl").read_text().splitlines()
    raw = [json.loads(line)["val/bpb"] for line in journal if "val/bpb" in line][-1]
    step_ms = 1000 * trained.train_clock_s / trained.steps
    ours = {
        "raw": raw,
        "ema": trained.parity_bpb,
        "int6 blocks": final.score.val_bpb,
        "int6 sliding": slid.val_bpb,
    }
    print(f"{'':14}{'public':>10}{'ours':>10}{'difference':>12}")
    print(f"{'steps':14}{PUBLIC_STEPS:10,}{trained.steps:10,}")
    print(f"{'ms a step':14}{PUBLIC_STEP_MS:10.1f}{step_ms:10.1f}")
    for name, public in PUBLIC.items():
        print(f"{name:14}{public:10.4f}{ours[name]:10.4f}{ours[name] - public:+12.4f}")
    print(f"weights {final.weights_bytes:,} bytes, code {final.code_bytes:,}; {parity.rule.detail}")


if __name__ == "__main__":
    main()

"""Import a checkpoint that the public pr414 script wrote, and score it beside the script's log.

    python benchmarks/public_pr414_checkpoint.py --file pr414_h200_340s_ema_bf16.pt.xz \
        --val val.bin --tokenizer fineweb_1024_bpe.model --out /tmp/imported

The log, on the FineWeb val prefix (bfloat16, compiled): EMA weights in blocks of 2,048 1.4830 bpb;
after int6 rows in blocks 1.48665914, sliding by 64 with variant A 1.46285822. The file holds the
matrices in bfloat16, where the script quantized float32, and its tail of fewer than 2,048 tokens
was dropped, so the same numbers to about 1e-3 are what can be asked for.
"""

import argparse
from pathlib import Path

import numpy as np

from trainer.codec import parse
from trainer.data.shards import open_shard
from trainer.finalize.pipeline import finalize
from trainer.importer.folder import import_file, load_bank
from trainer.runtime.distributed import from_torchrun
from trainer.runtime.files import sha256_file
from trainer.scoring import Text, load_artifact, score_state
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

PUBLIC = {"ema, blocks": 1.4830, "int6, blocks": 1.48665914, "int6, sliding A": 1.46285822}
WINDOW = 2048
BLOCKS = EvaluateSpec(window=WINDOW, stride=WINDOW, batch_windows=32)
SLIDING = EvaluateSpec(window=WINDOW, stride=64, variant="A", batch_windows=32)


def main() -> None:
    """Import, score, finalize as the recipe says, score what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = parse(Recipe, load_recipe("pr414", "benchmark"), "pr414")
    print(import_file(arguments.file, recipe, arguments.out / "import"))
    model, state = load_bank(arguments.out / "import")
    ids = np.array(open_shard(arguments.val))
    # The script scores whole sequences only.
    whole = ids[: (len(ids) - 1) // WINDOW * WINDOW + 1]
    text = Text(whole, arguments.tokenizer, str(arguments.val))
    artifact = arguments.out / "artifact"
    report = finalize(state, model, recipe.final, artifact, sha256_file(arguments.tokenizer))
    written = load_artifact(artifact, arguments.tokenizer)
    with from_torchrun() as ranks:
        ours = {
            "ema, blocks": score_state(model, state, text, BLOCKS, ranks, dtype="bfloat16")[0],
            "int6, blocks": score_state(*written, text, BLOCKS, ranks, dtype="bfloat16")[0],
            "int6, sliding A": score_state(*written, text, SLIDING, ranks, dtype="bfloat16")[0],
        }
    print(f"{'':18}{'public':>12}{'ours':>12}{'difference':>12}")
    for name, score in ours.items():
        gap = score.val_bpb - PUBLIC[name]
        print(f"{name:18}{PUBLIC[name]:12.5f}{score.val_bpb:12.5f}{gap:+12.5f}")
    print(f"weights {report.weights_bytes:,} bytes; the script's int6 with zlib-9 15,860,484")


if __name__ == "__main__":
    main()

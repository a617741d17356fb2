"""Fit a real checkpoint to three caps, and score what was written.

    python benchmarks/fit.py /tmp/imported/import --train train.bin --val val.bin \
        --tokenizer fineweb_1024_bpe.model --home /tmp/home --limit 65536

Each cap is fitted twice: by sensitivities that are measured on training text, and without text, by
the steps that are usual in the field. Beside them the same bank as its recipe finalizes it.
Seconds are of the whole command, probes, files and score included.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from service.banks import Wanted
from service.finals import fit_bank, quantize_bank
from service.paths import Paths
from service.rescore import Asked, rescore
from service.scored_text import Source

CAPS = (16_000_000, 12_000_000, 9_000_000)


def main() -> None:
    """Print a line for each fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="Score only so many targets.")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--caps", type=int, nargs="+", default=CAPS)
    arguments = parser.parse_args()
    paths = Paths(arguments.home)
    source = Source(tokens=arguments.val, tokenizer=arguments.tokenizer, limit=arguments.limit)
    asked = Asked(evaluate=(("window", arguments.window),), dtype=arguments.dtype)
    plain = Wanted(arguments.bank, tokenizer=arguments.tokenizer, dtype=arguments.dtype)
    measured = Wanted(
        arguments.bank,
        train_tokens=arguments.train,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
    )
    print(f"bank       {rescore(paths, arguments.bank, source, asked)['val_bpb']:.5f} bpb")
    with TemporaryDirectory() as folder:
        made = quantize_bank(paths, plain, Path(folder) / "recipe")
        bpb = rescore(paths, made["artifact"], source, asked)["val_bpb"]
        print(f"recipe     {bpb:.5f} bpb, {made['artifact_bytes']:,} bytes", flush=True)
    for cap in arguments.caps:
        for wanted in (measured, plain):
            started = time.monotonic()
            document = fit_bank(paths, wanted, cap, source, asked, None)
            print(_line(document, time.monotonic() - started), flush=True)


def _line(document: dict[str, Any], seconds: float) -> str:
    choices = document["choices"]
    share = document["artifact_bytes"] / document["cap_bytes"]
    bits = " ".join(f"{name} {bits}" for name, bits in choices["bits"].items())
    return (
        f"cap {document['cap_bytes']:>12,}: {document['artifact_bytes']:,} bytes, {share:.3%} of "
        f"it, {document['val_bpb']:.5f} bpb; sensitivity {choices['sensitivity']}, steps "
        f"{choices['steps']}, {choices['coder']}, bits {bits}, {len(choices['files'])} files, "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    main()

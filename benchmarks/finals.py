"""Every quantizer times every coder on one trained model: bytes, bits per byte, errors, seconds.

    python benchmarks/finals.py BANK --tokens val.bin --tokenizer fineweb_1024_bpe.model \
        --train-tokens train.bin [--device cuda] [--limit N] [--out rows.jsonl]

BANK is a folder that `fairway import` left, of a pr414. First its own final with GPTQ is made
twice and split by part: the first time kernels are compiled. Hessians are collected on
--train-tokens; --generated adds the rounding by Hessians of the model's own text (456 s to draw it
on an H200).
Bytes are sizes on disk of weights files; what is scored is read back from one of them, once per
quantizer, because the coders lose nothing. Columns: `output` is the squared error at the outputs of
all integer matrices that have a Hessian, as a share of the outputs' own square, and `of nearest`
the same over rounding to nearest on the same grid, both the mean over the matrices.

The files are coded on all CPU cores while the device goes on; rows come when their last file is
there. Encoding seconds are those of one core, with the others busy.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.blueprint import blueprint
from trainer.codec import parse, read_recipe
from trainer.data.shards import TokenStream
from trainer.errors import FairwayError
from trainer.finalize.artifact import read_weights, write_weights
from trainer.finalize.calibration import generated_batches, training_batches
from trainer.finalize.gptq import row_errors
from trainer.finalize.hessians import collect_hessians
from trainer.finalize.pipeline import finalize
from trainer.finalize.quantize import TensorRecord, quantize_tensors
from trainer.finalize.stored import Stored
from trainer.importer.folder import load_bank
from trainer.model.build import build, load_state
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import sha256_file
from trainer.scoring import Text, score_state
from trainer.sizes import TensorSize, tensor_sizes
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.final import (
    Bits,
    Brotli,
    Clips,
    Compress,
    FinalSpec,
    Gptq,
    Lqer,
    Lzma,
    Quantize,
    RangeCoder,
    Zlib,
    Zstd,
)
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe

CODERS: dict[str, Compress] = {
    "zstd-22": Zstd(),
    "brotli-11": Brotli(),
    "lzma-9": Lzma(),
    "zlib-9": Zlib(),
    "range": RangeCoder(),
}
SCALARS = Bits(scalar=16)
PLAIN = Quantize(bits=SCALARS)
SD = replace(PLAIN, clip="sd12.85", clips=Clips(embed="sd20"))  # parameter-golf PR #1394
# PRs #1586 and #1855: finer MLPs, the token table in 7 bits.
BY_CLASS = replace(
    PLAIN,
    bits=replace(SCALARS, embed=7),
    clip="sd12.85",
    clips=Clips(mlp="sd11.5", attention="sd13", embed="sd15"),
)
INT5 = replace(PLAIN, bits=replace(SCALARS, mlp=5), clip="p9")  # the widths of #348
INT7 = replace(PLAIN, bits=replace(SCALARS, mlp=7, attention=7), clip="sd20")
INT4 = Quantize(  # #951: MLPs in 4 bits, ratios of the row maximum, the token table in float16
    bits=Bits(mlp=4, hash=6, embed=16, scalar=16), clip="r9", symmetric=False, float_numel=8192
)


def quantizers(own: Quantize) -> dict[str, Quantize]:
    """The rows of the table; every rounding by Hessians stands under the same grid without."""
    pairs = {
        "pr414's own (p5, matrix, floor 1/31)": own,
        "row maximum": PLAIN,
        "p5 by row": replace(PLAIN, clip="p5"),
        "sd12.85": SD,
        "sd by class, embed int7": BY_CLASS,
        "mlp int5, p9": INT5,
        "int7, sd20": INT7,
        "#951: mlp int4, r9": INT4,
    }
    rows: dict[str, Quantize] = {}
    for name, spec in pairs.items():
        rows[name] = spec
        rows[f"{name}, gptq"] = replace(spec, gptq=Gptq())
    rows["sd12.85, lqer"] = replace(SD, lqer=Lqer())
    rows["sd12.85, gptq, lqer"] = replace(SD, gptq=Gptq(), lqer=Lqer())
    rows["sd12.85, gptq, row importance"] = replace(SD, gptq=Gptq(row_importance=0.175))
    rows["sd12.85, gptq, embedding nearest"] = replace(SD, gptq=Gptq(embeddings=False))
    return rows


@dataclass
class Row:
    """One quantizer: its figures, and its files while they are being coded."""

    name: str
    bpb: float
    mse: float
    output: float
    of_nearest: float
    seconds: float
    files: dict[str, "Future[tuple[int, float]]"] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    model: ModelSpec
    state: Mapping[str, Tensor]
    sizes: Sequence[TensorSize]
    hessians: Mapping[str, Mapping[str, Tensor]]  # by the calibration that they come from
    text: Text
    evaluate: EvaluateSpec
    ranks: Ranks
    dtype: str
    folder: Path

    def row(self, name: str, spec: Quantize, pool: ProcessPoolExecutor) -> Row:
        """Quantize, hand the files to the pool, and score what one of them holds."""
        started = time.perf_counter()
        known = self.hessians[spec.gptq.calibration if spec.gptq else "train"]
        stored, records = quantize_tensors(
            self.state, self.sizes, spec, known if spec.gptq else None
        )
        seconds = time.perf_counter() - started
        slug = "".join(c if c.isalnum() else "-" for c in name)
        forms = self.folder / f"{slug}.pt"
        torch.save(stored, forms)
        digest = sha256_file(self.text.tokenizer)
        files = {
            coder: pool.submit(
                code, self.folder / f"{slug}.{coder}.fw", self.model, forms, compress, digest
            )
            for coder, compress in CODERS.items()
        }
        probe = self.folder / f"{slug}.probe.fw"
        write_weights(probe, self.model, stored, Zstd(level=1), digest)
        _, weights, _ = read_weights(probe)
        score = score_state(
            self.model, weights, self.text, self.evaluate, self.ranks, dtype=self.dtype
        ).score
        return Row(name, score.val_bpb, *self._errors(records, weights), seconds, files)

    def _errors(
        self, records: Sequence[TensorRecord], weights: Mapping[str, Tensor]
    ) -> tuple[float, float, float]:
        """Return the squared error per integer weight, and the two errors at the output."""
        integers = [record for record in records if record.bits < 16]
        numel = {record.name: self.state[record.name].numel() for record in integers}
        total = sum(record.mse * numel[record.name] for record in integers)
        shares: list[float] = []
        for record in integers:
            hessian = self.hessians["train"].get(record.name)
            if hessian is None:
                continue
            weight = self.state[record.name].to(hessian.device, torch.float32)
            error = weight - weights[record.name].to(hessian.device)
            lost, own = (float(row_errors(part, hessian).sum()) for part in (error, weight))
            shares.append(lost / own)
        ratios = [
            record.hessian_error / record.nearest_hessian_error
            for record in integers
            if record.hessian_error is not None and record.nearest_hessian_error
        ]
        of_nearest = sum(ratios) / len(ratios) if ratios else 1.0
        return total / sum(numel.values()), sum(shares) / len(shares), of_nearest


def code(
    path: Path, model: ModelSpec, forms: Path, compress: Compress, digest: str
) -> tuple[int, float]:
    """Write one weights file in a process of its own; return its bytes and seconds."""
    torch.set_num_threads(1)
    stored: dict[str, Stored] = torch.load(forms, weights_only=False)
    started = time.perf_counter()
    write_weights(path, model, stored, compress, digest)
    return path.stat().st_size, time.perf_counter() - started


def collected(
    model: ModelSpec, state: Mapping[str, Tensor], arguments: argparse.Namespace, ranks: Ranks
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each calibration with its Hessians, and say what they cost."""
    network = build(model, dtype=arguments.dtype)
    load_state(network, dict(state))
    network.to(ranks.device).eval()
    wanted = Gptq(sequences=arguments.sequences, seq_len=arguments.seq_len)
    sources = {"train": training_batches(TokenStream([arguments.train_tokens]), wanted, ranks)}
    if arguments.generated:
        sources["generated"] = generated_batches(network, wanted, ranks)
    for source, batches in sources.items():
        started = time.perf_counter()
        hessians = collect_hessians(network, batches, ranks)
        seconds = time.perf_counter() - started
        print(f"Hessians of {source} text in {seconds:.1f} s", flush=True)
        yield source, hessians


def split(
    model: ModelSpec, state: Mapping[str, Tensor], final: FinalSpec, hessians: Mapping[str, Tensor]
) -> None:
    """Make one whole final twice, and say what each part of it took."""
    by_hessian = replace(final, quantize=replace(final.quantize, gptq=Gptq()))
    for name in ("first", "again"):
        with tempfile.TemporaryDirectory() as folder:
            report = finalize(state, model, by_hessian, Path(folder), "0" * 64, hessians)
        methods: dict[str, float] = {}
        for record in report.tensors:
            methods[record.method] = methods.get(record.method, 0.0) + record.seconds
        parts = {**report.clock_s, **{f"of it {method}": s for method, s in methods.items()}}
        told = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        print(f"a final with GPTQ and {final.compress.kind}, {name}: {told}", flush=True)


def finish(row: Row, out: Path | None) -> None:
    """Wait for a row's files and print it; a file that could not be written costs a dash."""
    figures: dict[str, Any] = {
        key: getattr(row, key) for key in ("name", "bpb", "mse", "output", "of_nearest", "seconds")
    }
    shown: list[str] = []
    for coder, file in row.files.items():
        try:
            figures[coder], figures[f"{coder} s"] = file.result()
            shown.append(f"{figures[coder]:12,}")
        except Exception as error:  # the other coders' figures are still wanted
            figures[f"{coder} failed"] = f"{type(error).__name__}: {error}"
            shown.append(f"{'-':>12}")
    print(
        f"{row.name:44}{row.bpb:9.5f}{row.mse:10.2e}{row.output:10.2e}{row.of_nearest:11.3f}"
        f"{row.seconds:8.1f}" + "".join(shown),
        flush=True,
    )
    for key in (key for key in figures if key.endswith("failed")):
        print(f"    {key}: {figures[key]}", flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bank", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--train-tokens", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="score so many predictions only")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=Gptq().sequences)
    parser.add_argument("--seq-len", type=int, default=Gptq().seq_len)
    parser.add_argument("--generated", action="store_true")
    parser.add_argument("--only", default="", help="quantizers whose name holds this")
    parser.add_argument("--out", type=Path, help="append the figures as JSON lines")
    arguments = parser.parse_args()
    arguments.dtype = "bfloat16" if arguments.device.startswith("cuda") else "float32"
    return arguments


def main() -> None:
    """Print the table, a row as soon as its files are there."""
    arguments = parsed()
    trained, whole = load_bank(arguments.bank)
    recipe = parse(Recipe, read_recipe(arguments.bank / "recipe.yaml"), "recipe")
    model = trained.exported()
    sizes = tensor_sizes(blueprint(model))
    ranks = Ranks(device=torch.device(arguments.device))
    state = {size.name: whole[size.name].to(ranks.device) for size in sizes}
    stream = TokenStream([arguments.tokens])
    stop = min(len(stream), (arguments.limit or len(stream)) + 1)
    text = Text(stream.read(0, stop), arguments.tokenizer, str(arguments.tokens))
    evaluate = EvaluateSpec(window=arguments.window, stride=arguments.stride, batch_windows=32)
    score = score_state(model, state, text, evaluate, ranks, dtype=arguments.dtype).score
    print(f"unquantized {score.val_bpb:.5f} bpb over {score.tokens:,} predictions", flush=True)
    hessians = dict(collected(model, state, arguments, ranks))
    split(trained, whole, recipe.final, hessians["train"])
    rows = quantizers(recipe.final.quantize)
    if arguments.generated:
        rows["sd12.85, gptq, own text"] = replace(SD, gptq=Gptq(calibration="generated"))
    print(
        f"{'quantizer':44}{'bpb':>9}{'mse':>10}{'output':>10}{'of nearest':>11}{'s':>8}"
        + "".join(f"{coder:>12}" for coder in CODERS),
        flush=True,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool,
    ):
        bench = Bench(
            model, state, sizes, hessians, text, evaluate, ranks, arguments.dtype, Path(folder)
        )
        waiting: list[Row] = []
        for name, spec in rows.items():
            if arguments.only not in name:
                continue
            try:
                waiting.append(bench.row(name, spec, pool))
            except FairwayError as error:  # the other rows are still wanted
                print(f"{name}: {error}", flush=True)
            while waiting and all(file.done() for file in waiting[0].files.values()):
                finish(waiting.pop(0), arguments.out)
        for row in waiting:
            finish(row, arguments.out)


if __name__ == "__main__":
    main()

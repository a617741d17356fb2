"""Where the time of a GPU goes: one command on a bare GPU machine, one table.

    python benchmarks/gpu.py --out DIR [--recipe pr414] [--data FOLDER] \
        [--parts limits,attention,step,update,eval,final] [--columns plain,fast] [-S path=value]

`plain` is the recipe as it is shipped, `fast` the same with the fast paths on; -S is laid over
both. Figures of the public script stand beside them as they were given elsewhere (one H200, torch
2.11, CUDA 13), and the limit is what this machine's own product and copy rates allow: every row
whose limit is given is counted by formula, evaluation as if all positions were computed.

Without --data, a prepared folder, tokens are random with Zipf's frequencies. Weights are seeded and
untrained: they are finite and change no time. Seconds to compile depend on what the compiler's
cache holds already. Every figure is also in DIR/gpu.json, written anew after each part. A part that
fails says so in the table, costs no other part, and makes the command exit 1.
"""

import argparse
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_parts as parts
import torch

from trainer.codec import parse, parse_assignment, with_values
from trainer.data.shards import Dataset, load_dataset
from trainer.kernels.attention import at_hand, lacking
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import write_json
from trainer.specs.kernels import AttentionKernel
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

PARTS = ("limits", "attention", "step", "update", "eval", "final")
COLUMNS = ("plain", "fast")
ELSEWHERE: dict[str, dict[str, float]] = {
    "pr414": {
        "step_ms": 721.0,
        "tokens_per_s": 1.09e6,
        "peak_gib": 22.1e9 / 2**30,
        "evaluation_first_s": 24.3,
    },
    "baseline": {"step_ms": 302.0},
}
ATTENTION_ELSEWHERE = {"flash": (0.767, 2.505), "cudnn": (0.529, 1.644)}
ATTENTION_ELSEWHERE["flash_attn_4"] = (0.517, 1.368)

# Key of a figure, what it is called, and how it is written.
ROWS = (
    ("train_attention", "attention in training", "{}"),
    ("step_ms", "training step, ms", "{:.1f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("of_limit", "share of the measured limit", "{:.1%}"),
    ("forward_backward.attention", "forward + backward: attention, ms", "{:.1f}"),
    ("forward_backward.matmul", "forward + backward: matmuls, ms", "{:.1f}"),
    ("forward_backward.own", "forward + backward: our kernels, ms", "{:.1f}"),
    ("forward_backward.memory", "forward + backward: copies and fills, ms", "{:.1f}"),
    ("forward_backward.other", "forward + backward: other kernels, ms", "{:.1f}"),
    ("update_ms", "update (clip, Muon, AdamW, averages), ms", "{:.2f}"),
    ("update_busy_ms", "update: its kernels, ms", "{:.2f}"),
    ("update_kernels_ms.launches", "update: launches", "{:,}"),
    ("loader_ms", "loader: reading a batch, ms of the host", "{:.2f}"),
    ("idle_ms", "step less its kernels, ms", "{:.1f}"),
    ("kernels_ms.launches", "launches a step", "{:,}"),
    ("peak_gib", "peak memory, GiB", "{:.1f}"),
    ("compile_s", "first step beyond a step (compilation), s", "{:.1f}"),
    ("evaluate_attention", "attention in evaluation", "{}"),
    ("predictions", "evaluation: predictions", "{:,}"),
    ("evaluation_first_s", "evaluation, first (with compilation), s", "{:.2f}"),
    ("evaluation_s", "evaluation, without compilation, s", "{:.2f}"),
    ("hessians_s", "final: Hessians, s", "{:.2f}"),
    ("final_gptq_s", "final: rounding by Hessians with its clip search, s", "{:.2f}"),
    ("final_nearest_s", "final: rounding to nearest with its clip search, s", "{:.2f}"),
    ("final_quantize_s", "final: all quantization, s", "{:.2f}"),
    ("final_write_s", "final: compress and write, s", "{:.2f}"),
)
FORMATS = {key: form for key, _, form in ROWS}


def main() -> int:
    """Measure what is asked for, print the table, and return the exit status."""
    told = _parsed()
    told.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(told.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    recipes = {name: _recipe(told, name, device) for name in told.columns}
    started = time.monotonic()
    found: dict[str, Any] = {
        "command": {"recipe": told.recipe, "set": told.set, "data": str(told.data or "random")},
        "machine": _machine(device),
        "elsewhere": ELSEWHERE.get(told.recipe, {}) if device.type == "cuda" else {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, where, work in _jobs(told, recipes, Path(folder), device):
            _measure(found, name, where, work)
            write_json(told.out / "gpu.json", found)
            parts.tidy()
    for name, recipe in recipes.items():
        _derive(found.setdefault(name, {}), found.get("limits", {}), recipe, device)
    found["limit"] = _limits_of(next(iter(recipes.values())), found.get("limits", {}))
    if "predictions" in (scored := found[told.columns[0]]) and found["limit"]:
        found["limit"]["evaluation_s"] = found["limit"]["prediction_s"] * scored["predictions"]
    found["seconds"] = time.monotonic() - started
    write_json(told.out / "gpu.json", found)
    print("\n".join(_lines(found, told.columns)))
    return 1 if "failed" in found else 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()

    def some(of: tuple[str, ...]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            names = text.split(",")
            if strange := [name for name in names if name not in of]:
                raise argparse.ArgumentTypeError(f"{strange[0]!r}: take from {','.join(of)}")
            return names

        return read

    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--recipe", default="pr414")
    parser.add_argument("--data", type=Path, help="prepared folder; random tokens without")
    parser.add_argument("--parts", type=some(PARTS), default=list(PARTS))
    parser.add_argument("--columns", type=some(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--device", default="cuda:0" if cuda else "cpu")
    parser.add_argument("-S", dest="set", action="append", default=[], metavar="path=value")
    return parser.parse_args()


def fast_settings(device: torch.device) -> dict[str, Any]:
    """What the second column adds to a recipe; a CPU has only substitutes for it."""
    if device.type != "cuda":
        kernel = {"name": "flash_attn_4", "substitute": "torch"}
        own = {"train.fused": True, "evaluate.fused": True}
        return {"train.attention": kernel, "evaluate.attention": kernel} | own
    kernel = {"name": "flash_attn_4", "substitute": "cudnn"}
    return {
        "train.attention": kernel,
        "train.fused": True,
        "evaluate.attention": kernel,
        "evaluate.fused": True,
        "evaluate.compile": True,
        "evaluate.batch_windows": 264,
    }


def _recipe(told: argparse.Namespace, column: str, device: torch.device) -> Recipe:
    data = load_recipe(told.recipe, "benchmark")
    if column == "fast":
        data = with_values(data, fast_settings(device).items())
    data = with_values(data, [parse_assignment(text) for text in told.set])
    return parse(Recipe, data, f"{told.recipe}, {column}")


def _machine(device: torch.device) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


Job = tuple[str, str | None, Callable[[], dict[str, Any]]]


def _jobs(
    told: argparse.Namespace, recipes: dict[str, Recipe], folder: Path, device: torch.device
) -> Iterator[Job]:
    """Yield what is to be measured: its name, the column that it belongs to, and the work."""
    asked, ranks = set(told.parts), Ranks(device=device)
    if "limits" in asked:
        yield "limits", None, lambda: parts.limits(device)
    if "attention" in asked:
        yield "attention", None, lambda: parts.attention(device)
    if not asked & {"step", "update", "eval", "final"}:
        return
    data = _data(told, recipes, folder, device)
    for name, recipe in recipes.items():
        if asked & {"step", "update"}:
            yield "step", name, lambda r=recipe: parts.training(r, data, ranks, asked)
        if "eval" in asked:
            yield "eval", name, lambda r=recipe: parts.evaluation(r, data, ranks)
    if "final" in asked:  # there is one path, whatever trained and scores
        last = told.columns[-1]
        yield "final", last, lambda: parts.final(recipes[last], data, ranks)


def _data(
    told: argparse.Namespace, recipes: dict[str, Recipe], folder: Path, device: torch.device
) -> Dataset:
    if told.data is not None:
        return load_dataset(told.data)
    return parts.random_dataset(next(iter(recipes.values())), folder, device)


def _measure(
    found: dict[str, Any], name: str, column: str | None, work: Callable[[], dict[str, Any]]
) -> None:
    """Do one part and keep its figures, or why it has none."""
    started = time.monotonic()
    place = f"{name}, {column}" if column else name
    try:
        figures = work()
    except Exception as error:  # the other parts' figures are still wanted
        traceback.print_exc()
        found.setdefault("failed", {})[place] = f"{type(error).__name__}: {error}"
        return
    if column is None:
        found[name] = figures
    else:
        found.setdefault(column, {}).update(figures)
    print(f"{place}: measured in {time.monotonic() - started:.1f} s", flush=True)


def _derive(
    column: dict[str, Any], measured: dict[str, float], recipe: Recipe, device: torch.device
) -> None:
    """Add to a column what follows from its figures."""
    dtype = recipe.train.dtype
    column["train_attention"] = _back_end(recipe.train.attention, device, dtype)
    column["evaluate_attention"] = _back_end(recipe.evaluate.attention, device, dtype)
    step, update = column.get("kernels_ms"), column.get("update_kernels_ms")
    if update:
        column["update_busy_ms"] = sum(update[kind] for kind in parts.CLASSES)
    if step:
        less = update or dict.fromkeys(parts.CLASSES, 0.0)
        column["forward_backward"] = {kind: step[kind] - less[kind] for kind in parts.CLASSES}
        column["idle_ms"] = column["step_ms"] - sum(step[kind] for kind in parts.CLASSES)
    if "step_ms" in column and measured:
        limit_ms = _limits_of(recipe, measured)["step_ms"]
        column["of_limit"] = limit_ms / column["step_ms"]


def _back_end(kernel: AttentionKernel | None, device: torch.device, dtype: str) -> str:
    """The back end that a spec gets here, and why if it is not the one that it names."""
    name = at_hand(kernel, device, dtype, "attention")
    if kernel is None or name == kernel.name:
        return name
    return f"{name}, for {kernel.name}: {lacking(kernel.name, device, dtype)}"


def _limits_of(recipe: Recipe, measured: dict[str, float]) -> dict[str, float]:
    """The figures that the machine's two rates allow, empty where they were not measured."""
    if not measured:
        return {}
    work, rate = parts.work_of(recipe), measured["flop_per_s"]
    step_s = work["step_flop"] / rate
    update_s = work["update_flop"] / rate + work["update_bytes"] / measured["bytes_per_s"]
    return {
        "step_ms": 1e3 * step_s,
        "tokens_per_s": recipe.train.batch_tokens / step_s,
        "update_ms": 1e3 * update_s,
        "prediction_s": work["evaluation_flop_a_prediction"] / rate,
        "step_tflop": work["step_flop"] / 1e12,
    }


def _lines(found: dict[str, Any], columns: list[str]) -> Iterator[str]:
    """The table, as it is printed."""
    machine = found["machine"]
    yield f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}"
    if "limits" in found:
        measured = found["limits"]
        yield (
            f"limit: product {measured['flop_per_s'] / 1e12:.4g} TFLOP/s, "
            f"copy {measured['bytes_per_s'] / 1e12:.4g} TB/s"
        )
    yield from _attention_lines(found)
    heads = [*columns, "elsewhere", "limit"]
    yield f"{'':54}" + "".join(f"{head:>14}" for head in heads)
    notes: list[str] = []
    for key, label, _ in ROWS:
        cells = [_cell(found.get(head, {}), key, notes) for head in heads]
        if set(cells) != {"-"}:
            yield f"{label:54}" + "".join(f"{cell:>14}" for cell in cells)
    yield from notes
    if found["elsewhere"]:
        yield "elsewhere: the public script on one H200, torch 2.11, as given; not measured here"
    for place, why in found.get("failed", {}).items():
        yield f"FAILED {place}: {why}"
    yield f"all of it in {found['seconds']:.0f} s"


def _cell(figures: dict[str, Any], key: str, notes: list[str]) -> str:
    """One figure as it is written; what is too long for a cell becomes a note."""
    value: Any = figures
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        return "-"
    text = FORMATS[key].format(value)
    if len(text) > 13:
        if f"* {text}" not in notes:
            notes.append(f"* {text}")
        return text.partition(",")[0] + "*"
    return text


def _attention_lines(found: dict[str, Any]) -> Iterator[str]:
    """The back ends' times, with those of the same kernels as given elsewhere."""
    timed = found.get("attention")
    if not timed:
        return
    yield f"{'attention':16}{'forward ms':>12}{'backward ms':>12}{'elsewhere':>18}"
    for name, times in timed.items():
        if not isinstance(times, dict):
            continue
        given = ATTENTION_ELSEWHERE.get(name) if found["elsewhere"] else None
        beside = f"{given[0]:.3f} / {given[1]:.3f}" if given else "-"
        if "missing" in times:
            yield f"{name:16}{'-':>12}{'-':>12}{beside:>18}  {times['missing']}"
        else:
            forward, backward = times["forward_ms"], times["backward_ms"]
            yield f"{name:16}{forward:12.3f}{backward:12.3f}{beside:>18}"
    if "limits" in found:
        forward = 1e3 * timed["flop_forward"] / found["limits"]["flop_per_s"]
        yield f"{'limit':16}{forward:12.3f}{2.5 * forward:12.3f}"


if __name__ == "__main__":
    raise SystemExit(main())

"""Short names for knobs and points: table columns, MLflow params and run names.

Pure. A knob is known by its dotted path everywhere else; here it gets the shortest name that a
reader of the recipe would still recognise.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# Last components that say nothing without the part they belong to.
_GENERIC = frozenset(
    {
        *("base", "beta1", "beta2", "cap", "dim", "dims", "eps", "every", "init", "kind", "level"),
        *(
            "lr",
            "lr_scale",
            "momentum",
            "mult",
            "name",
            "progress",
            "ratio",
            "slope",
            "weight_decay",
        ),
        *("attention", "embed", "hash", "mlp", "other", "scalar"),
    }
)
_ABBREVIATIONS = {
    "warmdown_iters": "wd",
    "ema_decay": "ema",
    "prune.ratio": "prune",
    "bits.mlp": "mq",
    "bits.attention": "aq",
    "bits.hash": "hq",
    "bits.embed": "eq",
    "bits.other": "oq",
    "bits.scalar": "sq",
    "num_layers": "L",
    "model.dim": "d",
    "mlp.mult": "mlp",
    "num_heads": "H",
    "num_kv_heads": "kv",
    "rope.dims": "rope",
    "iterations": "it",
    "batch_tokens": "batch",
    "compress.level": "zstd",
    "matrix.lr": "lr",
    "embed.lr": "elr",
    "scalar.lr": "slr",
    "matrix.weight_decay": "decay",
    "softcap.cap": "cap",
}
MAX_RUN_NAME = 40


def knob_name(path: str) -> str:
    """Name a knob by its last component, with its part in front where that says nothing alone."""
    *parts, leaf = path.split(".")
    return f"{parts[-1]}.{leaf}" if parts and leaf in _GENERIC else leaf


def knob_names(paths: Iterable[str]) -> dict[str, str]:
    """Name several knobs; those whose short names would coincide keep their full paths."""
    names = {path: knob_name(path) for path in paths}
    taken = Counter(names.values())
    return {path: name if taken[name] == 1 else path for path, name in names.items()}


def short_value(value: Any) -> str:
    """Write a knob's value in few characters: numbers with 4 significant digits."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


def run_name(point: Mapping[str, Any], stage_id: str, *, seed: int | None = None) -> str:
    """Name a run by its point, in the point's order: `wd2500 ema.997 clip=p5 prune.03`.

    `seed` is given where a sweep has several. Where digits or knobs had to be cut, part of the
    stage's id keeps the name unique.
    """
    names = knob_names(point)
    parts = [_part(names[path], value) for path, value in point.items()]
    if seed is not None:
        parts.append(f"s{seed}")
    name = " ".join(parts)
    if not name:
        return stage_id[:12]
    is_exact = all(_is_exact(value) for value in point.values())
    if is_exact and len(name) <= MAX_RUN_NAME:
        return name
    return f"{name[: MAX_RUN_NAME - 7].rstrip()} ~{stage_id[:5]}"


def _part(name: str, value: Any) -> str:
    short = _ABBREVIATIONS.get(name, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    glue = "" if is_number and not short[-1].isdigit() else "="
    text = short_value(value)
    return f"{short}{glue}{text.removeprefix('0') if text.startswith('0.') else text}"


def _is_exact(value: Any) -> bool:
    return not isinstance(value, float) or float(f"{value:.4g}") == value

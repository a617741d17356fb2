"""What is scored is what was written, and it is expected to fit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.blueprint import blueprint
from trainer.finalize.artifact import read_weights
from trainer.finalize.hessians import collect_hessians
from trainer.finalize.pipeline import WEIGHTS_FILE, finalize
from trainer.finalize.prune import prune
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.stored import restore
from trainer.liveness.probe import awake, losses, not_checked, rule, text
from trainer.model.build import build, load_state
from trainer.protocol import ARTIFACT_BYTES_CAP, UNKNOWN_TOKENIZER
from trainer.results import Rule
from trainer.runtime.distributed import Ranks
from trainer.sizes import forecast_weights_bytes, is_pruned, tensor_sizes
from trainer.specs.final import FinalSpec
from trainer.specs.model import ModelSpec

# How far the forecast was off where a public file could be weighed (trainer.sizes).
FORECAST_ERROR = 0.05


def artifact_rules(model: ModelSpec, final: FinalSpec, folder: Path) -> list[Rule]:
    """Finalize random weights under `folder` and load them back: round-trip and size."""
    trained = awake(model)
    state = trained.state_dict()
    tokens = text(model)
    hessians = None
    if final.quantize.gptq is not None:
        hessians = collect_hessians(trained, [tokens], Ranks())
    # What is trimmed to fit follows from the trained weights.
    whole = replace(final, trim_ones=None)
    report = finalize(state, model, whole, folder, UNKNOWN_TOKENIZER, hessians)
    exported, decoded, _ = read_weights(folder / WEIGHTS_FILE)
    stored = _stored(state, exported, final, hessians)
    scored = _losses_of(exported, decoded, tokens)
    faults: list[str] = []
    if exported != model.exported():
        faults.append("the file describes another model than the recipe exports")
    elif not torch.equal(scored, _losses_of(exported, stored, tokens)):
        faults.append("the file's losses are not those of the pruned and quantized weights")
    if torch.equal(scored, losses(trained, tokens)):
        faults.append("the file's losses are those of the weights before quantization")
    num_tensors = f"{len(decoded)} tensors give the losses of what was stored"
    return [
        rule("round-trip", faults, num_tensors),
        size(forecast_weights_bytes(model, final), report.code_bytes),
    ]


def _losses_of(model: ModelSpec, state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    fresh = build(model).eval()
    load_state(fresh, state)
    return losses(fresh, tokens)


def _stored(
    state: Mapping[str, Tensor],
    exported: ModelSpec,
    final: FinalSpec,
    hessians: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Prune and quantize in memory; what the file must say, computed without it."""
    sizes = tensor_sizes(blueprint(exported))
    kept = {size.name: state[size.name] for size in sizes}
    for size in sizes:
        if final.prune is not None and is_pruned(size, final.prune):
            kept[size.name] = prune(kept[size.name], final.prune.ratio)
    stored, _ = quantize_tensors(kept, sizes, final.quantize, hessians)
    return {name: restore(tensor) for name, tensor in stored.items()}


def size(weights_bytes: int, code_bytes: int) -> Rule:
    """The forecast artifact is within the challenge's cap; too near to it is not judged."""
    total = weights_bytes + code_bytes
    over = total - ARTIFACT_BYTES_CAP
    shown = (
        f"forecast {total:,} bytes, {code_bytes:,} of them code; the cap is {ARTIFACT_BYTES_CAP:,}"
    )
    if 0 < over <= FORECAST_ERROR * ARTIFACT_BYTES_CAP:
        return not_checked("size", f"{shown}, over by {over:,}: within the forecast's error")
    return rule("size", [f"{shown}, over by {over:,}"] if over > 0 else [], shown)

"""The small pr414 model that the public script wrote: its weights, under its names and ours.

The mapping is a second one, written down by hand: tests of the importer may compare with it.
"""

import io
import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.specs.model import (
    Attention,
    HashEmbedding,
    LnScale,
    Mlp,
    ModelSpec,
    OrthoInit,
    QGain,
    ResidualScale,
    Rope,
    SmearV1,
    Softcap,
    UNetSkips,
    ValueEmbedding,
    X0Mix,
    Xsa,
)

FOLDER = Path(__file__).parent / "golden" / "pr414"
NUM_LAYERS = 5
VALUE_LAYERS = (3, 4)

_STEM = {
    "skip_weights": "skips.scale",
    "tok_emb.weight": "embedding.weight",
    "bigram.scale": "bigram.scale",
    "bigram.embed.weight": "bigram.table.weight",
    "bigram.proj.weight": "bigram.projection.weight",
    "smear.gate": "smear.gate",
    "ve_shared.scale": "value_embedding.scale",
    "ve_shared.embed.weight": "value_embedding.table.weight",
    "ve_shared.proj.weight": "value_embedding.projection.weight",
}
_BLOCK = {
    "attn_scale": "attention_scale.scale",
    "mlp_scale": "mlp_scale.scale",
    "resid_mix": "x0_mix.mix",
    "attn.q_gain": "attention.q_gain.gain",
    "attn.c_q.weight": "attention.query.weight",
    "attn.c_k.weight": "attention.key.weight",
    "attn.c_v.weight": "attention.value.weight",
    "attn.proj.weight": "attention.out.weight",
    "mlp.fc.weight": "mlp.up.weight",
    "mlp.proj.weight": "mlp.down.weight",
}


def our_names() -> dict[str, str]:
    """Map every public name of the model's state to ours."""
    names = dict(_STEM)
    for layer in range(NUM_LAYERS):
        names |= {f"blocks.{layer}.{theirs}": f"blocks.{layer}.{ours}"
                  for theirs, ours in _BLOCK.items()}  # fmt: skip
    for index, layer in enumerate(VALUE_LAYERS):
        names[f"ve_layer_scales.{index}"] = f"blocks.{layer}.attention.value_mix.scale"
    return names


@cache
def _read() -> dict[str, Tensor]:
    packed = lzma.decompress((FOLDER / "final_model.pt.xz").read_bytes())
    return torch.load(io.BytesIO(packed), weights_only=True)


def public_state() -> dict[str, Tensor]:
    """The state under the script's names, widened to float32."""
    return {name: tensor.float() for name, tensor in _read().items()}


def our_state() -> dict[str, Tensor]:
    """The state under our names, float32."""
    names = our_names()
    return {names[name]: tensor for name, tensor in public_state().items()}


def expected() -> dict[str, Any]:
    """What the public script computed from it: expected.json's `results`."""
    return json.loads((FOLDER / "expected.json").read_text())["results"]


def model_spec() -> ModelSpec:
    """The model that the state belongs to."""
    return ModelSpec(
        vocab_size=1024,
        num_layers=NUM_LAYERS,
        dim=320,
        bigram=HashEmbedding(num_buckets=128, dim=32),
        smear=SmearV1(),
        attention=Attention(
            num_heads=5,
            num_kv_heads=1,
            rope=Rope(dims=16, ntk_reference=1024),
            q_gain=QGain(),
            xsa=Xsa(last=3),
        ),
        value_embedding=ValueEmbedding(dim=32, last=len(VALUE_LAYERS)),
        mlp=Mlp(mult=3.0),
        residual_scale=ResidualScale(),
        x0_mix=X0Mix(),
        ln_scale=LnScale(),
        unet=UNetSkips(),
        softcap=Softcap(),
        ortho_init=OrthoInit(scaled_outputs=True),
    )

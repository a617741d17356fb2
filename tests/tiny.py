"""The smallest things that still are the real ones: specs, a recipe and a prepared dataset.

Two layers of width 32 train in milliseconds a step; the text is made of few words in a fixed
grammar, so that a few steps already lower the loss.
"""

import random
from pathlib import Path
from typing import Any

from trainer.codec import parse, with_values
from trainer.data.prepare import Settings, prepare
from trainer.data.shards import Dataset
from trainer.specs.model import (
    Attention,
    DtgGate,
    HashEmbedding,
    LeakyRelu2,
    LnScale,
    Mlp,
    ModelSpec,
    Mtp,
    OrthoInit,
    QGain,
    Recurrence,
    ResidualScale,
    Rope,
    SharedKv,
    SkipGate,
    SmearV2,
    Softcap,
    SwiGlu,
    UNetSkips,
    UntiedHead,
    ValueEmbedding,
    X0Mix,
    Xsa,
)
from trainer.specs.recipe import Recipe

VOCAB_SIZE = 320
NUM_DOCUMENTS = 48
SETTINGS = Settings(vocab_size=VOCAB_SIZE, val_fraction=0.1, holdout_fraction=0.1)

_SUBJECTS = ("the cat", "a small dog", "my neighbour", "the old clock", "one green bird")
_VERBS = ("sees", "follows", "paints", "remembers", "never meets")
_OBJECTS = ("the river", "a wooden door", "three apples", "the evening train", "snow")


def full_model(**changes: Any) -> ModelSpec:
    """Return a model that has the baseline's optional parts."""
    parts: dict[str, Any] = {
        "vocab_size": 64,
        "num_layers": 3,
        "dim": 32,
        "attention": Attention(num_heads=4, num_kv_heads=2, rope=Rope(dims=4), q_gain=QGain()),
        "mlp": Mlp(mult=2.0, activation=LeakyRelu2(slope=0.5)),
        "residual_scale": ResidualScale(),
        "x0_mix": X0Mix(),
        "unet": UNetSkips(),
        "softcap": Softcap(),
        "ortho_init": OrthoInit(),
    }
    return ModelSpec(**(parts | changes))


def rich_model(**changes: Any) -> ModelSpec:
    """Return a model that has every optional part, each of those that exclude one another once."""
    parts: dict[str, Any] = {
        "num_layers": 4,
        "bigram": HashEmbedding(num_buckets=32, dim=8),
        "trigram": HashEmbedding(num_buckets=16, dim=8),
        "smear": SmearV2(width=6),
        "attention": Attention(
            num_heads=4,
            num_kv_heads=2,
            rope=Rope(dims=4, ntk_reference=6),
            q_gain=QGain(),
            xsa=Xsa(last=2),
            shared_kv=SharedKv(),
        ),
        "value_embedding": ValueEmbedding(dim=8, last=2),
        "mlp": Mlp(mult=2.0, activation=SwiGlu()),
        "ln_scale": LnScale(learned=True),
        "dtg": DtgGate(),
        "unet": UNetSkips(gate=SkipGate()),
        "recurrence": Recurrence(first=1, last=2),
        "head": UntiedHead(),
        "mtp": Mtp(num_heads=2),
    }
    return full_model(**(parts | changes))


def bare_model(**changes: Any) -> ModelSpec:
    """Return a model that has no optional part."""
    parts: dict[str, Any] = {
        "vocab_size": 64,
        "num_layers": 2,
        "dim": 32,
        "attention": Attention(num_heads=2, num_kv_heads=1),
    }
    return ModelSpec(**(parts | changes))


def recipe_data(values: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the micro recipe as plain data, with dotted paths laid over it."""
    data: dict[str, Any] = {
        "name": "micro",
        "data": {"name": "tiny"},
        "model": {
            "vocab_size": VOCAB_SIZE,
            "num_layers": 2,
            "dim": 32,
            "embedding": {"init_std": 0.02},
            "attention": {"num_heads": 2, "num_kv_heads": 1, "q_gain": {}},
            "residual_scale": {},
            "x0_mix": {},
            "unet": {},
            "softcap": {},
            "ortho_init": {},
        },
        "train": {
            "iterations": 12,
            "batch_tokens": 256,
            "seq_len": 32,
            "order": "shuffled",
            "schedule": {"warmdown_iters": 4},
            "averages": {"ema_decay": 0.9, "ema_bank": [0.5], "swa": {"every": 1}},
            "optimizer": {
                "matrix": {"lr": 0.02, "momentum_warmup_steps": 5},
                "embed": {"lr": 0.02},
                "scalar": {"lr": 0.02},
            },
        },
        "final": {"quantize": {"float_numel": 256}, "compress": {"level": 3}},
        "evaluate": {"window": 32, "stride": 8},
        "observe": {"log_every": 2},
    }
    return with_values(data, (values or {}).items())


def recipe(values: dict[str, Any] | None = None) -> Recipe:
    """Return the micro recipe, with dotted paths laid over it."""
    return parse(Recipe, recipe_data(values), "micro")


def documents(num_documents: int = NUM_DOCUMENTS, seed: int = 0) -> str:
    """Write different short documents, blank lines between them."""
    generator = random.Random(seed)
    return "\n\n".join(
        " ".join(
            f"{generator.choice(_SUBJECTS)} {generator.choice(_VERBS)} {generator.choice(_OBJECTS)}"
            f" {number} times."
            for _ in range(12)
        )
        for number in range(num_documents)
    )


def dataset(folder: Path) -> Dataset:
    """Prepare the micro dataset at `folder/tiny`, its tokenizer trained on its own text."""
    text = folder / "documents.txt"
    text.write_text(documents(), encoding="utf-8")
    return prepare([text], folder / "tiny", SETTINGS)

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from trainer.blueprint import blueprint
from trainer.finalize.artifact import write_weights
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.stored import Stored
from trainer.sizes import TensorSize, tensor_sizes
from trainer.specs.final import Compress, Quantize, Zstd
from trainer.specs.model import (
    Attention,
    Mlp,
    ModelSpec,
    QGain,
    ResidualScale,
    UNetSkips,
    X0Mix,
)

TOKENIZER = "ab" * 32
QUICK = Zstd(level=3)


@dataclass(frozen=True)
class Small:
    """A model small enough to write many times, with every role and storage kind."""

    spec: ModelSpec
    state: dict[str, torch.Tensor]
    tensors: tuple[TensorSize, ...]
    quantize: Quantize
    tokenizer_sha256: str = TOKENIZER

    @property
    def stored(self) -> dict[str, Stored]:
        return quantize_tensors(self.state, self.tensors, self.quantize)[0]

    def write(self, path: Path, spec: Compress = QUICK) -> Path:
        write_weights(path, self.spec, self.stored, spec, self.tokenizer_sha256)
        return path


@pytest.fixture
def small() -> Small:
    spec = ModelSpec(
        vocab_size=12,
        num_layers=3,
        dim=8,
        attention=Attention(num_heads=2, num_kv_heads=1, q_gain=QGain()),
        mlp=Mlp(mult=3.0),
        residual_scale=ResidualScale(),
        x0_mix=X0Mix(),
        unet=UNetSkips(),
    )
    sizes = tensor_sizes(blueprint(spec))
    generator = torch.Generator().manual_seed(0)
    return Small(
        spec=spec,
        state={size.name: torch.randn(size.shape, generator=generator) for size in sizes},
        tensors=sizes,
        quantize=Quantize(float_numel=32),
    )

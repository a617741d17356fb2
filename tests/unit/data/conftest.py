from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from trainer.data.shards import TokenStream, write_shard


@pytest.fixture
def tokenizer_path() -> Path:
    return Path(str(files("trainer.data") / "embedded" / "tokenizer.model"))


@pytest.fixture
def embedded_documents() -> list[str]:
    text = files("trainer.data") / "embedded" / "corpus-small.txt"
    return text.read_text(encoding="utf-8").split("\n\n")


@pytest.fixture
def make_stream(tmp_path: Path) -> Callable[..., TokenStream]:
    """Write shards of the given token rows and open them as one stream."""

    def make(*shards: np.ndarray) -> TokenStream:
        paths = [tmp_path / f"x_train_{i:06d}.bin" for i in range(len(shards))]
        for path, tokens in zip(paths, shards, strict=True):
            write_shard(path, tokens)
        return TokenStream(paths)

    return make

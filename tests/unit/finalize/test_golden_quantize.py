"""The public script's quantized file of a small pr414, tensor by tensor.

int6_digests.json holds the sha256 of every array of that file, under the public names: `q` and
`scale` of a quantized tensor, `float16` of another.
"""

import hashlib
import json

import pytest

from tests import golden_pr414
from trainer.blueprint import blueprint
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.stored import Floats
from trainer.sizes import tensor_sizes
from trainer.specs.final import Bits, Int8Rule, Quantize

PUBLIC = Quantize(
    bits=Bits(scalar=16),
    clip="p5",
    clip_scope="matrix",
    scale_floor=1 / 31,
    int8=Int8Rule(),
)


@pytest.fixture(scope="module")
def quantized():
    tensors = tensor_sizes(blueprint(golden_pr414.model_spec()))
    return quantize_tensors(golden_pr414.our_state(), tensors, PUBLIC)


def digests(stored):
    arrays = (
        {"float16": stored.tensor}
        if isinstance(stored, Floats)
        else {"q": stored.q, "scale": stored.scale}
    )
    return {
        name: hashlib.sha256(array.contiguous().numpy().tobytes()).hexdigest()
        for name, array in arrays.items()
    }


def test_every_stored_array_equals_the_public_scripts(quantized):
    stored, _ = quantized
    public = json.loads((golden_pr414.FOLDER / "int6_digests.json").read_text())

    ours = {theirs: digests(stored[name]) for theirs, name in golden_pr414.our_names().items()}

    assert ours == public


def test_the_error_of_every_quantized_tensor_is_the_public_scripts(quantized):
    _, records = quantized
    errors = {record.name: record.mse for record in records if record.bits <= 8}

    public = golden_pr414.expected()["int6_mse"]

    names = golden_pr414.our_names()
    assert errors == pytest.approx({names[theirs]: error for theirs, error in public.items()})

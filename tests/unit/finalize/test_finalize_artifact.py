import json
import tracemalloc
from contextlib import suppress
from random import Random

import pytest
import torch

from trainer.blueprint import blueprint
from trainer.errors import DataError
from trainer.finalize.artifact import (
    HEADER_LENGTH,
    MAGIC,
    PREFIX,
    VERSION,
    check_shapes,
    read_weights,
    write_weights,
)
from trainer.finalize.compress import compress, decompress
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.stored import Floats, Quantized, restore
from trainer.sizes import tensor_sizes
from trainer.specs.final import Bits, Quantize, Zstd
from trainer.specs.model import ModelSpec


def content_of(path):
    """Return (header bytes, payload) of a good file."""
    content = decompress(path.read_bytes()[PREFIX.size :], 1 << 20, "x")
    start = HEADER_LENGTH.size + HEADER_LENGTH.unpack_from(content)[0]
    return content[HEADER_LENGTH.size : start], content[start:]


def forge(path, header, payload):
    """Write a file whose frame is sound and whose content is whatever is given."""
    if not isinstance(header, bytes):
        header = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    frame = compress(HEADER_LENGTH.pack(len(header)) + header + payload, Zstd(level=1))
    path.write_bytes(PREFIX.pack(MAGIC, VERSION, len(frame)) + frame)
    return path


def refusal(path):
    """Return the one line with which a file is refused."""
    with pytest.raises(DataError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    "quantize",
    [
        Quantize(float_numel=32),
        Quantize(float_numel=0, bits=Bits(mlp=2, attention=2, embed=3), clip="p9"),
        Quantize(float_numel=10_000),
        Quantize(float_numel=0, bits=Bits(mlp=8, embed=16, scalar=16), symmetric=False),
    ],
)
def test_round_trip_is_exact(small, tmp_path, quantize):
    stored, _ = quantize_tensors(small.state, small.tensors, quantize)
    path = tmp_path / "weights.fw"

    num_bytes = write_weights(path, small.spec, stored, Zstd(level=3), "ab" * 32)
    model, tensors, header = read_weights(path)

    assert model == small.spec
    assert equal(tensors, {name: restore(tensor) for name, tensor in stored.items()})
    assert header.tokenizer_sha256 == "ab" * 32
    assert num_bytes == path.stat().st_size


def test_model_without_scalars_round_trips(tmp_path):
    spec = ModelSpec(vocab_size=4, num_layers=1, dim=16)
    sizes = tensor_sizes(blueprint(spec))
    state = {size.name: torch.ones(size.shape) for size in sizes}
    stored, _ = quantize_tensors(state, sizes, Quantize(float_numel=0))

    write_weights(tmp_path / "w.fw", spec, stored, Zstd(level=1), "00" * 32)
    model, tensors, _ = read_weights(tmp_path / "w.fw")

    assert model == spec
    assert equal(tensors, {name: restore(tensor) for name, tensor in stored.items()})


def test_equal_tensors_give_equal_bytes(small, tmp_path):
    once, again = small.write(tmp_path / "once.fw"), small.write(tmp_path / "again.fw")

    assert once.read_bytes() == again.read_bytes()


def test_order_of_the_given_tensors_does_not_matter(small, tmp_path):
    backwards = dict(reversed(small.stored.items()))

    write_weights(tmp_path / "b.fw", small.spec, backwards, Zstd(level=3), "ab" * 32)

    assert (tmp_path / "b.fw").read_bytes() == small.write(tmp_path / "a.fw").read_bytes()


def test_tensors_come_back_writable_and_apart(small, tmp_path):
    _, tensors, _ = read_weights(small.write(tmp_path / "w.fw"))
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    tensors["blocks.0.mlp_scale.scale"].add_(1)

    changed = [name for name in tensors if not torch.equal(tensors[name], before[name])]
    assert changed == ["blocks.0.mlp_scale.scale"]


def test_header_says_how_each_tensor_is_stored(small, tmp_path):
    _, _, header = read_weights(small.write(tmp_path / "w.fw"))

    bits = {row.name: row.bits for row in header.table}
    assert bits["embedding.weight"] == 8
    assert bits["blocks.0.mlp.up.weight"] == 6
    assert bits["blocks.0.attention.key.weight"] == 16
    assert bits["blocks.0.attention.q_gain.gain"] == 32


def test_writer_refuses_a_missing_tensor(small, tmp_path):
    stored = small.stored
    del stored["skips.scale"]

    with pytest.raises(DataError, match=r"'skips\.scale' is missing"):
        write_weights(tmp_path / "w.fw", small.spec, stored, Zstd(level=1), "ab" * 32)

    assert not (tmp_path / "w.fw").exists()


def test_check_shapes_names_what_does_not_belong(small):
    shapes = {name: tensor.shape for name, tensor in small.state.items()} | {"stray": (1,)}

    with pytest.raises(DataError, match=r"^state: tensor 'stray' is not a parameter"):
        check_shapes(shapes, small.spec, "state")


def test_every_truncation_is_refused(small, tmp_path):
    data = small.write(tmp_path / "w.fw").read_bytes()
    cut = tmp_path / "cut.fw"

    for length in [*range(PREFIX.size + 8), *range(24, len(data), 37), len(data) - 1]:
        cut.write_bytes(data[:length])
        refusal(cut)


def test_truncated_frame_with_a_repaired_prefix_is_refused(small, tmp_path):
    frame = small.write(tmp_path / "w.fw").read_bytes()[PREFIX.size :]
    cut = tmp_path / "cut.fw"

    for length in [*range(24), *range(24, len(frame), 37), len(frame) - 1]:
        cut.write_bytes(PREFIX.pack(MAGIC, VERSION, length) + frame[:length])
        refusal(cut)


def test_truncated_content_in_a_sound_frame_is_refused(small, tmp_path):
    header, payload = content_of(small.write(tmp_path / "w.fw"))

    for length in (0, 1, len(payload) // 2, len(payload) - 1):
        assert "its tensors need" in refusal(forge(tmp_path / "f.fw", header, payload[:length]))


def test_single_byte_changes_are_refused_or_without_effect(small, tmp_path):
    path = small.write(tmp_path / "w.fw")
    data, honest = path.read_bytes(), read_weights(path)
    random = Random(0)
    changed = tmp_path / "changed.fw"

    for _ in range(300):
        at = random.randrange(len(data))
        changed.write_bytes(
            data[:at] + bytes([data[at] ^ random.randrange(1, 256)]) + data[at + 1 :]
        )
        with suppress(DataError):
            model, tensors, header = read_weights(changed)
            assert (model, header) == (honest[0], honest[2])
            assert equal(tensors, honest[1])


def test_random_bytes_are_refused(tmp_path):
    random = Random(1)

    for length in (0, 3, 16, 17, 200):
        (tmp_path / "r.fw").write_bytes(random.randbytes(length))
        assert "not a weights file" in refusal(tmp_path / "r.fw")


def test_other_versions_are_refused(small, tmp_path):
    path = small.write(tmp_path / "w.fw")
    data = path.read_bytes()

    path.write_bytes(data[:4] + bytes([VERSION + 1]) + data[5:])

    assert "format version 2, this code reads 1" in refusal(path)


def test_absent_file_and_folder_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.fw")
    assert "directory" in refusal(tmp_path)


def with_row(name, row):
    def change(claims):
        at = [row[0] for row in claims["tensors"]].index(name)
        claims["tensors"][at] = row

    return change


def with_model(**values):
    return lambda claims: claims["model"].update(values)


HEADER_FAULTS = {
    "missing": (lambda c: c["tensors"].pop(), "is missing"),
    "extra": (lambda c: c["tensors"].append(["x", [4], 16]), "'x' is not a parameter"),
    "repeated": (lambda c: c["tensors"].append(c["tensors"][0]), "is given twice"),
    "unordered": (lambda c: c["tensors"].reverse(), "out of order"),
    "shape": (with_row("embedding.weight", ["embedding.weight", [8, 12], 8]), "has shape (8, 12)"),
    "huge shape": (
        with_row("embedding.weight", ["embedding.weight", [10**30, 8], 8]),
        "[name, shape, bits]",
    ),
    "negative shape": (
        with_row("embedding.weight", ["embedding.weight", [-12, -8], 8]),
        "[name, shape, bits]",
    ),
    "float shape": (
        with_row("embedding.weight", ["embedding.weight", [12.5, 8], 8]),
        "[name, shape, bits]",
    ),
    "name": (with_row("embedding.weight", [7, [12, 8], 8]), "[name, shape, bits]"),
    "no bits": (with_row("embedding.weight", ["embedding.weight", [12, 8]]), "[name, shape, bits]"),
    "nine bits": (with_row("embedding.weight", ["embedding.weight", [12, 8], 9]), "9 bits"),
    "one bit": (with_row("embedding.weight", ["embedding.weight", [12, 8], 1]), "1 bits"),
    "true bits": (with_row("embedding.weight", ["embedding.weight", [12, 8], True]), "True bits"),
    "flat integers": (
        with_row("blocks.0.attention_scale.scale", ["blocks.0.attention_scale.scale", [8], 6]),
        "6 bits",
    ),
    "no table": (lambda c: c.update(tensors=7), "[name, shape, bits]"),
    "layers": (with_model(num_layers=10**9), "larger than its tensors"),
    "width": (with_model(dim=10**30), "larger than its tensors"),
    "absurd width": (with_model(dim=10**400), "f.fw: "),
    "vocabulary": (with_model(vocab_size=10**12), "larger than its tensors"),
    "mlp": (with_model(mlp={"mult": 10**300}), "larger than its tensors"),
    "visits": (
        with_model(recurrence={"first": 0, "last": 2, "passes": 10**9}),
        "larger than its tensors",
    ),
    "training's own": (with_model(mtp={"num_heads": 10**9}), "only training uses"),
    "spec": (with_model(num_layers="three"), "num_layers"),
    "unknown part": (with_model(surprise={}), "unknown key"),
    "no spec": (lambda c: c.update(model=[]), "model"),
    "tokenizer": (lambda c: c.update(tokenizer_sha256="AB" * 32), "64 hexadecimal"),
    "unknown key": (lambda c: c.update(extra=1), "canonical JSON"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_untrue_header_is_refused(small, tmp_path, fault):
    header, payload = content_of(small.write(tmp_path / "w.fw"))
    claims = json.loads(header)
    change, reason = HEADER_FAULTS[fault]

    change(claims)

    assert reason in refusal(forge(tmp_path / "f.fw", claims, payload))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"model":NaN,"tensors":[],"tokenizer_sha256":""}',
        b'{"model":' + b"9" * 5_000 + b"}",
        b"null",
    ],
)
def test_header_that_is_no_json_object_is_refused(tmp_path, header):
    assert "JSON" in refusal(forge(tmp_path / "f.fw", header, b""))


def test_header_with_a_repeated_key_is_refused(small, tmp_path):
    header, payload = content_of(small.write(tmp_path / "w.fw"))

    twice = header.replace(b'"model":', b'"model":{},"model":')

    assert "canonical" in refusal(forge(tmp_path / "f.fw", twice, payload))


def test_header_length_beyond_the_content_is_refused(tmp_path):
    frame = compress(HEADER_LENGTH.pack(2**32 - 1) + b"{}", Zstd(level=1))
    (tmp_path / "f.fw").write_bytes(PREFIX.pack(MAGIC, VERSION, len(frame)) + frame)

    assert "not plausible" in refusal(tmp_path / "f.fw")


@pytest.mark.parametrize("integer", [32, -33])
def test_integer_off_its_grid_is_refused_by_name(small, tmp_path, integer):
    stored = small.stored
    name = "blocks.1.mlp.up.weight"
    stored[name] = Quantized(stored[name].q.clone().fill_(integer), stored[name].scale, 6)

    write_weights(tmp_path / "w.fw", small.spec, stored, Zstd(level=1), "ab" * 32)

    assert f"{name!r} leaves its 6-bit grid" in refusal(tmp_path / "w.fw")


@pytest.mark.parametrize("bits", [6, 8])
def test_the_extra_integer_of_an_asymmetric_grid_is_read(small, tmp_path, bits):
    stored = small.stored
    name = "blocks.1.mlp.up.weight"
    lowest = stored[name].q.clone().fill_(-(2 ** (bits - 1)))
    stored[name] = Quantized(lowest, stored[name].scale, bits)

    write_weights(tmp_path / "w.fw", small.spec, stored, Zstd(level=1), "ab" * 32)

    _, tensors, _ = read_weights(tmp_path / "w.fw")
    assert torch.equal(tensors[name], restore(stored[name]))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_that_is_not_positive_is_refused_by_name(small, tmp_path, scale):
    stored = small.stored
    name = "blocks.1.mlp.up.weight"
    stored[name] = Quantized(stored[name].q, stored[name].scale.clone().fill_(scale), 6)

    write_weights(tmp_path / "w.fw", small.spec, stored, Zstd(level=1), "ab" * 32)

    assert f"{name!r} has a scale" in refusal(tmp_path / "w.fw")


def test_float_that_is_not_finite_is_refused_by_name(small, tmp_path):
    stored = small.stored
    stored["skips.scale"] = Floats(torch.full((1, 8), float("inf")))

    write_weights(tmp_path / "w.fw", small.spec, stored, Zstd(level=1), "ab" * 32)

    assert "'skips.scale' is not finite" in refusal(tmp_path / "w.fw")


def test_bomb_behind_a_true_header_costs_no_memory(small, tmp_path):
    header, _ = content_of(small.write(tmp_path / "w.fw"))
    bomb = forge(tmp_path / "bomb.fw", header, bytes(1 << 26))
    tracemalloc.start()

    reason = refusal(bomb)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "its tensors need" in reason
    assert peak < 4 << 20

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest
import torch

from tests.forged import QUICK, Parts, put_together, take_apart
from trainer.blueprint import blueprint
from trainer.errors import DataError
from trainer.finalize.artifact import (
    HEADER_LENGTH,
    PREFIX,
    VERSION,
    check_shapes,
    read_weights,
    write_weights,
)
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.stored import LOW_RANK_GROUP, Floats, LowRank, Quantized, restore
from trainer.liveness.artifact import artifact_rules
from trainer.sizes import tensor_sizes
from trainer.specs.final import Bits, FinalSpec, Gptq, Lqer, Quantize, RangeCoder, TrimOnes, Zstd
from trainer.specs.model import ModelSpec

KINDS = list(QUICK)


def forge(path, header, payload, kind="zstd"):
    """Write a file whose frame is sound and whose content is whatever is given."""
    if not isinstance(header, bytes):
        header = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return put_together(path, Parts(kind, header, payload))


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
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(small, tmp_path, quantize, kind):
    stored, _ = quantize_tensors(small.state, small.tensors, quantize)
    path = tmp_path / "weights.fw"

    written = write_weights(path, small.spec, stored, QUICK[kind], "ab" * 32)
    model, tensors, header = read_weights(path)

    assert model == small.spec
    assert equal(tensors, {name: restore(tensor) for name, tensor in stored.items()})
    assert list(tensors) == [row.name for row in header.table] == list(small.state)
    assert (header.version, header.compress) == (VERSION, kind)
    assert header.tokenizer_sha256 == "ab" * 32
    assert written.num_bytes == path.stat().st_size == sum(written.by_tensor.values())
    assert set(written.by_tensor) == {"", *small.state}


def low_rank(rows, cols, rank, seed=0):
    """Return a repair of every value that it can have."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-cols // LOW_RANK_GROUP)
    return LowRank(
        a=torch.randint(-2, 2, (rows, rank), generator=draw, dtype=torch.int8),
        a_scale=torch.rand((), generator=draw).half(),
        b=torch.randint(-8, 8, (rank, cols), generator=draw, dtype=torch.int8),
        b_scale=torch.rand((rank, groups), generator=draw).half(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_repairs_round_trip_and_are_marked(small, tmp_path, kind, rank):
    stored = small.stored
    for seed, name in enumerate(("blocks.1.mlp.up.weight", "embedding.weight")):
        repair = low_rank(*stored[name].q.shape, rank, seed)
        stored[name] = replace(stored[name], low_rank=repair)

    written = write_weights(tmp_path / "w.fw", small.spec, stored, QUICK[kind], "ab" * 32)
    _, tensors, header = read_weights(tmp_path / "w.fw")

    assert equal(tensors, {name: restore(tensor) for name, tensor in stored.items()})
    ranks = {row.name: row.rank for row in header.table if row.rank}
    assert ranks == {"blocks.1.mlp.up.weight": rank, "embedding.weight": rank}
    assert written.num_bytes == sum(written.by_tensor.values())


def test_a_repair_takes_two_and_four_bits_an_entry(tmp_path):
    spec = ModelSpec(vocab_size=256, num_layers=1, dim=512)
    sizes = tensor_sizes(blueprint(spec))
    state = {size.name: torch.ones(size.shape) for size in sizes}
    stored, _ = quantize_tensors(state, sizes, Quantize(float_numel=0))
    plain = write_weights(tmp_path / "p.fw", spec, stored, Zstd(), "00" * 32)
    name = "embedding.weight"
    stored[name] = replace(stored[name], low_rank=low_rank(256, 512, 4))

    repaired = write_weights(tmp_path / "r.fw", spec, stored, Zstd(), "00" * 32)

    packed = 256 * 4 // 4 + 4 * 512 // 2 + 2 * (1 + 4 * 512 // LOW_RANK_GROUP)
    assert packed <= repaired.num_bytes - plain.num_bytes < 1.1 * packed
    assert repaired.by_tensor[name] - plain.by_tensor[name] > packed // 2


def test_coded_integers_are_weighed_exactly(small, tmp_path):
    stored = small.stored
    name = "blocks.1.mlp.up.weight"
    coded = write_weights(tmp_path / "c.fw", small.spec, stored, RangeCoder(), "ab" * 32)
    stored[name] = replace(stored[name], q=torch.zeros_like(stored[name].q))

    zeroed = write_weights(tmp_path / "z.fw", small.spec, stored, RangeCoder(), "ab" * 32)

    lengths = [len(take_apart(tmp_path / f).blobs) for f in ("c.fw", "z.fw")]
    saved = coded.by_tensor[name] - zeroed.by_tensor[name]
    assert lengths[0] > lengths[1] > 0
    assert abs(saved - (lengths[0] - lengths[1])) <= 4  # the rest is what lengths take to write


def test_what_takes_more_is_weighed_more(small, tmp_path):
    for kind in KINDS:
        by_tensor = write_weights(
            tmp_path / "w.fw", small.spec, small.stored, QUICK[kind], "ab" * 32
        ).by_tensor

        assert by_tensor["blocks.0.mlp.up.weight"] > by_tensor["blocks.0.attention.q_gain.gain"] > 0
        assert by_tensor[""] > PREFIX.size


def test_model_without_scalars_round_trips(tmp_path):
    spec = ModelSpec(vocab_size=4, num_layers=1, dim=16)
    sizes = tensor_sizes(blueprint(spec))
    state = {size.name: torch.ones(size.shape) for size in sizes}
    stored, _ = quantize_tensors(state, sizes, Quantize(float_numel=0))

    write_weights(tmp_path / "w.fw", spec, stored, Zstd(level=1), "00" * 32)
    model, tensors, _ = read_weights(tmp_path / "w.fw")

    assert model == spec
    assert equal(tensors, {name: restore(tensor) for name, tensor in stored.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tensors_give_equal_bytes(small, tmp_path, kind):
    once = small.write(tmp_path / "once.fw", QUICK[kind])
    again = small.write(tmp_path / "again.fw", QUICK[kind])

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


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(small, tmp_path, kind):
    data = small.write(tmp_path / "w.fw", QUICK[kind]).read_bytes()
    cut = tmp_path / "cut.fw"

    for length in [*range(PREFIX.size + 8), *range(24, len(data), 37), len(data) - 1]:
        cut.write_bytes(data[:length])
        refusal(cut)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_frame_with_a_repaired_prefix_is_refused(small, tmp_path, kind):
    path = small.write(tmp_path / "w.fw", QUICK[kind])
    parts = take_apart(path)
    frame = path.read_bytes()[PREFIX.size :][: PREFIX.unpack_from(path.read_bytes())[3]]

    for length in [*range(1, 24), *range(24, len(frame), 37), len(frame) - 1]:
        refusal(put_together(tmp_path / "cut.fw", parts, frame=frame[:length]))


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_content_in_a_sound_frame_is_refused(small, tmp_path, kind):
    parts = take_apart(small.write(tmp_path / "w.fw", QUICK[kind]))

    for length in (0, 1, len(parts.payload) // 2, len(parts.payload) - 1):
        short = replace(parts, payload=parts.payload[:length])
        assert "its tensors need" in refusal(put_together(tmp_path / "f.fw", short))
        lie = {"content_bytes": len(parts.content)}
        refusal(put_together(tmp_path / "f.fw", short, **lie))


@pytest.mark.parametrize("kind", KINDS)
def test_single_byte_changes_are_refused_or_without_effect(small, tmp_path, kind):
    path = small.write(tmp_path / "w.fw", QUICK[kind])
    data, honest = path.read_bytes(), read_weights(path)
    random = Random(0)
    changed = tmp_path / "changed.fw"

    for _ in range(100):
        at = random.randrange(len(data))
        changed.write_bytes(
            data[:at] + bytes([data[at] ^ random.randrange(1, 256)]) + data[at + 1 :]
        )
        with suppress(DataError):
            model, tensors, header = read_weights(changed)
            assert (model, header) == (honest[0], honest[2])
            assert equal(tensors, honest[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_of_the_content_is_seen(small, tmp_path, kind):
    columns = take_apart(small.write(tmp_path / "plain.fw")).payload
    parts = take_apart(small.write(tmp_path / "w.fw", QUICK[kind]))
    sound = put_together(tmp_path / "f.fw", replace(parts, columns=_columns(parts, columns)))
    checksum = PREFIX.unpack_from(sound.read_bytes())[5]
    read_weights(sound)

    for at in range(0, len(parts.payload), 13):
        payload = bytearray(parts.payload)
        payload[at] ^= 1 << at % 8
        changed = replace(parts, payload=bytes(payload))
        refusal(put_together(tmp_path / "f.fw", changed, checksum=checksum))


def _columns(parts, plain_payload):
    """The integers behind the frame, which a plain file has at the end of its content."""
    lengths = 4 * sum(row[2] <= 8 for row in json.loads(parts.header)["tensors"])
    return plain_payload[len(parts.payload) - lengths :] if parts.kind == "range" else b""


def test_a_wrong_checksum_is_refused(small, tmp_path):
    for kind in KINDS:
        parts = take_apart(small.write(tmp_path / "w.fw", QUICK[kind]))

        assert "checksum" in refusal(put_together(tmp_path / "f.fw", parts, checksum=1))


def test_swapped_coded_integers_are_refused(small, tmp_path):
    parts = take_apart(small.write(tmp_path / "w.fw", RangeCoder()))
    half = len(parts.blobs) // 2
    swapped = replace(parts, blobs=parts.blobs[half:] + parts.blobs[:half])

    refusal(put_together(tmp_path / "f.fw", swapped))


def test_lengths_of_coded_integers_that_lie_are_refused(small, tmp_path):
    parts = take_apart(small.write(tmp_path / "w.fw", RangeCoder()))

    for payload in (b"\xff" + parts.payload[1:], bytes(4) + parts.payload[4:]):
        lie = replace(parts, payload=payload)
        assert "bytes behind the frame" in refusal(put_together(tmp_path / "f.fw", lie))
    longer = replace(parts, blobs=parts.blobs + bytes(4))
    assert "bytes behind the frame" in refusal(put_together(tmp_path / "f.fw", longer))


def test_bytes_behind_the_frame_are_refused(small, tmp_path):
    for kind in KINDS:
        path = small.write(tmp_path / "w.fw", QUICK[kind])
        path.write_bytes(path.read_bytes() + b"more")

        refusal(path)


def test_an_unknown_compressor_is_refused(small, tmp_path):
    parts = take_apart(small.write(tmp_path / "w.fw"))

    assert "compressor 5 is unknown" in refusal(put_together(tmp_path / "f.fw", parts, kind=5))


def test_another_compressor_than_the_frame_s_is_refused(small, tmp_path):
    for kind in KINDS:
        parts = take_apart(small.write(tmp_path / "w.fw", QUICK[kind]))
        for other in range(len(KINDS)):
            if {KINDS[other], kind} in ({kind}, {"brotli", "range"}):
                continue
            refusal(put_together(tmp_path / "f.fw", parts, kind=other))


def test_random_bytes_are_refused(tmp_path):
    random = Random(1)

    for length in (0, 3, 16, 17, 200):
        (tmp_path / "r.fw").write_bytes(random.randbytes(length))
        assert "not a weights file" in refusal(tmp_path / "r.fw")


def test_other_versions_are_refused(small, tmp_path):
    path = small.write(tmp_path / "w.fw")
    data = path.read_bytes()

    path.write_bytes(data[:4] + bytes([VERSION + 1]) + data[5:])

    assert "format version 3, this code reads 2" in refusal(path)
    path.write_bytes(b"FWTS\1\0\0\0" + (len(data) - 16).to_bytes(8, "little") + data[16:])
    assert "format version 1, this code reads 2" in refusal(path)


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
        "[name, shape, bits, rank?]",
    ),
    "negative shape": (
        with_row("embedding.weight", ["embedding.weight", [-12, -8], 8]),
        "[name, shape, bits, rank?]",
    ),
    "float shape": (
        with_row("embedding.weight", ["embedding.weight", [12.5, 8], 8]),
        "[name, shape, bits, rank?]",
    ),
    "name": (with_row("embedding.weight", [7, [12, 8], 8]), "[name, shape, bits, rank?]"),
    "no bits": (
        with_row("embedding.weight", ["embedding.weight", [12, 8]]),
        "[name, shape, bits, rank?]",
    ),
    "nine bits": (with_row("embedding.weight", ["embedding.weight", [12, 8], 9]), "9 bits"),
    "one bit": (with_row("embedding.weight", ["embedding.weight", [12, 8], 1]), "1 bits"),
    "true bits": (
        with_row("embedding.weight", ["embedding.weight", [12, 8], True]),
        "[name, shape, bits, rank?]",
    ),
    "absurd bits": (
        with_row("embedding.weight", ["embedding.weight", [12, 8], 10**400]),
        "[name, shape, bits, rank?]",
    ),
    "no rank": (
        with_row("embedding.weight", ["embedding.weight", [12, 8], 8, 0]),
        "[name, shape, bits, rank?]",
    ),
    "two ranks": (
        with_row("embedding.weight", ["embedding.weight", [12, 8], 8, 1, 1]),
        "[name, shape, bits, rank?]",
    ),
    "high rank": (with_row("embedding.weight", ["embedding.weight", [12, 8], 8, 9]), "rank 9"),
    "rank of floats": (
        with_row("embedding.weight", ["embedding.weight", [12, 8], 16, 1]),
        "rank 1",
    ),
    "long name": (lambda c: c["tensors"].append(["x" * 300, [4], 16]), "[name, shape, bits"),
    "flat integers": (
        with_row("blocks.0.attention_scale.scale", ["blocks.0.attention_scale.scale", [8], 6]),
        "6 bits",
    ),
    "no table": (lambda c: c.update(tensors=7), "[name, shape, bits, rank?]"),
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


@pytest.mark.parametrize("kind", ["zstd", "range"])
@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_untrue_header_is_refused(small, tmp_path, fault, kind):
    parts = take_apart(small.write(tmp_path / "w.fw", QUICK[kind]))
    claims = json.loads(parts.header)
    change, reason = HEADER_FAULTS[fault]

    change(claims)

    assert reason in refusal(forge(tmp_path / "f.fw", claims, parts.payload, kind))


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
    parts = take_apart(small.write(tmp_path / "w.fw"))

    twice = parts.header.replace(b'"model":', b'"model":{},"model":')

    assert "canonical" in refusal(forge(tmp_path / "f.fw", twice, parts.payload))


def test_header_length_beyond_the_content_is_refused(tmp_path):
    for length in (3, 2**20, 2**32 - 1):
        content = HEADER_LENGTH.pack(length) + b"{}"
        forged = put_together(tmp_path / "f.fw", Parts("zstd", b"", b""), content)

        assert "not plausible" in refusal(forged)


@pytest.mark.parametrize("kind", ["zstd", "range"])
@pytest.mark.parametrize("integer", [32, -33])
def test_writer_refuses_an_integer_off_its_grid_by_name(small, tmp_path, integer, kind):
    stored = small.stored
    name = "blocks.1.mlp.up.weight"
    stored[name] = Quantized(stored[name].q.clone().fill_(integer), stored[name].scale, 6)

    with pytest.raises(DataError, match=rf"{name}' leaves its 6-bit grid"):
        write_weights(tmp_path / "w.fw", small.spec, stored, QUICK[kind], "ab" * 32)

    assert not (tmp_path / "w.fw").exists()


def test_reader_refuses_an_integer_off_its_grid_by_name(small, tmp_path):
    parts = take_apart(small.write(tmp_path / "w.fw"))
    claims = json.loads(parts.header)
    with_row("embedding.weight", ["embedding.weight", [12, 8], 2])(claims)

    # The same integers, said to be of 2 bits instead of 8.
    reason = refusal(forge(tmp_path / "f.fw", claims, parts.payload))

    assert "'embedding.weight' leaves its 2-bit grid" in reason


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
def test_writer_refuses_a_scale_that_is_not_positive_by_name(small, tmp_path, scale):
    stored = small.stored
    name = "blocks.1.mlp.up.weight"
    stored[name] = Quantized(stored[name].q, stored[name].scale.clone().fill_(scale), 6)

    with pytest.raises(DataError, match=rf"{name}' has a scale that is not positive"):
        write_weights(tmp_path / "w.fw", small.spec, stored, Zstd(level=1), "ab" * 32)


@pytest.mark.parametrize("kind", ["zstd", "range"])
def test_reader_refuses_a_scale_that_is_not_positive_by_name(small, tmp_path, kind):
    parts = take_apart(small.write(tmp_path / "w.fw", QUICK[kind]))
    claims = json.loads(parts.header)
    at = 4 * sum(row[2] <= 8 for row in claims["tensors"]) if kind == "range" else 0
    num_rows = sum(row[1][0] for row in claims["tensors"] if row[2] <= 8)
    payload = parts.payload[:at] + bytes(2 * num_rows) + parts.payload[at + 2 * num_rows :]

    reason = refusal(put_together(tmp_path / "f.fw", replace(parts, payload=payload)))

    assert "has a scale that is not positive" in reason


def test_float_that_is_not_finite_is_refused_by_name(small, tmp_path):
    stored = small.stored
    stored["skips.scale"] = Floats(torch.full((1, 8), float("inf")))
    with pytest.raises(DataError, match=r"'skips\.scale' is not finite"):
        write_weights(tmp_path / "w.fw", small.spec, stored, Zstd(level=1), "ab" * 32)
    parts = take_apart(small.write(tmp_path / "w.fw"))
    rows = json.loads(parts.header)["tensors"]
    tail = sum(row[1][0] * row[1][1] for row in rows if row[2] <= 8)
    payload = bytearray(parts.payload)
    payload[-tail - 1] = 0x7F  # the top byte of the last float32, which the next one completes
    payload[-tail - 1 - sum(_numel(row) for row in rows if row[2] == 32)] = 0x80

    assert "is not finite" in refusal(forge(tmp_path / "f.fw", parts.header, bytes(payload)))


def _numel(row):
    product = 1
    for width in row[1]:
        product *= width
    return product


def test_missing_coder_is_an_error_that_names_it_and_no_other_file_needs_it(small, tmp_path):
    small.write(tmp_path / "range.fw", RangeCoder())
    small.write(tmp_path / "zstd.fw")
    program = (
        "import sys; sys.modules['constriction'] = None\n"
        "from pathlib import Path\n"
        "from trainer.finalize.artifact import read_weights\n"
        "read_weights(Path('zstd.fw')); print('read')\n"
        "read_weights(Path('range.fw'))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.stdout == "read\n", done.stderr
    assert "UsageError: final.compress.kind=range: the constriction package is" in done.stderr


def test_liveness_gives_rounding_its_hessians_and_trims_nothing(small, tmp_path):
    final = FinalSpec(
        quantize=replace(small.quantize, gptq=Gptq(block=8), lqer=Lqer(tensors=1, rank=2)),
        trim_ones=TrimOnes(weights_bytes=1),
        compress=RangeCoder(),
    )

    rules = {rule.id: rule for rule in artifact_rules(small.spec, final, tmp_path)}

    assert rules["round-trip"].verdict == "pass"
    assert any(row.rank for row in read_weights(tmp_path / "weights.fw")[2].table)

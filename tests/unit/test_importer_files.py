"""Files of the public scripts: every form read to the last bit, everything else one line."""

import io
import os
import pickle
import zipfile

import pytest
import torch

from tests import public_files, tiny
from trainer.blueprint import blueprint
from trainer.codec import dump, parse, parse_assignment, with_values
from trainer.errors import DataError
from trainer.finalize.stored import Floats, Quantized, restore
from trainer.importer import formats
from trainer.importer.fitting import fit
from trainer.importer.formats import read_public
from trainer.importer.names import shared_copies
from trainer.specs.model import (
    Attention,
    DtgGate,
    HashEmbedding,
    LnScale,
    Mlp,
    ModelSpec,
    Mtp,
    SharedKv,
    SkipGate,
    SmearV1,
    SwiGlu,
    UNetSkips,
    UntiedHead,
    ValueEmbedding,
)

SPEC = tiny.full_model()
RICH = tiny.rich_model(ln_scale=LnScale())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint"


def fitted(path, spec=SPEC):
    stored = fit(read_public(path), spec, str(path))
    return stored, {name: restore(part) for name, part in stored.items()}


def refused(path, spec=SPEC):
    with pytest.raises(DataError) as caught:
        fit(read_public(path), spec, str(path))
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("compressor", public_files.COMPRESSORS)
@pytest.mark.parametrize("spec", [SPEC, RICH], ids=["full", "rich"])
def test_a_state_dict_is_taken_over_whatever_it_is_packed_in(path, spec, compressor):
    state = public_files.random_state(spec)
    public_files.write(path, state, compressor)

    _, found = fitted(path, spec)

    assert same(found, public_files.our_state(spec, state))


def test_bfloat16_is_widened(path):
    state = {name: t.bfloat16() for name, t in public_files.random_state(SPEC).items()}
    public_files.write(path, state)

    _, found = fitted(path)

    widened = {name: tensor.float() for name, tensor in state.items()}
    assert same(found, public_files.our_state(SPEC, widened))


def test_a_wrapper_s_prefix_is_no_part_of_a_name(path):
    state = public_files.random_state(SPEC)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    public_files.write(path, wrapped)

    assert same(fitted(path)[1], public_files.our_state(SPEC, state))


def test_a_mixed_file_keeps_its_integers_scales_and_floats(path):
    state = public_files.random_state(SPEC)
    content = public_files.mixed(
        state,
        {"tok_emb.weight": 8, "blocks.0.attn.c_q.weight": 6, "blocks.1.mlp.fc.weight": 5},
    )
    content["w"]["skip_weights"] = state["skip_weights"]
    content["m"]["skip_weights"] = "passthrough_ctrl"
    public_files.write(path, content, "zstd")

    stored, _ = fitted(path)

    query = stored["blocks.0.attention.query.weight"]
    assert isinstance(query, Quantized)
    assert query.bits == 6
    assert torch.equal(query.q, content["w"]["blocks.0.attn.c_q.weight.q"])
    assert torch.equal(query.scale, content["w"]["blocks.0.attn.c_q.weight.scale"])
    bits = {name: part.bits for name, part in stored.items() if isinstance(part, Quantized)}
    assert bits == {
        "embedding.weight": 8,
        "blocks.0.attention.query.weight": 6,
        "blocks.1.mlp.up.weight": 5,
    }
    control, key = stored["skips.scale"], stored["blocks.0.attention.key.weight"]
    assert isinstance(control, Floats)
    assert isinstance(key, Floats)
    assert (control.tensor.dtype, key.tensor.dtype) == (torch.float32, torch.float16)
    assert torch.equal(key.tensor, content["w"]["blocks.0.attn.c_k.weight"])


@pytest.mark.parametrize("says_width", [True, False])
@pytest.mark.parametrize("mult", [1.0, 1.1])
def test_nibbles_are_unpacked_the_even_column_first(path, mult, says_width):
    spec = tiny.bare_model(mlp=Mlp(mult=mult))  # 32 or 35 columns; an odd width is padded
    state = public_files.random_state(spec)
    name = "blocks.0.mlp.proj.weight"
    content = public_files.mixed(state, {name: 4})
    q = content["w"][f"{name}.q"]
    q[0, 0] = -8
    shifted = torch.nn.functional.pad((q + 8).to(torch.uint8), (0, q.shape[1] % 2))
    content["w"][f"{name}.q"] = (shifted[:, 0::2] << 4) | shifted[:, 1::2]
    if says_width:
        content["m"][name]["orig_shape"] = list(q.shape)
    public_files.write(path, content, "zstd")

    stored = fitted(path, spec)[0]["blocks.0.mlp.down.weight"]

    assert isinstance(stored, Quantized)
    assert stored.bits == 4
    assert torch.equal(stored.q, q)


def baseline_file(state, quantized):
    pairs = {name: public_files.rows(state[name], 127) for name in quantized}
    return {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {name: q for name, (q, _) in pairs.items()},
        "scales": {name: scale for name, (_, scale) in pairs.items()},
        "dtypes": dict.fromkeys(pairs, "float32"),
        "passthrough": {name: t.half() for name, t in state.items() if name not in pairs},
        "qmeta": {name: {"scheme": "per_row", "axis": 0} for name in pairs},
    }


def test_the_baseline_s_own_file_keeps_its_integers_and_scales(path):
    content = baseline_file(public_files.random_state(SPEC), ["tok_emb.weight"])
    public_files.write(path, content, "zlib")

    stored = fitted(path)[0]["embedding.weight"]

    assert isinstance(stored, Quantized)
    assert torch.equal(stored.q, content["quantized"]["tok_emb.weight"])
    assert torch.equal(stored.scale, content["scales"]["tok_emb.weight"])


@pytest.mark.parametrize("scale", [0.125, 0.1234567])
def test_a_scale_for_the_whole_tensor_gives_the_same_weights(path, scale):
    content = baseline_file(public_files.random_state(SPEC), ["tok_emb.weight"])
    content["scales"]["tok_emb.weight"] = torch.tensor(scale)
    public_files.write(path, content)

    _, found = fitted(path)

    q = content["quantized"]["tok_emb.weight"]
    assert torch.equal(found["embedding.weight"], q.float() * torch.tensor(scale))


def test_a_row_whose_scale_is_zero_stays_zero(path):
    content = baseline_file(public_files.random_state(SPEC), ["tok_emb.weight"])
    content["scales"]["tok_emb.weight"][3] = 0.0
    public_files.write(path, content)

    stored, found = fitted(path)

    assert isinstance(stored["embedding.weight"], Quantized)
    assert not found["embedding.weight"][3].any()
    assert (stored["embedding.weight"].scale > 0).all()


@pytest.mark.parametrize("is_quantized", [False, True])
def test_copies_of_shared_matrices_are_dropped_if_they_are_equal(path, is_quantized):
    state = with_copies()
    names = [name for name in state if ".c_k." in name]
    content = public_files.mixed(state, dict.fromkeys(names, 6)) if is_quantized else state
    public_files.write(path, content)

    stored, _ = fitted(path, RICH)

    assert "blocks.0.attention.key.weight" in stored
    assert "blocks.1.attention.key.weight" not in stored


def test_a_copy_that_differs_is_refused(path):
    state = with_copies()
    state["blocks.2.attn.c_v.weight"][0, 0] += 1
    public_files.write(path, state)

    assert refused(path, RICH) == [
        "tensor 'blocks.2.attn.c_v.weight' differs from 'blocks.0.attn.c_v.weight', which the "
        "recipe's layers share; set model.attention.shared_kv=null"
    ]


def with_copies():
    state = public_files.random_state(RICH)
    copies = shared_copies(blueprint(RICH))
    return state | {copy: state[owner].clone() for copy, owner in copies.items()}


def test_a_missing_tensor_is_one_line_with_its_name_and_shape(path):
    state = public_files.random_state(SPEC)
    del state["blocks.1.mlp.fc.weight"]
    public_files.write(path, state)

    assert refused(path) == [
        "tensor 'blocks.1.mlp.fc.weight' is missing, the recipe needs shape (64, 32); import "
        "another file or name its own recipe with --recipe"
    ]


def test_an_extra_tensor_is_one_line_with_its_name_and_shape(path):
    public_files.write(path, public_files.random_state(SPEC) | {"blocks.0.extra": torch.ones(3)})

    assert refused(path) == [
        "tensor 'blocks.0.extra' of shape (3,) has no place in the recipe's model; import another "
        "file or name its own recipe with --recipe"
    ]


def test_a_wrong_shape_is_one_line_with_both_shapes_and_the_field(path):
    state = public_files.random_state(RICH)
    state["bigram.embed.weight"] = torch.ones(128, 8)
    public_files.write(path, state)

    assert refused(path, RICH) == [
        "tensor 'bigram.embed.weight' has shape (128, 8), the recipe needs (32, 8); "
        "set model.bigram.num_buckets=128"
    ]


def test_a_cause_that_many_tensors_share_is_told_once(path):
    public_files.write(path, public_files.random_state(tiny.full_model(num_layers=5)))

    (line,) = refused(path)

    assert line == (
        "tensor 'skip_weights' has shape (2, 32), the recipe needs (1, 32); "
        "set model.num_layers=5 (20 more tensors say so)"
    )


VARIANTS = {
    "wider": {"dim": 48, "attention": Attention(num_heads=6, num_kv_heads=3)},
    "deeper": {"num_layers": 6},
    "shallower": {"num_layers": 2},
    "other heads": {"attention": Attention(num_heads=8, num_kv_heads=8)},
    "shared": {"attention": Attention(num_heads=4, num_kv_heads=2, shared_kv=SharedKv(last=1))},
    "stem": {"bigram": HashEmbedding(num_buckets=64, dim=4), "smear": SmearV1()},
    "ends": {"head": UntiedHead(), "mtp": Mtp(num_heads=2), "vocab_size": 80},
    "blocks": {"dtg": DtgGate(), "x0_mix": None, "residual_scale": None},
    "skips": {"unet": UNetSkips(gate=SkipGate())},
    "no skips": {"unet": None},
    "values": {"value_embedding": ValueEmbedding(dim=8, last=1)},
    "gated mlp": {"mlp": {"mult": 3.0, "activation": SwiGlu()}},
}


@pytest.mark.parametrize("other", VARIANTS)
@pytest.mark.parametrize("file_is_other", [True, False])
def test_following_what_the_lines_say_makes_the_file_fit(path, other, file_is_other):
    changed = with_values(dump(SPEC), dump(VARIANTS[other]).items())
    changed |= {name: None for name, value in VARIANTS[other].items() if value is None}
    specs = [parse(ModelSpec, dump_present(changed), other), SPEC]
    held, spec = specs if file_is_other else reversed(specs)
    public_files.write(path, public_files.random_state(held))

    for _ in range(3):
        try:
            fitted(path, spec)
        except DataError as error:
            spec = mended(spec, str(error))
    fitted(path, spec)


def dump_present(data):
    return {name: value for name, value in data.items() if value is not None}


def mended(spec, message):
    hints = [line.partition("; set ")[2].partition(" (")[0] for line in message.splitlines()]
    values = [parse_assignment(text) for hint in hints if hint for text in hint.split(" and ")]
    data = {"model": dump(spec)}
    return parse(ModelSpec, dump_present(with_values(data, values)["model"]), "mended")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(path, value):
    state = public_files.random_state(SPEC)
    state["blocks.0.resid_mix"][1, 3] = value
    public_files.write(path, state)

    assert refused(path) == [
        "tensor 'blocks.0.resid_mix' holds NaN or infinity; import another checkpoint"
    ]


class Bomb:
    """Runs a command when it is unpickled by whoever executes what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_wants_to_run_code_is_refused_and_runs_none(path, tmp_path):
    public_files.write(path, {"a": torch.ones(2), "b": Bomb(tmp_path / "ran")})

    (line,) = refused(path)

    assert "holds more than tensors and plain containers" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("compressor", public_files.COMPRESSORS)
@pytest.mark.parametrize("share", [0.3, 0.98])
def test_a_truncated_file_is_one_line(path, compressor, share):
    content = public_files.packed(public_files.random_state(SPEC), compressor)
    path.write_bytes(content[: int(share * len(content))])

    assert len(refused(path)) == 1


def zip_of_nothing():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"b")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        zip_of_nothing(),
        pickle.dumps([1, 2], protocol=2),
        public_files.packed([torch.ones(2)]),
        public_files.packed({}),
        public_files.packed({1: torch.ones(2)}),
        public_files.packed({"step": 3, "model": {"a": torch.ones(2)}}),
        public_files.packed({"a": torch.ones(2).int()}),
        public_files.packed({"a": torch.ones(2, 2).to_sparse()}),
        public_files.packed({"w": {}, "m": {"a": "passthrough"}}),
        public_files.packed({"w": {"a": torch.ones(2)}, "m": {}}),
        public_files.packed({"w": 1, "m": 2}),
        public_files.packed({"w": {}, "m": {"a": {"type": "int9"}}}),
        public_files.packed({"w": {}, "m": {"a": {"type": "int6"}}}),
        public_files.packed({"w": {}, "m": {"a": {"type": "alias", "to": "b"}}}),
        public_files.packed({"__quant_format__": "int9_v9"}),
        public_files.packed({"__quant_format__": formats.BASELINE_FORMAT}),
    ],
)
def test_a_foreign_file_is_one_line(path, content):
    path.write_bytes(content)

    assert len(refused(path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(64, 32)},
        {"scale": torch.ones(63).half()},
        {"scale": torch.ones(64, 2).half()},
        {"scale": -torch.ones(64).half()},
        {"scale": torch.full((64,), float("inf")).half()},
        {"q": torch.full((64, 32), 40, dtype=torch.int8)},
        {"q": torch.zeros(64, 16, dtype=torch.uint8)},
        {"meta": {"type": "int6", "block_size": 16}},
        {"meta": {"type": "int4", "orig_shape": "wide"}, "q": torch.zeros(64, 9).byte()},
    ],
)
def test_integers_that_are_not_what_their_meta_says_are_one_line(path, change):
    content = public_files.mixed(public_files.random_state(SPEC), {"tok_emb.weight": 6})
    if "meta" in change:
        content["m"]["tok_emb.weight"] = change["meta"]
    for part in ("q", "scale"):
        if part in change:
            content["w"][f"tok_emb.weight.{part}"] = change[part]
    public_files.write(path, content)

    assert len(refused(path)) == 1


@pytest.mark.parametrize(
    "compressor", [name for name in public_files.COMPRESSORS if name != "none"]
)
def test_a_stream_that_unpacks_without_end_is_stopped(path, compressor, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 1 << 20)
    path.write_bytes(public_files.COMPRESSORS[compressor](bytes(4 << 20)))

    assert "unpacks to more than" in refused(path)[0]


def test_a_missing_file_is_one_line(path):
    assert "No such file" in refused(path)[0]

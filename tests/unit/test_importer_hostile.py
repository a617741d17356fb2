"""Files made to cost memory, to hide damage or to hang: each refused in a line."""

import io
import os
import zipfile
from dataclasses import replace

import pytest
import torch

from tests import public_files, tiny
from trainer.errors import DataError
from trainer.importer import formats
from trainer.importer.fitting import fit
from trainer.importer.formats import read_public
from trainer.specs.model import LnScale

SPEC = tiny.full_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint"


def refused(path, spec=SPEC):
    with pytest.raises(DataError) as caught:
        fit(read_public(path), spec, str(path))
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert all(len(line) < 600 for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def archive(compression, copies=0):
    """Zeros as torch.save packs them, packed again; `copies` more entries name the same bytes."""
    buffer = io.BytesIO()
    content = public_files.packed({"a": torch.zeros(1 << 18)})
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.filelist += [part for part in new.filelist if part.file_size > 1000] * copies
    return buffer.getvalue()


def test_an_archive_compressed_within_is_refused(path):
    path.write_bytes(archive(zipfile.ZIP_DEFLATED))

    assert "compressed within" in refused(path)[0]


def test_an_archive_whose_parts_share_their_bytes_is_refused(path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 2 << 20)
    path.write_bytes(archive(zipfile.ZIP_STORED, copies=3))

    assert "unpacks to more" in refused(path)[0]


def test_a_flipped_byte_in_a_tensor_is_refused(path):
    content = bytearray(public_files.packed({"a": torch.arange(1000.0)}))
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(bytes(content))

    assert "checksum of" in refused(path)[0]


@pytest.mark.parametrize(
    "compressor", [name for name in public_files.COMPRESSORS if name not in ("none", "lzma")]
)
@pytest.mark.parametrize("extra", [b"x", bytes(10_000)])
def test_bytes_after_a_stream_are_refused(path, compressor, extra):
    content = public_files.packed(public_files.random_state(SPEC), compressor)
    path.write_bytes(content + extra)

    assert "bytes follow its end" in refused(path)[0]


def nested(depth):
    """A list that is a few hundred bytes in a file and 2 ** depth names in print."""
    value = ["laugh"]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "content",
    [
        {"w": {}, "m": {"a": nested(60)}},
        {"w": {}, "m": {"a": {"type": nested(60)}}},
        {
            "w": {"a.q": torch.zeros(2, 2).byte(), "a.scale": torch.ones(2)},
            "m": {"a": {"type": "int4", "orig_shape": nested(60)}},
        },
        {"__quant_format__": nested(60)},
        {"a": nested(60)},
        {"n" * 100_000: torch.ones(2)},
        {f"t{index}": torch.ones(1) for index in range(2001)},
        {"a": torch.ones(1).expand(1 << 40)},
        {"w": {"a.q": torch.ones(1).char().expand(1 << 40), "a.scale": torch.ones(())},
         "m": {"a": {"type": "int8"}}},
    ],
    ids=["kind", "type", "orig_shape", "format", "value", "name", "many", "expanded", "expanded q"],
)  # fmt: skip
def test_what_would_print_or_unfold_without_end_is_one_line(path, content):
    public_files.write(path, content)

    assert len(refused(path)) == 1


def test_a_transposed_tensor_is_taken_as_it_is(path):
    state = public_files.random_state(SPEC)
    name = "blocks.0.mlp.fc.weight"
    public_files.write(path, state | {name: state[name].T.contiguous().T})

    assert torch.equal(
        fit(read_public(path), SPEC, "x")["blocks.0.mlp.up.weight"].tensor, state[name]
    )


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_one_line(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")

    assert "not a regular file" in refused(path)[0]


def test_all_faults_are_told_at_once(path):
    spec = replace(tiny.rich_model(), ln_scale=LnScale(learned=True))
    state = public_files.random_state(replace(spec, ln_scale=LnScale()))
    state["blocks.1.attn.c_k.weight"] = state["blocks.0.attn.c_k.weight"] + 1
    state["bigram.embed.weight"] = torch.ones(64, 8)
    state["blocks.0.resid_mix"][0, 0] = float("nan")
    public_files.write(path, state)

    fixes = [line.rpartition("; ")[2] for line in refused(path, spec)]

    assert sorted(fixes) == [
        "import another checkpoint",
        "set model.attention.shared_kv=null",
        "set model.bigram.num_buckets=64",
        "set model.ln_scale.learned=false",
    ]


def test_no_more_than_twenty_lines_are_told(path):
    extra = {f"extra.{index}": torch.ones(1) for index in range(50)}
    public_files.write(path, public_files.random_state(SPEC) | extra)

    lines = refused(path)

    assert len(lines) == 21
    assert lines[-1] == "and 30 more"


def test_a_fault_that_several_lines_mend_together_has_none_of_its_own(path):
    public_files.write(path, public_files.random_state(tiny.full_model(num_layers=5, dim=48)))

    width, layers = refused(path)

    assert "; set model.dim=48 (" in width
    assert "; set model.num_layers=5 (" in layers


def test_a_matrix_of_integers_whose_place_is_a_vector_becomes_floats(path):
    spec = tiny.rich_model(ln_scale=LnScale()).exported()
    name = "blocks.0.dtg_gate.weight"
    content = public_files.mixed(public_files.random_state(spec), {name: 6})
    public_files.write(path, content)

    stored = fit(read_public(path), spec, "x")["blocks.0.dtg.weight"]

    grid = content["w"][f"{name}.q"].float() * content["w"][f"{name}.scale"].float()[:, None]
    assert torch.equal(stored.tensor, grid[0])

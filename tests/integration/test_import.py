"""`fairway import` and `fairway score` on a checkpoint that the public pr414 script wrote."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests import golden_pr414, public_files, tiny
from tests.command import Done, fairway
from trainer.codec import dump, to_yaml
from trainer.data.shards import write_shard
from trainer.finalize.artifact import read_weights
from trainer.importer.unseen import unseen
from trainer.protocol import UNKNOWN_TOKENIZER

FOLDER = golden_pr414.FOLDER
CHECKPOINT = FOLDER / "final_model.pt.xz"
TEXT = ("--tokens", FOLDER / "tokens.npy", "--tokenizer", FOLDER / "tokenizer.model")
EXACT = 1e-5  # bits per byte: as exact as float32 sums in another order are
SMALL = tuple(
    word
    for setting in (
        "model.num_layers=5",
        "model.dim=320",
        "model.attention.num_heads=5",
        "model.attention.num_kv_heads=1",
        "model.attention.xsa.last=3",
        "model.bigram.num_buckets=128",
        "model.bigram.dim=32",
        "model.value_embedding.dim=32",
    )
    for word in ("-S", setting)
)


def scored(folder: Path, *words: object) -> dict[str, float]:
    """Score the golden tokens with windows of 512."""
    done = fairway("score", folder, *TEXT, "--window", 512, *words, "-o", "json")
    assert done.status == 0, done.lines
    return json.loads(done.out)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """The public state dict, imported; and what the command said."""
    folder = tmp_path_factory.mktemp("golden") / "bank"
    done = fairway("import", CHECKPOINT, "--recipe", "pr414", *SMALL, "-o", folder)
    assert done.status == 0, done.lines
    return folder, yaml.safe_load(done.out)


@pytest.fixture(scope="module")
def public_int6():
    """The script's quantized file of the state: 5 clips of a matrix's rows, scale 1/31 or more."""

    def clips(weight):
        for share in (0.999, 0.9995, 0.9999, 0.99999):
            yield torch.quantile(weight.abs(), share, dim=1)
        yield weight.abs().amax(dim=1)

    def int6(weight):
        scales = [(clip / 31).clamp(min=1 / 31).half() for clip in clips(weight)]
        grids = [(weight / s.float()[:, None]).round().clamp(-31, 31).to(torch.int8)
                 for s in scales]  # fmt: skip
        errors = [(weight - q.float() * s.float()[:, None]).square().mean()
                  for q, s in zip(grids, scales, strict=True)]  # fmt: skip
        best = min(range(5), key=lambda index: float(errors[index]))
        return grids[best], scales[best]

    def int8(weight):
        clip = torch.quantile(weight.abs(), 0.9999984, dim=1)
        clipped = weight.clamp(-clip[:, None], clip[:, None])
        scale = (clip / 127).clamp(min=1 / 127)
        return (clipped / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale.half()

    weights, meta = {}, {}
    for name, tensor in golden_pr414.public_state().items():
        if tensor.numel() <= 65_536:
            weights[name], meta[name] = tensor.half(), "passthrough"
            continue
        kind = "int8" if name == "tok_emb.weight" else "int6"
        pair = int8(tensor) if kind == "int8" else int6(tensor)
        weights[f"{name}.q"], weights[f"{name}.scale"] = pair
        meta[name] = {"type": kind}
    return {"w": weights, "m": meta}


@pytest.fixture
def int6(public_int6, tmp_path):
    file = public_files.write(tmp_path / "final_model.int6.ptz", public_int6, "zstd")
    done = fairway("import", file, "--recipe", "pr414", *SMALL, "-o", tmp_path / "artifact")
    assert done.status == 0, done.lines
    return tmp_path / "artifact"


@pytest.mark.parametrize(
    ("name", "stride"), [("sliding_64", 64), ("sliding_128", 128), ("blocks_512", 512)]
)
def test_an_imported_state_scores_as_the_public_script_did(bank, name, stride):
    expected = golden_pr414.expected()[name]

    found = scored(bank[0], "--stride", stride, "--variant", "A")

    assert abs(found["val_bpb"] - expected["val_bpb"]) < EXACT
    assert abs(found["val_loss"] - expected["val_loss"]) < EXACT


def test_variant_c_scores_every_target_once_and_comes_out_close_by(bank):
    found = scored(bank[0], "--stride", 128)

    assert found["tokens"] == 4096
    assert abs(found["val_bpb"] - golden_pr414.expected()["sliding_128"]["val_bpb"]) < 0.05


def test_an_imported_quantized_file_scores_as_the_public_script_did(int6):
    expected = golden_pr414.expected()["int6_sliding_64"]

    found = scored(int6, "--stride", 64, "--variant", "A")

    assert abs(found["val_bpb"] - expected["val_bpb"]) < EXACT


def test_an_imported_quantized_file_holds_its_integers_and_names_no_tokenizer(int6, public_int6):
    _, tensors, header = read_weights(int6 / "weights.fw")

    bits = {row.name: row.bits for row in header.table}
    q = public_int6["w"]["blocks.2.mlp.fc.weight.q"].float()
    scale = public_int6["w"]["blocks.2.mlp.fc.weight.scale"].float()
    assert header.tokenizer_sha256 == UNKNOWN_TOKENIZER
    assert (bits["embedding.weight"], bits["blocks.2.mlp.up.weight"], bits["smear.gate"]) == (
        8,
        6,
        16,
    )
    assert torch.equal(tensors["blocks.2.mlp.up.weight"], q * scale[:, None])


def test_an_import_says_what_it_made(bank):
    folder, document = bank

    assert document == {
        "kind": "bank",
        "form": "state dict",
        "path": str(folder),
        "tensors": 61,
        "integer_tensors": 0,
        "parameters": 4_685_021,
        "bytes": (folder / "bank/raw.pt").stat().st_size,
        "assumed": unseen(golden_pr414.model_spec()),
    }


def test_a_shard_scores_as_the_same_tokens_in_an_array(bank, tmp_path):
    write_shard(tmp_path / "tokens.bin", np.load(FOLDER / "tokens.npy"))
    words = ("--window", 512, "--limit", 512, "-o", "json")

    by_shard = fairway("score", bank[0], "--tokens", tmp_path / "tokens.bin", *TEXT[2:], *words)

    by_array = scored(bank[0], "--limit", 512)
    found = json.loads(by_shard.out)
    assert (found["val_bpb"], found["tokens"]) == (by_array["val_bpb"], 512)


def npy_header(num_ids: int) -> bytes:
    """A .npy that declares so many ids and holds two."""
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({num_ids},)}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)


def test_what_the_lines_say_leads_from_the_full_recipe_to_the_file_in_two_rounds(tmp_path):
    words: list[object] = []
    for _ in range(2):
        done = fairway("import", CHECKPOINT, "--recipe", "pr414", *words, "-o", tmp_path / "out")
        for line in done.lines:
            hints = line.partition("; set ")[2].partition(" (")[0]
            words += [word for hint in hints.split(" and ") if hint for word in ("-S", hint)]
    done = fairway("import", CHECKPOINT, "--recipe", "pr414", *words, "-o", tmp_path / "out")

    assert done.status == 0, done.lines
    assert set(SMALL) - set(map(str, words)) == {"model.attention.xsa.last=3"}  # no tensor tells
    (line,) = done.lines
    assert line.startswith("no tensor tells these, check them: ")
    assert "model.attention.xsa.last=4" in line
    assert "model.softcap.cap=30.0" in line


# What is refused is shown on a micro model: nothing of it depends on the weights.
SPEC = tiny.full_model(vocab_size=1024)


@pytest.fixture
def micro(tmp_path):
    """A recipe, its state dict and the folder it was imported to."""
    data = tiny.recipe_data()
    data["model"] = dump(SPEC)
    (tmp_path / "recipe.yaml").write_text(to_yaml(data), encoding="utf-8")
    public_files.write(tmp_path / "model.pt", public_files.random_state(SPEC))
    assert micro_import(tmp_path).status == 0
    return tmp_path


def micro_import(folder: Path, file: str = "model.pt", *words: object, out: str = "bank") -> Done:
    recipe = folder / "recipe.yaml"
    return fairway("import", folder / file, "--recipe", recipe, "-o", folder / out, *words)


def test_a_file_that_does_not_fit_is_one_line_and_exit_2_and_leaves_nothing(micro):
    done = micro_import(micro, "model.pt", "-S", "model.vocab_size=512", out="other")

    assert (done.status, done.out) == (2, "")
    assert done.lines == [
        f"{micro / 'model.pt'}: tensor 'tok_emb.weight' has shape (1024, 32), the recipe needs "
        "(512, 32); set model.vocab_size=1024"
    ]
    assert not (micro / "other").exists()


def test_the_same_import_may_be_repeated(micro):
    assert micro_import(micro).status == 0


def test_an_import_that_was_cut_short_is_taken_up(micro):
    (micro / "bank/bank/index.json").unlink()

    assert micro_import(micro).status == 0
    assert (micro / "bank/bank/index.json").is_file()


def test_our_own_leftover_is_not_something_else(micro):
    (micro / "killed").mkdir()
    (micro / "killed/.import.json.123.tmp").write_text("{", encoding="utf-8")

    assert micro_import(micro, out="killed").status == 0


@pytest.mark.parametrize("missing", ["bank/index.json", "recipe.yaml"])
def test_an_import_that_was_cut_short_is_not_scored(micro, missing):
    (micro / "bank" / missing).unlink()

    done = fairway("score", micro / "bank", *TEXT, "--window", 64)

    assert (done.status, done.lines) == (
        2,
        [f"{micro / 'bank'}: the import was cut short; import the file again"],
    )


@pytest.mark.parametrize("out", ["model.pt/sub", "model.pt"])
def test_a_folder_that_cannot_be_made_is_one_line(micro, out):
    done = micro_import(micro, out=out)

    assert (done.status, done.out, len(done.lines)) == (2, "", 1)
    assert done.lines[0].startswith(f"{micro / out}: ")
    assert done.lines[0].endswith("with -o")


def test_layers_that_a_final_keeps_as_floats_do_not_stop_an_import(micro):
    data = tiny.recipe_data({"final.quantize.float16_keys": [5]})
    data["model"] = dump(replace(SPEC, num_layers=6))
    (micro / "recipe.yaml").write_text(to_yaml(data), encoding="utf-8")

    assert micro_import(micro, "model.pt", "-S", "model.num_layers=3", out="other").status == 0


@pytest.mark.parametrize("is_quantized", [False, True])
def test_an_import_without_a_text_is_not_scored_on_some_other(micro, is_quantized):
    if is_quantized:
        state = public_files.mixed(public_files.random_state(SPEC), {"tok_emb.weight": 8})
        public_files.write(micro / "model.ptz", state)
        assert micro_import(micro, "model.ptz", out="int8").status == 0
    folder = micro / ("int8" if is_quantized else "bank")

    done = fairway("score", folder, "--window", 64, "--home", micro / "home")

    assert (done.status, done.lines) == (
        2,
        [
            f"{folder}: its tokenizer is not known; name a text of it, --tokens with --tokenizer "
            "or --data"
        ],
    )


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(micro):
    public_files.write(micro / "small.pt", public_files.random_state(replace(SPEC, vocab_size=512)))
    words = ("-S", "model.vocab_size=512")
    assert micro_import(micro, "small.pt", *words, out="small").status == 0
    np.save(micro / "tokens.npy", np.array([1, 400, 500]))

    done = fairway("score", micro / "small", "--tokens", micro / "tokens.npy", *TEXT[2:],
                   "--window", 64)  # fmt: skip

    assert (done.status, done.lines) == (
        2,
        [
            f"{TEXT[3]}: 1024 tokens, but the model's vocab_size is 512; give the tokenizer that "
            "the model was trained with"
        ],
    )


@pytest.mark.parametrize("verb", [("score", "", "--window", 64), ("audit", "")])
def test_nothing_is_not_the_current_folder(micro, verb, monkeypatch):
    monkeypatch.chdir(micro / "bank")

    done = fairway(*verb)

    assert (done.status, len(done.lines)) == (2, 1)
    assert done.lines[0].startswith("'': give a path")


@pytest.mark.parametrize("content", ["[]", "{}", "3", "[1]", '[{"id": "a"}]'])
def test_an_audit_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "audit.json").write_text(content, encoding="utf-8")

    done = fairway("audit", tmp_path)

    assert (done.status, done.out, len(done.lines)) == (2, "", 1)
    assert done.lines[0].startswith(f"{tmp_path / 'audit.json'}: ")


@pytest.fixture
def old_final(tmp_path):
    """A home with a final that another version of the spec described."""
    folder = tmp_path / "store/finals/abc"
    (folder / "artifact").mkdir(parents=True)
    rule = {"id": "parity", "verdict": "pass", "detail": "equal", "source": "us"}
    (folder / "result.json").write_text("{}", encoding="utf-8")
    (folder / "task.json").write_text('{"entry": "raw", "colour": 3}', encoding="utf-8")
    (folder / "audit.json").write_text(json.dumps([rule]), encoding="utf-8")
    return folder


def test_the_audit_of_an_older_final_is_shown(old_final, tmp_path):
    done = fairway("audit", "abc", "--no-probe", "--home", tmp_path)

    assert (done.status, done.out) == (0, "pass         parity  equal\n")


def test_an_older_final_is_not_scored(old_final, tmp_path):
    done = fairway("score", "abc", "--home", tmp_path)

    assert (done.status, done.lines) == (
        2,
        [f"{old_final / 'task.json'}: made by another version of the spec; finalize it again"],
    )


@pytest.mark.parametrize("index", ['["raw"]', "3", '{"raw": 1}'])
def test_a_bank_s_index_that_is_none_is_one_line(micro, index):
    path = micro / "bank/bank/index.json"
    path.write_text(index, encoding="utf-8")

    done = fairway("score", micro / "bank", *TEXT, "--window", 64)

    assert done.lines == [f"{path}: not a checksum for each file; import the file again"]


@pytest.mark.parametrize("other", ["file", "recipe", "folder"])
def test_a_folder_that_holds_something_else_is_left_alone(micro, other):
    public_files.write(micro / "model2.pt", public_files.random_state(SPEC, seed=1))
    (micro / "used").mkdir()
    (micro / "used/notes.txt").write_text("mine", encoding="utf-8")
    words = {
        "file": ("model2.pt",),
        "recipe": ("model.pt", "-S", "model.softcap.cap=15.0"),
        "folder": ("model.pt",),
    }[other]

    done = micro_import(micro, *words, out="used" if other == "folder" else "bank")

    assert done.status == 2
    assert "holds something else than this import" in done.lines[0]
    assert len(done.lines) == 1
    assert [path.name for path in (micro / "used").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (TEXT[:2], "--tokens: say which SentencePiece model made them: --tokenizer"),
        (TEXT[2:], "--tokenizer: belongs to --tokens; a dataset has its own"),
        ((*TEXT, "--data", "tiny"), "--tokens and --data: give one of them"),
        ((*TEXT, "--limit", 4097), "has 4096 targets; ask for 1 to 4096"),
        ((*TEXT, "--limit", 0), "ask for 1 to 4096"),
        ((*TEXT, "--stride", 600), "stride=600 exceeds window=512"),
    ],
)
def test_options_that_contradict_are_one_line_and_exit_2(micro, words, reason):
    done = fairway("score", micro / "bank", "--window", 512, *words, "--home", micro)

    assert (done.status, done.out, len(done.lines)) == (2, "", 1)
    assert reason in done.lines[0]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (np.array([1, 5, 1024]), "token id 1024, but the model's vocab_size is 1024"),
        (np.array([1, -5, 3]), "expected two or more ids from 0 up"),
        (np.array([1]), "expected two or more ids"),
        (np.array([[1, 2], [3, 4]]), "expected one row of integers"),
        (np.array([1.0, 2.0]), "expected one row of integers"),
        (np.array([5, 1, 1]), "the scored tokens stand for no text"),
        (np.array(["a", None]), "not a whole .npy"),
        (npy_header(10**14), "not a whole .npy"),
        (b"\x93NUMPY\x01\x00", "not a whole .npy"),
        (b"some text", "neither a .npy of token ids nor a shard"),
        (None, "No such file"),
    ],
)
def test_tokens_that_are_none_are_one_line_and_exit_2(micro, ids, reason):
    path = micro / "tokens.npy"
    if isinstance(ids, bytes):
        path.write_bytes(ids)
    elif ids is not None:
        np.save(path, ids)

    done = fairway("score", micro / "bank", "--tokens", path, *TEXT[2:], "--window", 64)

    assert (done.status, done.out, len(done.lines)) == (2, "", 1)
    assert done.lines[0].startswith(f"{path}: ")
    assert reason in done.lines[0]


def test_a_recipe_altered_after_the_import_is_refused(micro):
    recipe = micro / "bank/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("cap: 30.0", "cap: 15.0"), encoding="utf-8")

    done = fairway("score", micro / "bank", *TEXT, "--window", 64)

    assert done.status == 2
    assert done.lines == [
        f"{recipe}: altered since the import, or read by another version; import the file again"
    ]


def test_bfloat16_is_scored_where_it_is_asked_for(bank):
    exact, rounded = (
        scored(bank[0], "--limit", 256, "--dtype", dtype) for dtype in ("float32", "bfloat16")
    )

    assert 0 < abs(exact["val_loss"] - rounded["val_loss"]) < 0.05


def test_an_import_is_scored_on_a_dataset_too(micro, tiny_dataset):
    (micro / "data").mkdir()
    (micro / "data/tiny").symlink_to(tiny_dataset.folder)

    done = fairway("score", micro / "bank", "--data", "tiny", "--window", 32, "--home", micro,
                   "-o", "json")  # fmt: skip

    assert done.status == 0, done.lines
    assert json.loads(done.out)["bytes"] == tiny_dataset.num_bytes("val")

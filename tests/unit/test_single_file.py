"""The single file of a recipe: what is in it, what is not, and that nothing is missing."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from service.singlefile.edits import Page
from service.singlefile.program import Text
from service.singlefile.write import SingleFile, pack, write_single_file
from tests import tiny
from trainer.codec import parse, read_recipe
from trainer.finalize.code import write_code
from trainer.specs.final import RangeCoder
from trainer.specs.recipe import Recipe
from trainer.specs.task import final_task, train_task

RECIPES = Path(__file__).resolve().parents[2] / "tune_spaces/recipes"
# Each with parts, or an optimizer, of its own.
SHIPPED = ["tiny", "baseline", "pr348", "pr414", "pr610-as-described", "pr951-as-described"]
BACKENDS = 'Literal["torch", "cudnn", "flash", "flash_attn_4", "flash_attn_3", "flash_attn_2"]'
TTT = {"SgdTtt", "LoraTtt", "OracleTtt", "Adapters", "Seam", "Learner", "GangStep", "Phases"}
GPTQ = {"Gptq", "Factor", "Factors", "round_rows", "collect_hessians", "calibration_batches"}


class Written(NamedTuple):
    """A single file and the names that stand in its source."""

    file: SingleFile
    source: str
    names: set[str]


def written(recipe: Recipe, folder: Path) -> Written:
    file = write_single_file(train_task(recipe), final_task(recipe), folder, world_size=1)
    source = file.source_path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    return Written(file, source, names)


def shipped(name: str) -> Recipe:
    return parse(Recipe, read_recipe(RECIPES / f"{name}.yaml"), name)


@pytest.fixture(scope="module")
def cut_out(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Cut a shipped recipe's file out, once."""
    done: dict[str, Written] = {}

    def cut(name: str) -> Written:
        if name not in done:
            done[name] = written(shipped(name), tmp_path_factory.mktemp(name))
        return done[name]

    return cut


@pytest.fixture
def baseline(cut_out: Callable[[str], Written]) -> Written:
    return cut_out("baseline")


@pytest.fixture
def pr414(cut_out: Callable[[str], Written]) -> Written:
    return cut_out("pr414")


def adapting(kind: str) -> Recipe:
    """A recipe that adapts at evaluation and rounds by Hessians."""
    ttt = {
        "sgd": {"evaluate.ttt": {"kind": "sgd", "chunk_tokens": 64}},
        "lora": {"evaluate.documents": {}, "evaluate.ttt": {"kind": "lora", "rank": 2}},
    }
    return tiny.recipe({"final.quantize.gptq": {"sequences": 2, "seq_len": 32}, **ttt[kind]})


def test_a_part_that_the_baseline_does_not_use_is_absent(baseline: Written) -> None:
    unused = {
        "SmearV1",
        "SmearV2",
        "HashEmbedding",
        "ValueEmbedding",
        "Xsa",
        "SwiGlu",
        "LeakyRelu2",
    }
    unused |= {"FakeQuant", "FakeQuants", "RangeCoder", "Brotli", "Prune", "Late", "Swa"}

    assert not (unused | TTT | GPTQ) & baseline.names
    assert {"GPT", "Muon", "Relu2", "Int8Rule", "Zstd"} <= baseline.names


def test_a_part_that_pr414_uses_is_there(pr414: Written) -> None:
    used = {"SmearV1", "HashEmbedding", "ValueEmbedding", "ValueMix", "Xsa", "LnScale"}

    assert used <= pr414.names
    assert not ({"SmearV2", "LearnedLnScale", "DtgGate"} | TTT | GPTQ) & pr414.names


def test_a_recipe_that_names_no_kernel_has_none(pr414: Written) -> None:
    ours = {"turn_heads", "mix_norm", "add_norm", "relu2_mlp", "capped_loss", "custom_op", "jit"}
    packages = {"attend_flash_attn_4", "attend_cudnn", "lacking", "document_mask", "within_by"}

    assert not (ours | packages) & pr414.names
    assert "import triton" not in pr414.source
    assert "flash_attn" not in pr414.source.replace(BACKENDS, "")


@pytest.mark.parametrize("name", ["pr414-one-h200", "pr610-one-h200"])
def test_a_recipe_for_a_gpu_can_be_cut(tmp_path: Path, name: str) -> None:
    file = written(shipped(name), tmp_path)

    assert {"Compiled", "relu2_mlp", "attend_flash_attn_4", "attend_cudnn"} <= file.names


def test_a_fused_recipe_has_the_kernels_and_their_plain_twins(tmp_path: Path) -> None:
    file = written(tiny.recipe({"train.fused": True}), tmp_path)

    assert {"turn_heads", "mix_norm", "relu2_mlp", "capped_loss"} <= file.names
    assert file.source.count("    import triton\n") == file.source.count("except ImportError:\n")
    assert file.source.count(".register_autograd(") >= 4
    assert "flash_attn" not in file.source.replace(BACKENDS, "")
    _check_unused(file.file)


def test_a_recipe_whose_scores_alone_are_fused_has_the_kernels_of_these(tmp_path: Path) -> None:
    file = written(tiny.recipe({"evaluate.fused": True}), tmp_path)

    assert {"turn_heads", "relu2_mlp"} <= file.names
    assert not {"mix_norm", "add_norm", "capped_loss"} & file.names
    _check_unused(file.file)


@pytest.mark.parametrize("name", ["flash_attn_4", "flash_attn_3", "flash_attn_2", "cudnn", "flash"])
def test_of_the_attentions_only_the_named_ones_are_there(name: str, tmp_path: Path) -> None:
    kernel = {"name": name, "substitute": "torch"}
    file = written(tiny.recipe({"train.attention": kernel}), tmp_path)

    makers = {
        "flash_attn_4": "attend_flash_attn_4",
        "flash_attn_3": "_flash_attn_3",
        "flash_attn_2": "_flash_attn_2",
        "cudnn": "attend_cudnn",
        "flash": "attend_flash",
    }
    assert set(makers.values()) & file.names == {makers[name]}
    assert {"at_hand", "lacking", "attend"} <= file.names
    _check_unused(file.file)


@pytest.mark.parametrize(("kind", "other"), [("sgd", "Adapters"), ("lora", "SgdTtt")])
def test_of_the_ways_to_adapt_only_the_named_one_is_there(
    kind: str, other: str, tmp_path: Path
) -> None:
    file = written(adapting(kind), tmp_path)

    assert {"Gptq", "Factors", "round_rows"} <= file.names
    assert ("LoraTtt" in file.names) == (kind == "lora")
    assert ("SgdTtt" in file.names) == (kind == "sgd")
    assert other not in file.names
    assert "OracleTtt" not in file.names


@pytest.mark.parametrize("name", SHIPPED)
def test_no_name_of_a_file_is_undefined_and_no_import_spare(
    name: str, cut_out: Callable[[str], Written]
) -> None:
    _check_unused(cut_out(name).file)


def _check_unused(file: SingleFile) -> None:
    rules = "--select=E9,F401,F811,F821,F823"
    options = ["--isolated", "--no-cache", "--output-format=concise", rules]

    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *options, str(file.source_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_says_what_it_weighs_and_imports(
    name: str, cut_out: Callable[[str], Written]
) -> None:
    file = cut_out(name).file

    assert file.num_bytes == file.path.stat().st_size
    assert set(file.packages) - {"zstandard", "brotli"} == {"torch", "numpy", "sentencepiece"}


@pytest.mark.parametrize("name", SHIPPED)
def test_no_object_asks_itself_for_what_its_class_has_lost(
    name: str, cut_out: Callable[[str], Written]
) -> None:
    tree = ast.parse(cut_out(name).source)
    bases = {"Exception", "Protocol", "NamedTuple"}
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} <= bases
    ]

    lost = {f"{node.name}.{each}" for node in classes for each in _asked(node) - _defined(node)}

    assert len(classes) > 40
    assert not lost


def _asked(node: ast.ClassDef) -> set[str]:
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self"
    }


def _defined(node: ast.ClassDef) -> set[str]:
    targets = [each.target for each in ast.walk(node) if isinstance(each, ast.AnnAssign)]
    targets += [t for each in ast.walk(node) if isinstance(each, ast.Assign) for t in each.targets]
    stored = {part for target in targets for part in ast.walk(target)}
    found = {part.attr for part in stored if isinstance(part, ast.Attribute)}
    found |= {part.id for part in stored if isinstance(part, ast.Name)}
    return found | {each.name for each in node.body if isinstance(each, ast.FunctionDef)}


def test_our_own_coder_is_there_for_files_that_it_writes_only(
    baseline: Written, tmp_path: Path
) -> None:
    plain = tiny.recipe()
    recipe = replace(plain, final=replace(plain.final, compress=RangeCoder()))

    file = written(recipe, tmp_path)

    assert {"constriction", "brotli"} <= set(file.file.packages)
    assert "Likelihood" in file.names
    assert "Likelihood" not in baseline.names
    assert "constriction" not in baseline.source


def test_a_file_imports_nothing_of_ours(pr414: Written) -> None:
    modules = set()
    for node in ast.walk(ast.parse(pr414.source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.partition(".")[0])

    assert not modules & {"trainer", "service", "tune_spaces", "pydantic", "yaml"}


def test_the_packed_file_is_far_smaller_than_the_smallest_counted_code(
    pr414: Written, tmp_path: Path
) -> None:
    counted = write_code(tmp_path, "packed").stat().st_size

    assert pr414.file.num_bytes <= 0.6 * counted


def test_comments_and_docstrings_stay_in_the_source(pr414: Written) -> None:
    assert "# Parts that draw random numbers come after the blocks" in pr414.source
    assert '"""(1 − σ(γ)) ⊙ x_t + σ(γ) ⊙ x_{t−1}, with nothing before' in pr414.source
    assert "type: ignore" not in pr414.source


def test_the_same_tasks_give_the_same_bytes_in_another_process(
    pr414: Written, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit import test_single_file as own; "
        "own.written(own.shipped('pr414'), Path(sys.argv[1]))"
    )

    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        cwd=RECIPES.parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )

    assert (tmp_path / "train_gpt.py").read_bytes() == pr414.file.path.read_bytes()


def test_a_file_keeps_no_average_but_the_one_that_is_exported(tmp_path: Path) -> None:
    recipe = tiny.recipe({"final.average": "ema"})

    file = written(recipe, tmp_path)

    assert "ema_bank=(0.9,)" in file.source
    assert "Swa" not in file.names


def test_the_source_unpacks_to_a_module_that_has_a_main(baseline: Written) -> None:
    packed = pack(baseline.source)

    assert packed == baseline.file.path.read_text(encoding="utf-8")
    assert "train_gpt_source" in packed
    assert max(map(len, packed.splitlines())) < baseline.file.num_bytes


def test_writing_a_file_loads_no_heavy_package() -> None:
    code = (
        "import sys, service.singlefile.write; print({'torch', 'ray', 'mlflow'} & {*sys.modules})"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert said.stdout.strip() == "set()"


def test_an_outer_edit_takes_in_those_inside_of_what_it_keeps() -> None:
    text = Text("x = (a if c else b)\n")
    page = Page(text)
    page.replace(5, 6, "z")
    page.replace(4, 19, (5, 6))

    assert page.render(0, len(text.source)) == "x = z\n"

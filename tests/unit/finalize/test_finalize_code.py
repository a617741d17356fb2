import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import grimp
import pytest

from trainer.finalize import code
from trainer.finalize.code import code_digest, code_files, minify, write_code

FORMS = ["zip", "packed"]


def run(arguments, cwd):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def test_code_is_the_package_without_text_and_fetching():
    names = list(code_files())

    assert {"trainer/__init__.py", "trainer/finalize/artifact.py"} <= set(names)
    assert "trainer/data/fetch.py" not in names
    assert all(name.startswith("trainer/") and name.endswith(".py") for name in names)
    assert not any("embedded/" in name or "__pycache__" in name for name in names)


def test_what_ships_is_what_the_command_needs_and_nothing_else():
    graph = grimp.build_graph("trainer", cache_dir=None)
    shipped = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in code_files()
    }
    # Given a folder of data, the command does not prepare one.
    graph.remove_import(importer="trainer.__main__", imported="trainer.data.prepare")

    needed = graph.find_upstream_modules("trainer.__main__") | {"trainer.__main__"}

    assert needed - shipped == set()
    packages = {module.rpartition(".")[0] for module in needed}
    assert shipped - needed - packages == set(), "list it in NOT_SHIPPED of trainer.finalize.code"


@pytest.mark.parametrize("form", FORMS)
def test_equal_sources_give_equal_bytes(tmp_path, form):
    once, again = (write_code(tmp_path / name, form) for name in ("once", "again"))

    assert once == tmp_path / "once/code.pyz"
    assert once.read_bytes() == again.read_bytes()


def test_zip_holds_the_sources_as_they_are(tmp_path):
    with zipfile.ZipFile(write_code(tmp_path, "zip")) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}

    assert {name for name in held if name not in code_files()} == {"__main__.py"}
    assert {name: held[name] for name in code_files()} == code_files()


def test_packed_is_less_than_half(tmp_path):
    whole, packed = (write_code(tmp_path / form, form).stat().st_size for form in FORMS)

    assert packed < 0.45 * whole


def test_digest_is_stable():
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64


@pytest.mark.parametrize("form", FORMS)
def test_code_alone_runs(tmp_path, form):
    write_code(tmp_path, form)

    done = run(["code.pyz", "--help"], tmp_path)

    assert done.returncode == 0, done.stderr
    assert "usage: python -m trainer" in done.stdout
    assert "without the service" in done.stdout


@pytest.mark.parametrize("form", FORMS)
def test_code_alone_imports_whole_reads_weights_and_counts_itself(
    small, tmp_path, form, monkeypatch
):
    write_code(tmp_path, form)
    small.write(tmp_path / "weights.fw")
    # Kernels for a GPU import what torch for the CPU comes without.
    program = (
        "import importlib, pkgutil, sys; sys.path.insert(0, 'code.pyz')\n"
        "from pathlib import Path\n"
        "import trainer\n"
        "absent = 0\n"
        "for module in pkgutil.walk_packages(trainer.__path__, 'trainer.'):\n"
        "    try:\n"
        "        importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name.partition('.')[0] in ('triton', 'flash_attn'), error\n"
        "        absent += 1\n"
        "ours = {m.__file__ for name, m in sys.modules.items() if name.startswith('trainer')}\n"
        "print(trainer.__file__.removesuffix('/trainer/__init__.py'))\n"
        "print(all(f.startswith(trainer.__file__[:-11]) for f in ours), len(ours) + absent)\n"
        "print(len(trainer.finalize.artifact.read_weights(Path('weights.fw'))[1]))\n"
        "print(trainer.finalize.code.code_digest())"
    )
    if form == "packed":
        files = {name: minify(held.decode()).encode() for name, held in code_files().items()}
        monkeypatch.setattr(code, "code_files", lambda: files)

    done = run(["-c", program], tmp_path)

    folder, *rest = done.stdout.split() or [done.stderr]
    assert rest == ["True", str(len(code_files())), str(len(small.state)), code_digest()]
    assert ("code.pyz" in folder) == (form == "zip")
    # What was unpacked is gone with the process.
    assert not (form == "packed" and Path(folder).exists())


def test_packed_code_that_is_damaged_does_not_run(tmp_path):
    path = write_code(tmp_path, "packed")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    done = run(["code.pyz", "--help"], tmp_path)

    assert done.returncode != 0
    assert "Corrupt input data" in done.stderr


class _Reference(ast.NodeTransformer):
    """What `minify` must leave, tree by tree: the slow way."""

    def __init__(self, source):
        self._has_docs = "__doc__" not in source
        self._in_class = False

    def _body(self, node):
        first = node.body[0]
        is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        if self._has_docs and is_doc and isinstance(first.value.value, str):
            rest = node.body[1:]
            node.body = rest or ([] if isinstance(node, ast.Module) else [ast.Expr(_ZERO)])
        return node

    def visit_Module(self, node):
        return self._body(self.generic_visit(node))

    def visit_ClassDef(self, node):
        outer, self._in_class = self._in_class, True
        node = self._body(self.generic_visit(node))
        self._in_class = outer
        return node

    def visit_FunctionDef(self, node):
        outer, self._in_class = self._in_class, False
        node = self._body(self.generic_visit(node))
        self._in_class = outer
        if not node.decorator_list:
            node.returns = None
            args = node.args
            for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg):
                if arg is not None:
                    arg.annotation = None
        return node

    def visit_AnnAssign(self, node):
        if self._in_class or node.value is None:
            return node
        return ast.Assign([node.target], node.value, lineno=0)


_ZERO = ast.Constant(0)


def tree(source):
    found = ast.parse(source)
    # A module of nothing but its docstring keeps a zero, too.
    if ast.dump(found) == ast.dump(ast.parse("0")):
        found = ast.parse("")
    return ast.dump(found)


@pytest.mark.parametrize("name", code_files())
def test_minified_sources_mean_the_same(name):
    source = code_files()[name].decode()
    reference = _Reference(source).visit(ast.parse(source))

    minified = minify(source)

    assert tree(minified) == ast.dump(reference)
    assert minify(minified) == minified
    assert len(minified) <= len(source)


TRICKY = '''"""Docs."""
import dataclasses as d  # comment with "quotes"


@d.dataclass
class Ä:
    """Only fields are read."""

    naïve: "list[int]" = d.field(default_factory=list)  # kept
    β: int = 3

    @property
    def double(self) -> int:
        """Kept annotations."""
        return self.β * 2


class Empty(Exception):
    """Nothing else."""


def ünder(ä: dict[str, tuple[int, ...]], *rest: "a, b = c", k: int = -1, **kw: (int)) -> (
    dict[str, int]
):
    """Docs over
    lines."""
    größe: int = len(ä); other: str
    spaced = f"{größe!r:>{k + 10}} {{x}}  y {'in' + 'ner'}" "  tail  # no comment"
    text = """a
      b  # kept
    """
    if not größe :
        # comment alone
        return {"x" : 1, "y":[*rest , ]}
    else :
        pick = lambda q, /, *, r = 2: (q if r else - q)
        return spaced[1 : -1], text, kw, pick(1) , 1 if größe else 2, \\
            a[1:2], 0 or 1

def proto(x: int) -> int: ...
'''


def test_minify_cuts_what_nobody_reads_and_nothing_else():
    minified = minify(TRICKY)

    assert tree(minified) == ast.dump(_Reference(TRICKY).visit(ast.parse(TRICKY)))
    assert ' naïve:"list[int]"=d.field(default_factory=list)\n' in minified
    assert " def double(self)->int:\n" in minified
    assert "class Empty(Exception):\n 0\n" in minified
    assert "def ünder(ä,*rest,k=-1,**kw):\n" in minified
    assert " größe=len(ä);other:str\n" in minified
    assert "comment" not in minified.replace("  tail  # no comment", "")
    assert minify(minified) == minified


def test_a_file_that_reads_its_docstring_keeps_it():
    assert minify('"""Help."""\nprint(__doc__)  # it\n') == '"""Help."""\nprint(__doc__)\n'

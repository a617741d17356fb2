import subprocess
import sys
import zipfile

from trainer.finalize.code import code_digest, code_files, write_code


def run(arguments, cwd):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def test_code_is_the_package_without_text_and_fetching():
    names = list(code_files())

    assert {"trainer/__init__.py", "trainer/finalize/artifact.py"} <= set(names)
    assert "trainer/data/fetch.py" not in names
    assert all(name.startswith("trainer/") and name.endswith(".py") for name in names)
    assert not any("embedded/" in name or "__pycache__" in name for name in names)


def test_equal_sources_give_equal_bytes(tmp_path):
    sizes = [write_code(tmp_path / name) for name in ("once.pyz", "again.pyz")]

    once, again = ((tmp_path / name).read_bytes() for name in ("once.pyz", "again.pyz"))
    assert once == again
    assert sizes == [len(once)] * 2


def test_zip_holds_the_sources_as_they_are(tmp_path):
    write_code(tmp_path / "code.pyz")

    with zipfile.ZipFile(tmp_path / "code.pyz") as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert {name for name in held if name not in code_files()} == {"__main__.py"}
    assert {name: held[name] for name in code_files()} == code_files()


def test_digest_is_stable():
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64


def test_zip_alone_runs(tmp_path):
    write_code(tmp_path / "code.pyz")

    done = run(["code.pyz", "--help"], tmp_path)

    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_zip_alone_imports_whole_reads_weights_and_counts_itself(small, tmp_path):
    write_code(tmp_path / "code.pyz")
    small.write(tmp_path / "weights.fw")
    program = (
        "import importlib, pkgutil, sys; sys.path.insert(0, 'code.pyz')\n"
        "from pathlib import Path\n"
        "import trainer\n"
        "for module in pkgutil.walk_packages(trainer.__path__, 'trainer.'):\n"
        "    importlib.import_module(module.name)\n"
        "ours = [m for name, m in sys.modules.items() if name.startswith('trainer')]\n"
        "print(all('code.pyz' in module.__file__ for module in ours))\n"
        "print(len(trainer.finalize.artifact.read_weights(Path('weights.fw'))[1]))\n"
        "print(trainer.finalize.code.code_digest())"
    )

    done = run(["-c", program], tmp_path)

    assert done.stdout.split() == ["True", str(len(small.state)), code_digest()], done.stderr

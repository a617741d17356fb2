"""What a run must record to be run again: code, data, versions, machine. Reads, decides nothing.

Two processes tell two sets of facts. The driver of a sweep knows the commit, the lock file and the
image that it was started from; a worker knows what it computes with (`worker_facts` has what takes
torch to read). A fact that cannot be read is None, never a guess. None names a host or a path.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, Literal

from trainer.codec import parse
from trainer.data.shards import Dataset
from trainer.errors import UsageError
from trainer.finalize.code import code_digest
from trainer.protocol import SPEC_VERSION
from trainer.runtime.environment import build_facts, numerics_variables
from trainer.runtime.files import read_json, sha256_file, write_json
from trainer.specs.base import require, spec

ROOT = Path(__file__).resolve().parent.parent
OURS = ("service", "trainer", "tune_spaces")
FACTS_FILE = "facts.json"
LOCK_FILE = "constraints.txt"
MAX_DIFF_BYTES = 1 << 20  # a larger one is told by its sha256 alone
_MAX_UNTRACKED = 200


@spec
class Gpu:
    """One GPU that a stage was computed on."""

    name: str
    uuid: str | None = None


@spec
class WorkerFacts:
    """What a stage was computed with, as its own process found it. gpus: one a rank. environment:
    the variables that change sums, as NAME=value. attention: the kernel in use, by the recipe or
    by torch's choice. fused: whether our own were used for the rest. flash_attn: the version of the
    package that the attention comes from."""

    device: Literal["cpu", "cuda"]
    python: str | None = None
    platform: str | None = None
    cpu: str | None = None
    cpu_capability: str | None = None
    """The widest instructions that torch's kernels use, such as AVX512."""
    num_cpus: int | None = None
    torch: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    nccl: str | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    attention: str | None = None
    fused: bool | None = None
    triton: str | None = None
    flash_attn: str | None = None
    numpy: str | None = None
    ray: str | None = None
    zstandard: str | None = None
    libzstd: str | None = None
    brotli: str | None = None
    zlib: str | None = None
    liblzma: str | None = None
    constriction: str | None = None
    sentencepiece: str | None = None
    threads: int | None = None
    interop_threads: int | None = None
    deterministic: bool | None = None
    cudnn_deterministic: bool | None = None
    cudnn_benchmark: bool | None = None
    matmul_precision: str | None = None
    environment: tuple[str, ...] = ()
    image_digest: str | None = None
    code_digest: str | None = None
    """Of the code that is counted."""
    spec_version: int | None = None
    resumed: "tuple[WorkerFacts, ...]" = ()
    """Of those that went on with what the first had begun, where they differ from it."""

    def __post_init__(self) -> None:
        require(not any(each.resumed for each in self.resumed), "resumed: holds no further resumed")


@spec
class DriverFacts:
    """What a sweep was started from. git_diff: of the tree against its commit, None where that is
    clean, and where git_dirty is true or None though nothing could tell it. lock_file: which file
    pinned the packages."""

    fairway: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    git_diff_sha256: str | None = None
    git_diff_bytes: int | None = None
    lock_file: str | None = None
    lock_sha256: str | None = None
    image_digest: str | None = None
    python: str | None = None
    platform: str | None = None
    torch: str | None = None
    numpy: str | None = None
    ray: str | None = None
    mlflow: str | None = None
    optuna: str | None = None
    sentencepiece: str | None = None
    zstandard: str | None = None


def environment(dataset: Dataset, diff: bytes | None = None) -> dict[str, Any]:
    """The driver's facts and the data's, as one mapping."""
    return {
        **asdict(driver_facts(diff)),
        "data_name": dataset.name,
        "data_digest": dataset.digest,
        "tokenizer_sha256": dataset.manifest.tokenizer.sha256,
        "cpu": _cpu(),
    }


def driver_facts(diff: bytes | None = None, root: Path = ROOT) -> DriverFacts:
    """Read what this process was started from: the checkout at `root` with `diff`, its
    `dirty_diff`, or the image that it was built into."""
    built = build_facts()
    commit, dirty = built.git_commit, built.git_dirty
    if (root / ".git").exists():
        head, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
        commit = None if head is None else head.decode().strip()
        dirty = None if status is None else bool(status)
    lock = Path(built.lock_file) if built.lock_file else root / LOCK_FILE
    return DriverFacts(
        fairway=version_of("fairway"),
        git_commit=commit,
        git_dirty=dirty,
        git_diff_sha256=hashlib.sha256(diff).hexdigest() if diff else None,
        git_diff_bytes=len(diff) if diff else None,
        lock_file=lock.name if lock.is_file() else None,
        lock_sha256=sha256_file(lock) if lock.is_file() else None,
        image_digest=built.image_digest,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=version_of("torch"),
        numpy=version_of("numpy"),
        ray=version_of("ray"),
        mlflow=version_of("mlflow"),
        optuna=version_of("optuna"),
        sentencepiece=version_of("sentencepiece"),
        zstandard=version_of("zstandard"),
    )


def dirty_diff(root: Path = ROOT) -> bytes | None:
    """What the checkout at `root`, or the image, has over its commit, as `git apply` takes it:
    tracked files, and those of our packages that git does not know yet. None where it is clean, and
    where the whole of it is not to be had: half a difference would be another code.
    """
    if not (root / ".git").exists():
        return _built_diff()
    plain = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv")
    unknown = ("ls-files", "-z", "--others", "--exclude-standard", "--", *OURS)
    changed, listed = _git(root, "diff", *plain, "HEAD", "--"), _git(root, *unknown)
    names = (listed or b"").split(b"\0")[:-1]
    if changed is None or listed is None or len(names) > _MAX_UNTRACKED:
        return None
    parts = [changed]
    for name in map(os.fsdecode, names):
        added = _git(root, "diff", *plain, "--no-index", "--", "/dev/null", name, differing=1)
        if added is None:
            return None
        parts.append(added)
    return b"".join(parts) or None


def _built_diff() -> bytes | None:
    """What the image was built from besides its commit, as the file in it has it."""
    built = build_facts()
    if built.git_commit is None or built.git_diff is None:
        return None
    try:
        return Path(built.git_diff).read_bytes() or None
    except OSError:
        return None


def _git(root: Path, *words: str, differing: int = 0) -> bytes | None:
    """What git prints; None where there is none, or where it fails: it ends with 0, and with
    `differing` where two files without an index are not equal."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode in (0, differing) else None


def of_gang(facts: Sequence[WorkerFacts]) -> WorkerFacts:
    """The facts of a gang: its first rank's, with the GPUs of all."""
    return replace(facts[0], gpus=tuple(gpu for each in facts for gpu in each.gpus))


def write_facts(folder: Path, facts: WorkerFacts, *, goes_on: bool = False) -> None:
    """Leave a stage's facts in its folder. Who goes on with what another has begun is added to
    those facts where it differs from all of them."""
    begun = read_facts(folder) if goes_on else None
    if begun is not None:
        known = (replace(begun, resumed=()), *begun.resumed)
        more = () if facts in known else (facts,)
        facts = replace(begun, resumed=(*begun.resumed, *more))
    write_json(folder / FACTS_FILE, asdict(facts))


def read_facts(folder: Path) -> WorkerFacts | None:
    """Read a stage's facts, None where it was computed before facts were kept."""
    path = folder / FACTS_FILE
    return parse(WorkerFacts, read_json(path), str(path)) if path.is_file() else None


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version, as the kernel or else its own tool tells it."""
    path = Path("/sys/module/nvidia/version")
    if path.is_file():
        return path.read_text().strip()
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told[0] if told else None


@cache
def process_facts() -> WorkerFacts:
    """Read what a worker's process has, whatever its device: what torch knows is not among it."""
    return WorkerFacts(
        device="cpu",
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu(),
        num_cpus=os.cpu_count(),
        triton=version_of("triton"),
        numpy=version_of("numpy"),
        ray=version_of("ray"),
        zstandard=version_of("zstandard"),
        brotli=version_of("brotli"),
        constriction=version_of("constriction"),
        sentencepiece=version_of("sentencepiece"),
        libzstd=_libzstd(),
        zlib=zlib.ZLIB_RUNTIME_VERSION,
        liblzma=_liblzma(),
        environment=tuple(f"{name}={value}" for name, value in numerics_variables().items()),
        image_digest=build_facts().image_digest,
        code_digest=code_digest(),
        spec_version=SPEC_VERSION,
    )


def _cpu() -> str | None:
    """The processor's model name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine() or None)


def _libzstd() -> str | None:
    try:
        library: Any = import_module("zstandard")
    except ImportError:
        return None
    return ".".join(map(str, library.ZSTD_VERSION))


def _liblzma() -> str | None:
    """The version of the library behind `lzma`, which Python itself does not tell."""
    try:
        told = ctypes.CDLL(import_module("_lzma").__file__).lzma_version_string
    except (AttributeError, ImportError, OSError):  # built into the interpreter, or absent
        return None
    told.restype = ctypes.c_char_p
    return told().decode()


def version_of(name: str) -> str | None:
    """The version of an installed distribution, None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages() -> None:
    """Refuse to run where another distribution has overwritten one of our packages.

    PyPI has a `trainer` and a `service`; installing one of them replaces ours without a word.
    """
    owners = packages_distributions()
    for name in OURS:
        for owner in set(owners.get(name, ())) - {"fairway"}:
            raise UsageError(
                f"package {name}: the distribution {owner} installed its own over Fairway's; "
                f"run pip uninstall {owner} and install fairway again"
            )

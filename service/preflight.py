"""What must be there before anything is spent: every check with its verdict, figures and fix.

`machine` and `attention` read what is there, `footprint` estimates what will be written; here it
is judged. Importing this loads no torch, Ray or MLflow.
"""

import importlib
import lzma
import platform
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from service.attention import FIELDS, Question, of_recipe
from service.facts import check_packages
from service.footprint import example, footprint, kernels
from service.machine import Machine, look
from service.paths import Paths
from service.plan import Plan
from service.policies import what_is_missing
from service.store import Store
from service.sweep import Sweep
from trainer.codec import parse
from trainer.data.manifest import SplitName
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import DataError, UsageError
from trainer.finalize.compress import compress, decompress
from trainer.specs.final import Compress, FinalSpec, RangeCoder

EXTRAS = ("train", "ray", "mlflow")  # what a sweep needs beyond the bare distribution
# cuDNN's fused attention is the same algorithm.
FLASH = ("flash", "cudnn", "flash_attn_4", "flash_attn_3", "flash_attn_2")
COARSE_TICK_S = 1e-3  # of a monotonic clock: steps are timed with it
LARGE_SKEW_S = 1.0
BUSY_MIB = 1024  # the driver itself keeps some hundred
# NCCL's segments and Ray's store of 150 MB; Docker gives 64 MB unless it is told.
SMALL_SHARED_MEMORY_BYTES = 1_000_000_000
FEW_FILES = 4096  # below, Ray warns of connection errors (ray 2.60)
TIGHT = 0.5  # of the free disk
_GB = 1_000_000_000
_HOME = "give a --home that can be written to"
_SHARED_HOME = "give a --home on a file system that every node mounts at the same place"
_LIBRARIES = {"zstd": "zstandard", "brotli": "brotli", "range": "constriction"}

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was found, and what to do about it."""

    name: str
    verdict: Verdict
    detail: str
    fix: str = ""

    def line(self) -> str:
        """One line for a terminal or an error."""
        return f"{self.name}: {self.detail}" + (f"; {self.fix}" if self.fix else "")


def require_ready(
    sweep: Sweep,
    paths: Paths,
    dataset: Dataset,
    plan: Plan,
    machines: Sequence[Machine] | None = None,
    *,
    is_local: bool = True,
) -> list[Check]:
    """Return the warnings of a sweep's checks; UsageError, a line a failure, if any failed.

    machines: where gangs run, as `service.nodes` finds them on a cluster. Without it they run here,
    or, unless `is_local`, GPUs and kernel are not judged.
    """
    asks = is_local and asks_kernel(sweep, plan)
    here = look(paths.store, question(sweep, plan) if asks else None)
    if machines is None:
        machines = (here,) if is_local else ()
    found = checks(sweep, paths, dataset, plan, here, machines)
    failed = [check.line() for check in found if check.verdict == "fail"]
    if failed:
        raise UsageError("\n".join(failed))
    return [check for check in found if check.verdict == "warn"]


def checks(
    sweep: Sweep | None,
    paths: Paths,
    dataset: Dataset | None,
    plan: Plan | None,
    here: Machine,
    machines: Sequence[Machine],
    *,
    verify: bool = False,
) -> list[Check]:
    """Judge this machine, the `machines` of the gangs, and the data; without a sweep what holds
    for any.

    verify: read every shard and compare its sha256, not only its size.
    """
    found: list[Check] = []
    if sweep is not None:
        found += _kernel(sweep, plan, machines)
        found += _compressor(sweep, plan)
    folders = [dataset.folder] if dataset is not None else _data_folders(sweep, paths)
    found += [_shards(sweep, folder, verify) for folder in folders]
    if sweep is not None and dataset is not None:
        found += _splits(sweep, plan, dataset)
    found += _disk(sweep, plan, here)
    found += [
        Check("store", "fail", f"{machine.host}: does not see {here.store}", _SHARED_HOME)
        for machine in machines
        if machine.sees_mark is False
    ]
    found += [_versions(), _packages()]
    found += _gpu(sweep, machines)
    everyone = [here, *(machine for machine in machines if machine is not here)]
    found += [_clock(everyone), _shared_memory(everyone), _open_files(everyone)]
    return found


def question(sweep: Sweep, plan: Plan | None = None) -> Question:
    """The attention of the sweep's model on the device of its gangs, and all others it names."""
    device = "cuda" if sweep.spec.resources.gpus_per_worker else "cpu"
    return replace(of_recipe(example(sweep, plan), device), others=kernels(sweep, plan))


def asks_kernel(sweep: Sweep, plan: Plan | None = None) -> bool:
    """Whether the sweep requires or names a kernel. Only then it is worth starting torch to ask."""
    asked = question(sweep, plan)
    return _requires_flash(sweep) or bool(asked.others or asked.fused)


def _requires_flash(sweep: Sweep) -> bool:
    return sweep.spec.require is not None and sweep.spec.require.attention is not None


def _kernel(sweep: Sweep, plan: Plan | None, machines: Sequence[Machine]) -> Iterator[Check]:
    asked = question(sweep, plan)
    where = f"on {asked.device} in {asked.dtype}"
    answers = [(each.host, each.attention) for each in machines if each.attention is not None]
    for host, got in answers:
        detail = f"{host}: {got.backend} {where}"
        if got.backend is None and got.why.startswith(FIELDS):
            yield _failed("kernel", UsageError(f"{host}: {got.why}"))
        elif got.backend is None:
            fix = "install a torch that runs on this device, or run elsewhere"
            yield Check("kernel", "fail", f"{host}: none {where}: {got.why}", fix)
        elif _requires_flash(sweep) and got.backend not in FLASH:
            detail += f", require.attention is flash: {got.why or 'torch prefers the other'}"
            fix = "set train.dtype=bfloat16, other head sizes, or drop require.attention"
            yield Check("kernel", "fail", detail, fix)
        else:
            names = ", ".join(got.at_hand)
            yield Check("kernel", "ok", f"{detail}; to be named: {names}" if names else detail)
    found = {got.backend: host for host, got in answers if got.backend is not None}
    if asked.others and len(found) > 1:
        detail = ", ".join(f"{host} has {name}" for name, host in found.items())
        fix = "install the same packages on every node, or name one that all have"
        yield Check("kernel", "fail", f"ranks would differ: {detail}", fix)
    if not answers and asks_kernel(sweep, plan):
        what = "require.attention is flash" if _requires_flash(sweep) else "a kernel is named"
        detail = f"{what}, and no machine was asked"
        yield Check("kernel", "warn", detail, "ask with `fairway doctor` while its GPUs are free")


def _compressor(sweep: Sweep, plan: Plan | None) -> Iterator[Check]:
    axis = sweep.spec.space.get("final.compress.kind")
    kinds = [example(sweep, plan).final.compress.kind] if axis is None else list(axis.extremes())
    if plan is not None:  # a derived knob may choose as well
        kinds += [final.task.final.compress.kind for final in plan.finals]
    asked = sweep.spec.require and sweep.spec.require.compressor
    for kind in dict.fromkeys(map(str, kinds)):
        if asked is not None and kind != asked:
            detail = f"final.compress.kind is {kind}, require.compressor {asked}"
            fix = f"set final.compress.kind={asked}, or change require.compressor"
            yield Check("compressor", "fail", detail, fix)
            continue
        try:
            yield Check("compressor", "ok", f"{kind}: {_try_compressor(kind)}")
        except UsageError as error:
            yield _failed("compressor", error)


def _try_compressor(kind: str) -> str:
    """Compress and restore a few bytes, and say which library at which version did."""
    spec: Compress = parse(FinalSpec, {"compress": {"kind": kind}}, "preflight").compress
    if isinstance(spec, RangeCoder):
        try:
            importlib.import_module("constriction")
        except ImportError as error:
            raise UsageError(
                f"final.compress.kind={kind}: the constriction package is missing and nothing "
                "replaces it; install it or name another kind"
            ) from error
    else:
        sample = bytes(range(256))
        restored = decompress(compress(sample, spec), kind, len(sample), "preflight")
        if restored != sample:
            raise UsageError(f"final.compress.kind={kind}: does not restore; install it again")
    if kind in _LIBRARIES:
        return f"{_LIBRARIES[kind]} {version(_LIBRARIES[kind])}"
    return f"zlib {zlib.ZLIB_RUNTIME_VERSION}" if kind == "zlib" else lzma.__name__


def _data_folders(sweep: Sweep | None, paths: Paths) -> list[Path]:
    if sweep is not None:
        return [paths.data(sweep.data.name)]
    return sorted(path for path in paths.data("*").parent.glob("*") if path.is_dir())


def _shards(sweep: Sweep | None, folder: Path, verify: bool) -> Check:
    try:
        dataset = load_dataset(folder, verify=verify)
    except DataError as error:
        return _failed("shards", error)
    digest = sweep.data.digest if sweep is not None else None
    if digest not in (None, dataset.digest):
        detail = f"{folder}: data.digest is {digest}, the files have {dataset.digest}"
        return Check("shards", "fail", detail, "prepare the data that the sweep was written for")
    splits = dataset.manifest.splits.values()
    num = sum(len(split.shards) for split in splits)
    size = sum(shard.size for split in splits for shard in split.shards)
    how = "sha256 verified" if verify else "at their sizes"
    return Check("shards", "ok", f"{folder}: {num} files, {_size(size)}, {how}")


def _splits(sweep: Sweep, plan: Plan | None, dataset: Dataset) -> Iterator[Check]:
    needed: dict[SplitName, str] = {"train": "every training", "val": "every final"}
    if sweep.spec.search.final.rank_on == "holdout":
        needed["holdout"] = "search.final.rank_on"
    for split, whom in needed.items():
        if not dataset.num_tokens(split):
            detail = f"{dataset.folder}: the {split} split is empty, {whom} needs it"
            yield Check("splits", "fail", detail, "prepare or fetch the dataset with one")
    have = dataset.num_tokens("train")
    trains = [t.task.train for t in plan.trainings] if plan is not None else []
    trains = trains or [example(sweep, plan).train]
    longest = max(train.seq_len for train in trains)
    if 0 < have <= longest:
        detail = f"{dataset.folder}: {have:,} training tokens, train.seq_len={longest} needs more"
        yield Check("splits", "fail", detail, "shorten the sequences or prepare more text")
    asked = max(train.iterations * train.batch_tokens for train in trains)
    detail = f"{asked:,} tokens of training at the most, {have:,} there"
    if have and asked > have:
        detail += f": {asked / have:.1f} epochs"
        yield Check("splits", "warn", detail, "prepare more text, unless repeats are meant")
    else:
        yield Check("splits", "ok", detail)


def _disk(sweep: Sweep | None, plan: Plan | None, here: Machine) -> Iterator[Check]:
    if here.free_bytes is None or here.store_fault is not None:
        yield Check("disk", "fail", f"{here.store}: {here.store_fault}", _HOME)
        return
    free = f"{here.store}: {_size(here.free_bytes)} free"
    fix = "free some, or give a --home on a larger disk"
    floor = sweep.spec.require.free_disk_gb if sweep is not None and sweep.spec.require else None
    if floor is not None and here.free_bytes < floor * _GB:
        detail = f"{free}, require.free_disk_gb is {floor:g}"
        yield Check("disk", "fail", detail, fix)
        return
    if sweep is None or plan is None:
        yield Check("disk", "ok", free)
        return
    need = footprint(sweep, plan, Store(here.store))
    share = need.total / max(here.free_bytes, 1)
    parts = ("banks", "states", "checkpoints", "hessians", "artifacts")
    words = ", ".join(f"{_size(getattr(need, p))} {p}" for p in parts if getattr(need, p))
    detail = f"{free}, about {_size(need.total)} to write" + (f" ({words})" if words else "")
    verdict: Verdict = "fail" if share > 1 else "warn" if share > TIGHT else "ok"
    yield Check("disk", verdict, detail, fix if verdict != "ok" else "")


def _versions() -> Check:
    """Hold what is installed against what our own package says that it needs."""
    try:
        python, asked = metadata("fairway")["Requires-Python"], requires("fairway") or []
    except PackageNotFoundError:
        detail = "fairway is not installed, so the versions that it needs are not known"
        return Check("versions", "fail", detail, "run pip install -e .")
    wrong, shown = [], [f"Python {platform.python_version()}"]
    if not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        wrong.append(f"Python {platform.python_version()} is not {python}")
    for needed in map(Requirement, asked):
        extras = [{"extra": extra} for extra in ("", *EXTRAS)]
        if needed.marker is not None and not any(map(needed.marker.evaluate, extras)):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found} is not {needed.specifier}")
        if needed.marker is not None:
            shown.append(f"{needed.name} {found}")
    if wrong:
        return Check("versions", "fail", ", ".join(wrong), 'run pip install "fairway[all]"')
    return Check("versions", "ok", ", ".join(shown))


def _packages() -> Check:
    try:
        check_packages()
    except UsageError as error:
        return _failed("packages", error)
    return Check("packages", "ok", "Fairway's own")


def _gpu(sweep: Sweep | None, machines: Sequence[Machine]) -> Iterator[Check]:
    asks_gpus = sweep is not None and sweep.spec.resources.gpus_per_worker > 0
    on_fault: Verdict = "fail" if asks_gpus else "warn"
    for machine in machines:
        detail = f"{machine.host}: {_gpus(machine)}"
        busy = [gpu for gpu in machine.gpus if gpu.used_mib > BUSY_MIB]
        if machine.gpu_fault is not None:
            fix = "mend the driver; `nvidia-smi` must answer"
            yield Check("gpu", on_fault, f"{machine.host}: {machine.gpu_fault}", fix)
        elif busy:
            used = ", ".join(f"{gpu.index}: {gpu.used_mib:,} MiB" for gpu in busy)
            fix = "wait for the other processes, or leave these out by CUDA_VISIBLE_DEVICES"
            yield Check("gpu", "warn", f"{detail}; in use by others: {used}", fix)
        else:
            yield Check("gpu", "ok", detail)
    if sweep is None or not machines:
        return
    resources = sweep.spec.resources
    places = [{"Alive": True, "Resources": {"GPU": len(m.gpus), "CPU": 2**20}} for m in machines]
    missing = what_is_missing(resources, places)
    if missing is not None:
        fix = "lower resources.workers, set resources.gpus_per_worker=0, or run where there are"
        yield Check("gpu", "fail", f"resources: {missing}", fix)
    name = sweep.spec.require.gpu if sweep.spec.require is not None else None
    if name is None:
        return
    others = {g.name for m in machines for g in m.gpus if name.lower() not in g.name.lower()}
    if others or not any(machine.gpus for machine in machines):
        there = ", ".join(sorted(others)) or "none"
        fix = "run on the GPU that the sweep is for, or change require.gpu"
        yield Check("gpu", "fail", f"require.gpu is {name}, here: {there}", fix)


def _gpus(machine: Machine) -> str:
    """2 × NVIDIA H200 (143,771 MiB), driver 570.1; none."""
    kinds = [f"{gpu.name} ({gpu.memory_mib:,} MiB), driver {gpu.driver}" for gpu in machine.gpus]
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)) or "none"


def _clock(machines: Sequence[Machine]) -> Check:
    tick = max(machine.tick_s for machine in machines)
    skews = {m.host: m.skew_s for m in machines if m.skew_s is not None}
    host = max(skews, key=lambda each: abs(skews[each]), default="")
    detail = f"monotonic to {tick:g} s"
    if tick > COARSE_TICK_S:
        fix = "run on a machine whose clock can time a step"
        return Check("clock", "fail", detail, fix)
    if not host:
        return Check("clock", "warn", f"{detail}, no file system to compare with", _HOME)
    detail += f", system clock within {abs(skews[host]):.3g} s of the store's file system"
    if abs(skews[host]) > LARGE_SKEW_S:
        return Check("clock", "warn", f"{detail} on {host}", "set the clocks by NTP")
    return Check("clock", "ok", detail)


def _shared_memory(machines: Sequence[Machine]) -> Check:
    sizes = {m.host: m.shared_memory_bytes for m in machines if m.shared_memory_bytes is not None}
    if not sizes:
        return Check("shared memory", "ok", "this system has no /dev/shm")
    host, size = min(sizes.items(), key=lambda each: each[1])
    if size < SMALL_SHARED_MEMORY_BYTES:
        fix = "start the container with --shm-size of some GB, or Ray and NCCL go by disk or fail"
        return Check("shared memory", "warn", f"{host}: /dev/shm has {_size(size)}", fix)
    return Check("shared memory", "ok", f"/dev/shm has {_size(size)}")


def _open_files(machines: Sequence[Machine]) -> Check:
    least = min(machines, key=lambda machine: machine.open_files)
    detail = f"{least.host}: up to {least.open_files:,} a process"
    if least.open_files < FEW_FILES:
        return Check("open files", "warn", detail, "raise the hard limit: ulimit -Hn 65536")
    return Check("open files", "ok", detail)


def _failed(name: str, error: UsageError) -> Check:
    """An error's last clause says what to do."""
    detail, _, fix = str(error).splitlines()[0].rpartition("; ")
    return Check(name, "fail", detail or fix, fix if detail else "")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GB:,.1f} GB" if num_bytes >= _GB else f"{num_bytes / 1e6:,.1f} MB"

"""What `fairway doctor` and `fairway run` find missing before anything is spent."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.attention import Attention, reason_of_flash
from service.footprint import example, footprint
from service.identity import inputs_of
from service.machine import Machine, look
from service.paths import Paths
from service.plan import Plan, make_plan
from service.preflight import Check, asks_kernel, checks, question, require_ready
from service.store import Store
from service.sweep import Sweep, load_sweep
from tests import tiny
from trainer.data.prepare import prepare
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import UsageError
from trainer.runtime.files import write_json
from trainer.sizes import num_params

ROOT = Path(__file__).resolve().parents[2]
BFLOAT16 = {"train.dtype": "bfloat16"}  # most kernels want half precision
# What nvidia-smi 550.54 prints for the fields that are asked for, of two GPUs.
SMI = """\
0, GPU-5f0f0c3e-aaaa, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4
1, GPU-91d3b7aa-bbbb, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 40312
"""


@pytest.fixture
def home(tmp_path: Path, tiny_dataset: Dataset) -> Paths:
    """A home that holds the micro dataset, to be damaged at will."""
    paths = Paths(tmp_path / "home")
    shutil.copytree(tiny_dataset.folder, paths.data("tiny"))
    return paths


def write_sweep(folder: Path, **changes: Any) -> Path:
    recipe = folder / "micro.yaml"
    data = tiny.recipe_data()
    del data["final"]["compress"]  # its level is zstd's
    recipe.write_text(yaml.safe_dump(data))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "trial", "recipe": str(recipe), **changes}))
    return path


def planned(home: Paths, **changes: Any) -> tuple[Sweep, Dataset, Plan]:
    sweep = load_sweep(write_sweep(home.home.parent, **changes))
    dataset = load_dataset(home.data("tiny"))
    return sweep, dataset, make_plan(sweep, inputs_of(dataset), "sweep.yaml")


def examine(home: Paths, here: Machine | None = None, **changes: Any) -> list[Check]:
    """Every check of a sweep of one point, on this machine unless another is given."""
    sweep, dataset, plan = planned(home, **changes)
    here = here or look(home.store)
    return checks(sweep, home, dataset, plan, here, [here])


def wrong(found: list[Check]) -> dict[str, str]:
    """What is not ok, by name: the verdict and its line."""
    return {c.name: f"{c.verdict} {c.detail}; {c.fix}" for c in found if c.verdict != "ok"}


def doctor(home: Paths, *words: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, after a line of Python."""
    program = f"import sys; {before or 'pass'}\nfrom service.cli import main\nmain()"
    command = [sys.executable, "-c", program, "doctor", *map(str, words), "--home", str(home.home)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=480)


def test_a_machine_that_has_all_passes_every_check(home):
    found = examine(home, constraints=["audit == pass"])

    assert not wrong(found)
    assert {"compressor", "shards", "splits", "disk", "versions", "packages", "gpu", "clock"} <= {
        check.name for check in found
    }


def test_the_doctor_says_what_is_missing_and_exits_with_2(home):
    sweep = write_sweep(home.home.parent, overrides={"final.compress.kind": "brotli"})
    shard = next(home.data("tiny").glob("*train*"))
    shard.unlink()

    done = doctor(home, sweep, "-o", "json", before="sys.modules['brotli'] = None")

    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 2
    assert done.stderr == f"doctor: 2 of {len(rows)} checks failed: compressor, shards\n"
    assert rows["shards"] == {
        "name": "shards",
        "verdict": "fail",
        "detail": f"{shard}: No such file or directory",
        "fix": "prepare or fetch it again",
    }
    assert "brotli: the brotli package is missing" in rows["compressor"]["detail"]
    assert rows["kernel"]["detail"].endswith("flash on cpu in float32; to be named: torch")


def test_a_truncated_shard_fails(home):
    shard = next(home.data("tiny").glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-2])

    found = checks(None, home, None, None, look(home.store), [])

    assert "truncated" in wrong(found)["shards"]


def test_an_altered_shard_of_the_right_size_is_found_by_verify_alone(home):
    shard = next(home.data("tiny").glob("*train*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    here = look(home.store)

    glanced = checks(None, home, None, None, here, [])
    verified = checks(None, home, None, None, here, [], verify=True)

    assert "shards" not in wrong(glanced)
    assert "changed or corrupted" in wrong(verified)["shards"]


def test_other_data_than_the_sweep_was_written_for_fails(home):
    sweep = load_sweep(write_sweep(home.home.parent, data={"name": "tiny", "digest": "sha256:0"}))

    found = checks(sweep, home, None, None, look(home.store), [])

    assert "fail" in wrong(found)["shards"]
    assert "data.digest is sha256:0" in wrong(found)["shards"]


def test_ranking_on_holdout_needs_a_holdout_split(home):
    text = home.home / "text.txt"
    text.write_text(tiny.documents(), encoding="utf-8")
    shutil.rmtree(home.data("tiny"))
    prepare([text], home.data("tiny"), replace(tiny.SETTINGS, holdout_fraction=0.0))

    plain = examine(home)
    ranked = examine(home, search={"final": {"rank_on": "holdout", "top": 1}})

    assert "splits" not in wrong(plain)
    assert "the holdout split is empty, search.final.rank_on needs it" in wrong(ranked)["splits"]


def test_repeated_epochs_are_a_warning_with_their_number(home):
    tokens = load_dataset(home.data("tiny")).num_tokens("train")
    steps = -(-5 * tokens // 2 // 256)

    found = wrong(examine(home, overrides={"train.iterations": steps}))

    assert found["splits"].startswith("warn")
    assert ": 2.5 epochs" in found["splits"]


def test_a_sequence_longer_than_the_data_fails(home):
    long = 2**17
    overrides = {"train.seq_len": long, "train.batch_tokens": long}

    found = [c for c in examine(home, overrides=overrides) if c.verdict == "fail"]

    assert [check.name for check in found] == ["splits"]
    assert f"train.seq_len={long} needs more" in found[0].detail


def test_an_impossible_amount_of_free_disk_fails(home):
    found = wrong(examine(home, require={"free_disk_gb": 1e9}))

    assert found["disk"].startswith("fail")
    assert "require.free_disk_gb is 1e+09" in found["disk"]


def test_a_disk_warns_when_tight_and_fails_when_the_sweep_cannot_fit(home):
    sweep, _, plan = planned(home)
    need, here = footprint(sweep, plan, Store(home.store)).total, look(home.store)

    roomy, tight, full = (
        wrong(examine(home, replace(here, free_bytes=int(need * factor)))).get("disk", "ok")
        for factor in (3, 1.5, 0.9)
    )

    assert (roomy, tight.split()[0], full.split()[0]) == ("ok", "warn", "fail")
    assert "banks" in full


def test_what_lies_in_the_store_is_not_counted_again(home):
    space = {"train.schedule.warmdown_iters": {"values": [2, 4]}}
    sweep, _, plan = planned(home, space=space)
    store = Store(home.store)
    entries = 1 + 2 + 1  # raw, two decays, SWA
    bank = 4 * entries * num_params(plan.trainings[0].task.model)

    before = footprint(sweep, plan, store)
    write_json(store.folder("trainings", plan.trainings[0].id) / "result.json", {})
    write_json(store.folder("artifacts", plan.finals[0].artifact) / "result.json", {})
    after = footprint(sweep, plan, store)

    assert (before.banks, after.banks) == (2 * bank, bank)
    assert before.artifacts == 2 * after.artifacts > 0
    assert before.states > 0


def test_a_home_that_cannot_be_written_to_fails(home, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")

    found = wrong(checks(None, home, None, None, look(blocked / "store"), []))

    assert "Not a directory" in found["disk"]
    assert found["clock"].startswith("warn")


@pytest.mark.parametrize("kind", ["zstd", "brotli", "lzma", "zlib", "range"])
def test_every_compressor_is_tried_and_held_to_the_one_required(home, kind):
    overrides = {"final.compress.kind": kind}

    alike = examine(home, overrides=overrides, require={"compressor": kind})
    other = "zlib" if kind != "zlib" else "lzma"
    unlike = examine(home, overrides=overrides, require={"compressor": other})

    assert "compressor" not in wrong(alike)
    assert (
        f"final.compress.kind is {kind}, require.compressor {other}" in wrong(unlike)["compressor"]
    )


def test_an_axis_over_compressors_is_checked_at_every_value(home):
    space = {"final.compress.kind": {"values": ["zstd", "brotli"]}}

    found = [c for c in examine(home, space=space) if c.name == "compressor"]

    assert [check.detail.partition(":")[0] for check in found] == ["zstd", "brotli"]


def test_a_kernel_other_than_the_required_one_fails(home):
    slow = replace(look(home.store), attention=Attention("math", "head_dim is odd"))

    asked = wrong(examine(home, slow, require={"attention": "flash"}))
    unasked = wrong(examine(home, slow))

    assert "math on cpu in float32, require.attention is flash: head_dim is odd" in asked["kernel"]
    assert "kernel" not in unasked


@pytest.mark.parametrize(
    ("require", "asks"),
    [(None, False), ({"free_disk_gb": 0.001}, False), ({"attention": "flash"}, True)],
)
def test_only_who_requires_a_kernel_has_torch_started_for_it(home, require, asks):
    sweep, _, _ = planned(home, require=require)

    assert asks_kernel(sweep) is asks


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_kernel_that_is_not_here_is_refused_by_its_field(home, stage):
    named = {f"{stage}.attention.name": "cudnn"} | BFLOAT16
    sweep, dataset, plan = planned(home, overrides=named)

    assert asks_kernel(sweep)
    with pytest.raises(UsageError) as refused:
        require_ready(sweep, home, dataset, plan)

    (line,) = str(refused.value).splitlines()
    assert line.startswith("kernel: ")
    assert f"{stage}.attention.name=cudnn: it needs a CUDA device, this is a cpu" in line
    assert line.endswith(f"; or set {stage}.attention.substitute=torch")


def test_a_kernel_with_a_substitute_is_no_fault(home):
    named = {"train.attention": {"name": "flash_attn_4", "substitute": "torch"}} | BFLOAT16
    sweep, dataset, plan = planned(home, overrides=named)

    assert not [each for each in require_ready(sweep, home, dataset, plan) if each.name == "kernel"]


TPE = {"method": "tpe", "startup": 1}


@pytest.mark.parametrize("stage", ["train", "evaluate"])
@pytest.mark.parametrize(
    "search",
    [{}, {"train": {**TPE, "num": 2}}, {"final": {**TPE, "per_bank": 2}}],
    ids=["grid", "trainings made by a tpe", "finals made by a tpe"],
)
def test_every_attention_of_a_sweeps_points_is_asked_for(home, stage, search):
    space = {
        f"{stage}.attention.name": {"values": ["torch", "flash_attn_4", "cudnn"]},
        "train.optimizer.matrix.lr": {"values": [0.01, 0.02]},
        "final.prune.ratio": {"values": [0.0, 0.1]},
    }
    sweep, _, plan = planned(home, space=space, search=search, overrides=BFLOAT16)

    named = [(each.field, each.named.name) for each in question(sweep, plan).others]

    field = f"{stage}.attention"
    assert set(named) == {(field, name) for name in ("flash_attn_4", "cudnn", "torch")}


def test_nodes_whose_ranks_would_attend_by_different_kernels_fail(home):
    named = {"train.attention": {"name": "flash_attn_4", "substitute": "cudnn"}} | BFLOAT16
    sweep, dataset, plan = planned(home, overrides=named)
    here = look(home.store)

    def found(*backends):
        nodes = [replace(here, host=f"n{i}", attention=Attention(b, "")) for i, b in backends]
        return wrong(checks(sweep, home, dataset, plan, here, nodes))

    apart = found((1, "flash_attn_4"), (2, "cudnn"))

    assert "ranks would differ: n1 has flash_attn_4, n2 has cudnn" in apart["kernel"]
    assert "kernel" not in found((1, "cudnn"), (2, "cudnn"))


@pytest.mark.parametrize("field", ["train.fused", "evaluate.fused"])
def test_own_kernels_without_triton_are_refused_by_their_field(home, field):
    sweep, dataset, plan = planned(home, overrides={field: True}, resources={"gpus_per_worker": 1})
    why = f"{field}: triton is not installed; install it or set {field}=false"
    bare = replace(look(home.store), attention=Attention(None, why))

    told = wrong(checks(sweep, home, dataset, plan, bare, [bare]))

    assert asks_kernel(sweep, plan)
    assert told["kernel"].endswith(why)
    assert not asks_kernel(planned(home, overrides={field: True})[0])  # on a CPU


def test_a_node_that_does_not_see_the_store_fails(home):
    here = look(home.store)
    nodes = [replace(here, sees_mark=True), replace(here, host="far", sees_mark=False)]

    found = [c for c in checks(None, home, None, None, here, nodes) if c.name == "store"]

    assert [check.detail for check in found] == [f"far: does not see {home.store}"]


@pytest.mark.skipif(bool(look(Path()).gpus), reason="this machine has a GPU")
def test_a_gang_on_gpus_fails_where_there_is_none(home):
    sweep, dataset, plan = planned(
        home,
        resources={"gpus_per_worker": 1},
        require={"attention": "flash", "gpu": "H100"},
    )

    with pytest.raises(UsageError) as refused:
        require_ready(sweep, home, dataset, plan)

    lines = str(refused.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["kernel", "gpu", "gpu"]
    assert "none on cuda in float32: AssertionError: Torch not compiled with CUDA" in lines[0]
    assert "need 1 × 1 GPU on one node, have 0" in lines[1]
    assert "require.gpu is H100, here: none" in lines[2]


def test_what_runs_on_a_cluster_is_not_refused_for_this_machine(home):
    tokens = load_dataset(home.data("tiny")).num_tokens("train")
    sweep, dataset, plan = planned(
        home,
        resources={"gpus_per_worker": 1},
        require={"attention": "flash"},
        overrides={"train.iterations": tokens},
    )

    warned = require_ready(sweep, home, dataset, plan, is_local=False)

    assert [check.name for check in warned] == ["kernel", "splits"]
    assert "no machine was asked" in warned[0].detail


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver's tool that answers as on a machine with two H100, one of them taken."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{SMI}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


def test_gpus_are_named_and_memory_in_use_is_a_warning(home, two_gpus):
    here = look(home.store)
    resources = {"workers": 2, "gpus_per_worker": 1}

    fitting = examine(home, here, resources=resources, require={"gpu": "h100"})
    unfitting = examine(home, here, resources=resources, require={"gpu": "H200"})

    detail = next(check.detail for check in fitting if check.name == "gpu")
    assert "2 × NVIDIA H100 80GB HBM3 (81,559 MiB), driver 550.54.15" in detail
    assert "in use by others: 1: 40,312 MiB" in wrong(fitting)["gpu"]
    assert [c.name for c in unfitting if c.verdict == "fail"] == ["gpu"]
    assert "require.gpu is H200, here: NVIDIA H100 80GB HBM3" in wrong(unfitting)["gpu"]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("1", [1]), ("GPU-91d3,0", [1, 0]), ("0,7,1", [0]), ("", []), ("-1", [])],
)
def test_only_visible_gpus_count(home, two_gpus, monkeypatch, visible, indices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    seen, all_of_them = look(home.store), look(home.store, hidden_gpus=True)

    assert [gpu.index for gpu in seen.gpus] == indices
    assert len(all_of_them.gpus) == 2


@pytest.mark.parametrize(("gpus", "verdict"), [(0, "warn"), (1, "fail")])
def test_a_driver_that_does_not_answer_fails_what_asks_for_gpus(home, two_gpus, gpus, verdict):
    two_gpus.write_text("#!/bin/sh\necho Failed to initialize NVML: Driver mismatch\nexit 18\n")

    found = examine(home, resources={"gpus_per_worker": gpus})

    driver = next(check for check in found if check.name == "gpu")
    assert "nvidia-smi: Failed to initialize NVML: Driver mismatch" in driver.detail
    assert driver.verdict == verdict


def test_a_grid_of_which_where_leaves_one_point_is_checked_at_that_point(home):
    axis = {"min": 0.001, "max": 0.06, "num": 60}
    space = {"final.prune.ratio": axis, "train.optimizer.matrix.lr": dict(axis)}
    where = ["final.prune.ratio == 0.06", "train.optimizer.matrix.lr == 0.06"]

    sweep, _, plan = planned(home, space=space, where=where)

    assert example(sweep, plan).final.prune.ratio == 0.06
    assert example(sweep).train.optimizer.matrix.lr == 0.06
    assert not wrong(examine(home, space=space, where=where))


def install(folder: Path, name: str, version: str, *lines: str) -> None:
    """Leave what pip leaves of a distribution that brings a package of the same name."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *lines]
    (info / "METADATA").write_text("\n".join(text) + "\n")
    (info / "top_level.txt").write_text(f"{name}\n")


def test_versions_out_of_the_ranges_that_the_package_declares_fail(home, tmp_path, monkeypatch):
    needs = ("torch>=99 ; extra == 'train'", "numpy>=2", "absent>=1", "other>=1 ; extra == 'dev'")
    lines = [f"Requires-Dist: {each}" for each in needs]
    install(tmp_path / "site", "fairway", "9", "Requires-Python: >=4", *lines)
    monkeypatch.syspath_prepend(tmp_path / "site")

    found = wrong(examine(home))["versions"]

    assert "is not >=4" in found
    assert "is not >=99" in found
    assert "absent is missing" in found
    assert "numpy" not in found
    assert "other" not in found


def test_a_distribution_over_one_of_our_packages_fails(home, tmp_path, monkeypatch):
    install(tmp_path / "site", "trainer", "0.0.36")
    monkeypatch.syspath_prepend(tmp_path / "site")

    found = wrong(examine(home))["packages"]

    assert "package trainer: the distribution trainer installed its own over Fairway's" in found


def test_clocks_are_held_to_a_step_and_to_the_file_system(home):
    here = look(home.store)

    coarse = wrong(examine(home, replace(here, tick_s=0.016)))["clock"]
    skewed = wrong(examine(home, replace(here, skew_s=-90.0)))["clock"]

    assert coarse.startswith("fail monotonic to 0.016 s")
    assert skewed.startswith("warn")
    assert "within 90 s" in skewed


def test_small_shared_memory_and_few_files_are_warnings(home):
    small = replace(look(home.store), shared_memory_bytes=64_000_000, open_files=1024)

    found = wrong(examine(home, small))

    assert found["shared memory"].startswith("warn")
    assert "/dev/shm has 64.0 MB" in found["shared memory"]
    assert found["open files"].startswith("warn")


USELESS = "kernel not used because:"


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ((f"Flash attention {USELESS}", "Expected dtype half."), "Expected dtype half."),
        ((f"Memory efficient {USELESS}", "no", f"Flash {USELESS}", "so"), "so"),
        (("Torch was not compiled with flash.",), "Torch was not compiled with flash."),
        ((f"CuDNN {USELESS}", "no"), None),
    ],
)
def test_of_what_torch_warns_of_flashs_own_reason_is_told(told, reason):
    assert reason_of_flash(told) == reason

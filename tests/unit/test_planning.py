"""Submissions: what a stranger may send, what becomes of it, and what it may not reach."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.api.planner import Planner
from service.paths import Paths
from service.planning import Bundles, Submission
from tests import tiny
from tests.serving import SWEEP, home_with
from trainer.codec import to_yaml
from trainer.data.shards import Dataset
from trainer.errors import UsageError

PATIENCE_S = 240.0
RECIPE = to_yaml(tiny.recipe_data())


def sweep(*assignments: str, files: dict[str, str] | None = None, **changes: Any) -> Submission:
    """The micro sweep as it is sent, some of its fields changed."""
    sent = {"micro.yaml": RECIPE} if files is None else files
    return Submission(to_yaml({**SWEEP, **changes}), sent, assignments)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    return home_with(tmp_path_factory.mktemp("planning"), tiny_dataset)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the service was given, with a recipe, links, and a secret beside it."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "base.yaml").write_text(RECIPE)
    (folder / "top.yaml").write_text("extends: base\n")
    (folder / "leaves.yaml").write_text("extends: ../outside\n")
    outside = folder.parent / "outside.yaml"
    outside.write_text("secret: hunter2\n")
    (folder / "link.yaml").symlink_to(outside)
    (folder / "hall").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.yaml")
    return folder


@pytest.fixture(scope="module")
def planner(home: Path, root: Path) -> Iterator[Planner]:
    made = Planner(Paths(home), [root], timeout_s=PATIENCE_S, memory_bytes=1 << 30)
    yield made
    made.close()


def refusal(planner: Planner, submission: Submission) -> str:
    """The one line with which a submission is refused."""
    with pytest.raises(UsageError) as refused:
        planner.plan(submission)
    return str(refused.value)


def test_a_submission_gets_the_id_and_the_plan_that_it_has_in_its_folder(
    planner: Planner, home: Path
):
    new = planner.accept(sweep(limits={"max_concurrent": 3}), priority=2)

    bundle = home / "submissions" / new.bundle
    words = [sys.executable, "-m", "service", "validate", "sweep.yaml", "-o", "json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    local = subprocess.run(
        [*words, "--home", str(home)],
        cwd=bundle, capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert json.loads(local.stdout) == new.plan
    assert new.sweep_id == new.plan["sweep_id"]
    assert (new.name, new.recipe, new.gangs, new.priority) == ("micro", "micro.yaml", 3, 2)
    assert sorted(path.name for path in bundle.iterdir()) == [
        "micro.yaml",
        "submission.json",
        "sweep.yaml",
    ]


def test_assignments_are_laid_over_as_on_the_command_line(planner: Planner):
    plain, laid = planner.plan(sweep()), planner.plan(sweep("train.iterations=6", "name=other"))

    assert laid.name == "other"
    assert laid.plan["steps"] < plain.plan["steps"]


def test_the_same_submission_twice_has_one_bundle_and_a_look_leaves_none(
    planner: Planner, home: Path
):
    first = planner.accept(sweep(name="twice"))
    again = planner.accept(sweep(name="twice"))
    before = sorted(path.name for path in (home / "submissions").iterdir())
    planner.plan(sweep(name="looked-at"))

    assert again == first
    assert sorted(path.name for path in (home / "submissions").iterdir()) == before
    assert first.digest.startswith(first.bundle)


def test_a_digest_tells_requests_apart_byte_for_byte():
    submissions = [
        Submission("a: 1", {"x.yaml": "b"}, ("c=1",)),
        Submission("a: 1 ", {"x.yaml": "b"}, ("c=1",)),
        Submission("a: 1", {"y.yaml": "b"}, ("c=1",)),
        Submission("a: 1", {"x.yaml": "b"}, ("c=1", "d=2")),
        Submission("a: 1", {"x.yaml": "b"}, ("d=2", "c=1")),
    ]

    assert len({submission.digest for submission in submissions}) == len(submissions)


def test_what_a_killed_service_left_half_written_is_removed_by_the_next(home: Path):
    bundles = Bundles(Paths(home))
    left = bundles.lay_out(sweep(name="left"))
    kept = bundles.keep(bundles.lay_out(sweep(name="kept")), sweep(name="kept").digest)

    Bundles(Paths(home)).clear()

    assert not left.exists()
    assert (kept / "sweep.yaml").is_file()


def test_assignments_fit_on_a_command_line(planner: Planner):
    long = [f"name={'x' * 4_000}"] * 17

    assert "assignments: more than 65536 bytes" in refusal(planner, sweep(*long))


def test_a_price_is_told_where_it_is_known(planner: Planner):
    budget = {"gpu_hours": 1, "usd_per_gpu_hour": 2.5}

    assert planner.plan(sweep(budget=budget)).usd is None  # nobody knows yet how long a step takes


def test_files_under_a_root_may_be_named(planner: Planner, root: Path):
    planned = planner.plan(sweep(recipe=str(root / "top.yaml"), files={}))

    assert planned.recipe == str(root / "top.yaml")


CLOCKS = {"clocks": "/etc/hostname"}
GATE = {"gate": {"baseline": "/etc/hostname.yaml"}, "seeds": {"confirm": [1]}}
STOP = {"train": {"stop": {"kind": "reference", "training": "../../../../etc"}}}


@pytest.mark.parametrize(
    ("changes", "assignments", "where"),
    [
        ({"recipe": "/etc/hostname"}, (), "sweep.yaml: recipe: '/etc/hostname'"),
        ({"recipe": "../../service.db"}, (), "sweep.yaml: recipe: '../../service.db'"),
        ({"recipe": "sub/micro.yaml"}, (), "sweep.yaml: recipe: 'sub/micro.yaml'"),
        ({"recipe": "sweep.yaml"}, (), "sweep.yaml: recipe: 'sweep.yaml'"),
        ({"recipe": "submission.json"}, (), "sweep.yaml: recipe: 'submission.json'"),
        ({"recipe": "/proc/self/environ"}, (), "sweep.yaml: recipe: '/proc/self/environ'"),
        ({}, ("recipe=/etc/hostname",), "sweep.yaml: recipe: '/etc/hostname'"),
        (CLOCKS, (), "sweep.yaml: clocks: '/etc/hostname'"),
        ({}, ("clocks=/etc/hostname",), "sweep.yaml: clocks: '/etc/hostname'"),
        (GATE, (), "sweep.yaml: gate.baseline: '/etc/hostname.yaml'"),
        (
            {"gate": {"baseline": "pr374"}, "seeds": {"confirm": [1]}},
            ("gate.baseline=/etc/hostname",),
            "sweep.yaml: gate.baseline: '/etc/hostname'",
        ),
        ({"data": {"name": "../../etc"}}, (), "'../../etc': not a dataset name"),
        ({}, ("data.name=../../etc",), "'../../etc': not a dataset name"),
        ({"overrides": {"data.name": "/etc"}}, (), "'/etc': not a dataset name"),
        ({"search": STOP}, (), "sweep.yaml: search.train.stop.training: '../../../../etc'"),
        (
            {"space": {"data.name": {"phase": "train", "values": ["../x", "../y"]}}},
            (),
            "sweep.yaml: space",
        ),
    ],
)
def test_nothing_of_the_server_can_be_named(
    planner: Planner, changes: dict[str, Any], assignments: tuple[str, ...], where: str
):
    refused = refusal(planner, sweep(*assignments, **changes))

    assert refused.startswith(where)
    assert "\n" not in refused


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("link.yaml", "is a link"),
        ("hall/outside.yaml", "is a link"),
        ("hall/../base.yaml", "neither shipped nor part"),
        ("../outside.yaml", "neither shipped nor part"),
        ("leaves.yaml", "neither shipped nor part"),
        ("pipe.yaml", "no file"),
        ("none.yaml", "no file"),
        ("a" * 300 + ".yaml", "no file"),
    ],
)
def test_a_root_is_not_left(planner: Planner, root: Path, name: str, said: str):
    refused = refusal(planner, sweep(recipe=str(root / name), files={}))

    assert said in refused
    assert "hunter2" not in refused


@pytest.mark.parametrize("name", ["/etc/hostname", "../../../../etc/hostname", "../outside"])
def test_a_recipe_of_the_bundle_extends_nothing_outside(planner: Planner, name: str):
    files = {"micro.yaml": f"extends: [other, {name}]\n", "other.yaml": RECIPE}

    refused = refusal(planner, sweep(files=files))

    assert refused.startswith("micro.yaml: extends: ")
    assert "neither shipped nor part of the submission" in refused


@pytest.mark.parametrize(
    "name",
    ["../x.yaml", "a/b.yaml", ".x.yaml", "x.json", "sweep.yaml", "x\x00.yaml", "é.yaml", "",
     f"{'x' * 70}.yaml", "x.yaml\n"],
)  # fmt: skip
def test_a_file_has_a_plain_name(planner: Planner, name: str):
    assert refusal(planner, sweep(files={name: RECIPE})).startswith("files: ")


@pytest.mark.parametrize(
    ("submission", "said"),
    [
        (Submission("a: &x [1]\nb: *x\n"), "sweep.yaml: line 2: aliases are not accepted"),
        (Submission("[" * 20_000), "sweep.yaml: line 1: nested deeper"),
        (Submission("a: " + "9" * 5_000), "sweep.yaml: line 1: the number is too long"),
        (Submission("a: \x00"), "sweep.yaml: character 4"),
        (Submission("a: \ud800"), "sweep.yaml: character 4"),
        (Submission("- 1"), "sweep.yaml: expected `key: value` lines"),
        (Submission(""), "sweep.yaml: expected `key: value` lines"),
        (Submission("a: b: c"), "sweep.yaml: line 1"),
        (Submission("!!python/object/apply:os.system [id]"), "sweep.yaml: line 1: tags"),
        (Submission("x" * 300_000), "sweep.yaml: larger than 262144 bytes"),
        (sweep("a\x00=1"), "assignments[0]: character 2"),
        (sweep("nonsense"), "-S 'nonsense'"),
        (sweep("a=" + "[" * 4_000), "-S a: line 1: nested deeper"),
        (sweep("x" * 5_000), "assignments[0]: longer"),
        (sweep(*["a=1"] * 300), "assignments: more than"),
        (sweep(files={f"f{i}.yaml": "" for i in range(17)}), "files: 17 files"),
        (sweep(files={"micro.yaml": "x" * 300_000}), "micro.yaml: larger than"),
        (sweep(files={"micro.yaml": "extends: micro\n"}), "micro.yaml: extends itself"),
        (sweep(nonsense=1), "sweep.yaml: nonsense: unknown key"),
        (sweep(data={"name": "absent"}), "HOME/data/absent: no dataset"),
        (sweep("train.iterations=" + "9" * 400), "sweep.yaml"),
        (sweep(derived={"train.iterations": "9**9**9**9"}), "sweep.yaml"),
        (sweep(where=["(" * 3_000]), "sweep.yaml"),
    ],
)
def test_hostile_text_is_refused_in_a_line(planner: Planner, submission: Submission, said: str):
    refused = refusal(planner, submission)

    assert refused.startswith(said)
    assert "/tmp" not in refused


def test_what_is_too_large_to_plan_is_refused_in_time_and_the_next_is_planned(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
):
    space = {
        f"train.optimizer.{group}.lr": {
            "phase": "train",
            "values": [0.001 + i / 10**6 for i in range(900)],
        }
        for group in ("matrix", "embed", "scalar")
    }
    began = time.monotonic()

    with monkeypatch.context() as impatient:
        impatient.setattr(planner, "_timeout_s", 5.0)
        refused = refusal(planner, sweep(space=space))

    assert refused.startswith("sweep.yaml: too large to plan")
    assert time.monotonic() - began < PATIENCE_S
    assert planner.plan(sweep()).name == "micro"


def children() -> list[Path]:
    """The planning processes of this one, as /proc has them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            words = process.joinpath("cmdline").read_bytes()
            if int(parent) == os.getpid() and b"service.api.planner" in words:
                found.append(process)
    return found


def is_over(process: Path) -> bool:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_child_that_is_killed_while_it_waits_costs_nothing(planner: Planner):
    killed = children()
    for process in killed:
        os.kill(int(process.name), signal.SIGKILL)
    while not all(map(is_over, killed)):
        time.sleep(0.02)

    for _ in killed:
        assert planner.plan(sweep()).name == "micro"


def test_a_child_sees_none_of_the_services_secrets(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAIRWAY_DATABASE_URL", "postgresql://u:canary@h/n")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary")
    others = children()
    planner = Planner(Paths(home), timeout_s=PATIENCE_S)
    planner.plan(sweep())
    seen = [(p / "environ").read_bytes() for p in children() if p not in others]
    planner.close()

    assert seen
    assert all(b"PATH=" in each and b"canary" not in each for each in seen)


def test_no_child_is_left_when_the_planner_is_closed(home: Path):
    others = children()

    Planner(Paths(home)).close()

    assert children() == others

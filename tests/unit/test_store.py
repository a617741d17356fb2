"""The stage store: computed once, found afterwards, never half."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from service.store import Store
from trainer.runtime.files import locked, write_json

PATIENCE_S = 240.0


def build(folder: Path) -> None:
    with (folder / "built.log").open("a") as log:
        log.write("once\n")
    time.sleep(0.2)
    write_json(folder / "result.json", {"value": 7})


def compute(root: Path) -> None:
    Store(root).compute("finals", "f", build)


def hold_forever(root: Path) -> None:
    def build_forever(folder: Path) -> None:
        (folder / "left.txt").write_text("half done")
        (folder / "holding").touch()
        time.sleep(600)

    Store(root).compute("finals", "f", build_forever)


@pytest.fixture
def processes():
    context = multiprocessing.get_context("spawn")
    started = []

    def start(target, *arguments):
        process = context.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_second_request_is_a_hit(tmp_path: Path):
    store = Store(tmp_path)

    first, was_cached = store.compute("finals", "f", build)
    second, is_cached = store.compute("finals", "f", build)

    assert (was_cached, is_cached) == (False, True)
    assert first == second == {"value": 7}


def test_processes_that_need_one_stage_compute_it_once(tmp_path: Path, processes):
    for process in [processes(compute, tmp_path) for _ in range(3)]:
        process.join(PATIENCE_S)

    log = Store(tmp_path).folder("finals", "f") / "built.log"
    assert log.read_text() == "once\n"


def test_a_killed_builder_frees_its_stage_and_leaves_nothing_in_it(tmp_path: Path, processes):
    folder = Store(tmp_path).folder("finals", "f")
    holder = processes(hold_forever, tmp_path)
    while not (folder / "holding").exists():
        time.sleep(0.05)

    os.kill(holder.pid, signal.SIGKILL)
    Store(tmp_path).compute("finals", "f", build)

    assert not (folder / "left.txt").exists()


def test_a_stage_that_resumes_keeps_what_an_earlier_attempt_left(tmp_path: Path):
    store = Store(tmp_path)
    folder = store.folder("trainings", "t")
    folder.mkdir(parents=True)
    (folder / "checkpoint").touch()

    store.compute("trainings", "t", build, resumes=True)

    assert (folder / "checkpoint").exists()


def test_a_failed_build_leaves_no_result(tmp_path: Path):
    store = Store(tmp_path)

    with pytest.raises(ZeroDivisionError):
        store.compute("finals", "f", lambda folder: 1 / 0)

    assert store.find("finals", "f") is None


def test_who_waits_for_a_stage_makes_nothing_in_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.folder("finals", "abc")
    waiting = threading.Thread(target=lambda: store.claim("finals", "abc").__enter__())

    with locked(folder.with_name("abc.lock")):
        waiting.start()
        waiting.join(timeout=0.3)
        assert waiting.is_alive()
        assert not folder.exists()
    waiting.join(PATIENCE_S)

    assert folder.is_dir()

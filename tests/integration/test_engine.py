"""The engine of a sweep, looked at from outside: what is searched, stopped, ranked, confirmed,
judged and paid for, in real sweeps of a micro model."""

import json
from collections import Counter

import pytest

from service.catalogue_view import data_of
from service.paths import Paths
from tests.integration.conftest import SWEEP, Cli, Finished, events, make_cli
from trainer.specs.recipe import DataSpec

SEARCHED = """\
version: 1
name: searched
recipe: tiny
overrides:
  model: {num_layers: 2, dim: 32, attention: {num_heads: 2, num_kv_heads: 1, rope: {dims: 8}}}
  train: {iterations: 40, batch_tokens: 1024, seq_len: 128}
  train.schedule.warmdown_iters: 10
  final.quantize.float_numel: 256
  final.prune.larger_than: 256
  evaluate: {window: 128, stride: 128, batch_windows: 64}
  observe: {log_every: 5, validate_every: 10, checkpoint_every: 20}
space:
  train.optimizer.matrix.lr:  {min: 0.0005, max: 0.05, scale: log}
  train.averages.ema_decay:   {values: [0.8, 0.9]}
  final.prune.ratio:          {min: 0.0, max: 0.3}
search:
  train: {method: tpe, num: 4, startup: 2, stop: {kind: asha, first_step: 10, reduction: 2}}
  final: {method: tpe, per_bank: 3, startup: 2, rank_on: holdout, top: 2}
  confirm: {top: 1}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
seeds: {search: [7], confirm: [7, 11, 13]}
gate: {baseline: BASELINE, mode: frontier}
budget: {gpu_hours: 5, usd: 10, usd_per_gpu_hour: 2, deadline_hours: 2}
resources: {workers: 1, start_timeout_s: 300}
"""


BASELINE = """\
name: untrained
source: the score of the model before its first step, with made-up noise
tokens: {tokens}
bytes: {bytes}
results: [{{seed: 7, value: 3.83}}, {{seed: 11, value: 3.84}}, {{seed: 13, value: 3.82}}]
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A sweep that uses all of the engine, run once."""
    root = tmp_path_factory.mktemp("searched")
    text = data_of(Paths(root / "home"), DataSpec(name="embedded"))
    totals = {"tokens": text.num_tokens("val") - 1, "bytes": text.num_bytes("val")}
    baseline = root / "untrained.yaml"
    baseline.write_text(BASELINE.format(**totals))
    cli = make_cli(root, SEARCHED.replace("BASELINE", str(baseline)))
    done = cli.run("--num-cpus", "2")
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return Finished(cli, done)


def of(finished: Finished, kind: str) -> list[dict]:
    return [e for e in events(finished.cli.home, "searched") if e["event"] == kind]


def test_a_tpe_tries_as_many_points_as_it_was_asked_for_each_once(searched: Finished):
    points = [
        json.dumps(e["point"]) for e in of(searched, "training_finished") if e["phase"] == "search"
    ]
    assert len(points) == len(set(points)) == 4


def test_a_rung_stops_a_training_by_agreement_and_says_why(searched: Finished):
    rungs = [e for e in of(searched, "rung") if e["verdict"] == "stop"]
    stopped = [e for e in of(searched, "training_finished") if e["state"] == "stopped"]

    assert {e["training"] for e in rungs} == {e["training"] for e in stopped}
    assert stopped
    for event in stopped:
        assert event["reason"].startswith("asha: val bpb")
        folder = searched.cli.home / "store/trainings" / event["training"]
        assert (folder / "checkpoint").is_dir()  # another sweep may go on from there
        assert not (folder / "result.json").exists()


def test_finals_are_ranked_on_held_out_shards_and_only_the_top_see_validation(searched: Finished):
    ranked = {e["final"]: e["result"]["holdout_bpb"] for e in of(searched, "final_ranked")}
    banks = [e for e in of(searched, "training_finished") if e["state"] == "succeeded"]
    searched_banks = [e["training"] for e in banks if e["phase"] == "search"]
    scored = [e for e in of(searched, "final_scored") if e["phase"] == "search"]

    assert len(ranked) == 3 * len(searched_banks)
    on_validation = {e["final"] for e in scored if e["result"] is not None}
    # Points that round to the same weights tie: then the smaller id goes first.
    assert on_validation == set(sorted(ranked, key=lambda final: (ranked[final], final))[:2])
    passed = [e for e in scored if e["state"] == "stopped" and "place" in e["reason"]]
    assert len(passed) == len(ranked) - 2


def test_the_best_point_is_confirmed_with_its_registered_seeds_from_step_0(searched: Finished):
    confirmed = [e for e in of(searched, "final_scored") if e["phase"] == "confirm"]
    trainings = [e for e in of(searched, "training_finished") if e["phase"] == "confirm"]

    assert sorted(e["seed"] for e in confirmed) == [7, 11, 13]
    assert len({json.dumps(e["point"]) for e in confirmed}) == 1
    for event in trainings:
        assert event["result"]["steps_computed"] == 40

    best = searched.cli.json("best", "searched")
    scores = [e["result"]["score"]["val_bpb"] for e in confirmed]
    assert best["confirmed"]["mean_bpb"] == pytest.approx(sum(scores) / 3)


def test_the_sweep_ends_in_a_verdict_against_its_baseline(searched: Finished):
    (verdict,) = of(searched, "verdict")
    assert verdict["gate"]["verdict"] == "passed"  # any training beats an untrained model
    assert searched.done.returncode == 0


def test_what_was_spent_is_counted_by_phase(searched: Finished):
    status = searched.cli.json("status", "searched")
    by_phase = status["worker_seconds_by_phase"]
    assert all(by_phase[phase] > 0 for phase in ("search", "final", "confirm"))
    assert status["worker_seconds"] == pytest.approx(sum(by_phase.values()), abs=0.01)
    assert status["usd"] == pytest.approx(status["worker_seconds"] / 3600 * 2, abs=0.01)


def test_running_again_proposes_nothing_new(searched: Finished):
    before = len(of(searched, "training_finished"))
    done = searched.cli.run("--num-cpus", "2")

    assert done.returncode == 0, done.stderr
    assert len(of(searched, "training_finished")) == before
    assert "training_started" not in done.stderr


@pytest.fixture(scope="module")
def thrifty(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A sweep of four trainings whose budget lets the first one start and little more."""
    text = SWEEP.replace("name: micro", "name: thrifty").replace("[10, 20]", "[10, 20, 30, 40]")
    text = text.replace("workers: 2", "workers: 1, gang: warm")
    return make_cli(tmp_path_factory.mktemp("thrifty"), text)


def test_a_budget_ends_a_sweep_with_exit_4_and_a_larger_one_goes_on(thrifty: Cli):
    poor = thrifty.run("-S", "budget={gpu_hours: 0.001}")

    assert poor.returncode == 4, poor.stderr
    assert "budget: spent" in poor.stderr
    status = thrifty.json("status", "thrifty")
    assert status["state"] == "stopped"
    assert status["trainings"]["done"] < 4

    rich = thrifty.run("-S", "budget={gpu_hours: 5}")
    assert rich.returncode == 0, rich.stderr
    assert thrifty.json("status", "thrifty")["trainings"]["done"] == 4
    done = Counter(
        e["training"]
        for e in events(thrifty.home, "thrifty")
        if e["event"] == "training_finished" and e["state"] == "succeeded"
    )
    assert set(done.values()) == {1}


def test_a_trunk_that_the_budget_stopped_goes_on_from_where_it_was(thrifty: Cli):
    told = events(thrifty.home, "thrifty")
    (trunk,) = [e for e in told if e["event"] == "trunk_finished"]
    ended = [e for e in told if e["event"] == "training_finished" and e["result"]]

    assert 0 < trunk["steps_computed"] < 150  # the rest was paid for by the first run
    assert sorted(e["result"]["steps_computed"] for e in ended) == [10, 20, 30, 40]

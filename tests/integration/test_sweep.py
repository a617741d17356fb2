"""One YAML file to compared runs: a real sweep with real gangs, looked at from outside."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.paths import Paths
from service.tracking import default_uri
from tests.integration.conftest import (
    NUM_FINALS,
    NUM_TRAININGS,
    TAIL_STEPS,
    TRUNK_STEPS,
    Cli,
    Finished,
    by_point,
    events,
)
from trainer.runtime.files import sha256_file


def test_four_finals_come_from_each_training_and_none_trains_again(finished: Finished):
    status = finished.cli.json("status", "micro")

    assert status["state"] == "succeeded"
    assert status["trunks"] == {"total": 1, "done": 1}
    assert (status["trainings"]["total"], status["trainings"]["done"]) == (2, 2)
    assert status["finals"]["done"] == NUM_FINALS
    assert status["trained_steps"] == TRUNK_STEPS + sum(TAIL_STEPS)
    assert status["gpu_seconds"] == 0  # gangs of CPUs


def test_training_teaches_the_model_something(finished: Finished):
    for event in events(finished.cli.home):
        if event["event"] == "training_finished":
            result = event["result"]
            assert result["parity_bpb"] < result["untrained_val_bpb"] - 0.5
            assert result["world_size"] == 2


def test_the_best_final_is_the_lowest_bpb_of_all(finished: Finished):
    best = finished.cli.json("best", "micro")

    finals = by_point(finished.cli.home, ["artifact_bytes"])
    assert best["val_bpb"] == min(final["bpb"] for final in finals.values())
    assert (
        finals[json.dumps(best["params"], sort_keys=True)]["artifact_bytes"]
        == (best["artifact_bytes"])
    )


def test_artifact_bytes_are_the_files_on_disk(finished: Finished):
    for event in events(finished.cli.home):
        if event["event"] == "final_scored":
            folder = finished.cli.home / "store/finals" / event["final"] / "artifact"
            on_disk = sum(file.stat().st_size for file in folder.iterdir())
            assert event["result"]["artifact_bytes"] == on_disk


def test_every_final_is_audited_with_parity_coverage_and_bytes(finished: Finished):
    finals = [e for e in events(finished.cli.home) if e["event"] == "final_scored"]

    for final in finals:
        verdicts = {rule["id"]: rule["verdict"] for rule in final["result"]["audit"]}
        assert {"coverage", "byte-accounting", "parity", "score-before-update"} <= set(verdicts)
        assert verdicts.pop("clocks") == "not checked"  # no H100s here
        assert set(verdicts.values()) == {"pass"}


def test_the_first_run_found_nothing_to_reuse(finished: Finished):
    first_end = next(e for e in events(finished.cli.home) if e["event"] == "sweep_finished")

    assert first_end["cache_hits"] == 0


def test_every_stage_of_the_sweep_tells_what_it_was_computed_with(finished: Finished):
    folders = [path.parent for path in finished.cli.home.glob("store/*/*/result.json")]
    kinds = {folder.parent.name for folder in folders}

    facts = [json.loads((folder / "facts.json").read_text()) for folder in folders]

    assert {"states", "trainings", "parities", "artifacts", "finals"} <= kinds
    assert {each["threads"] for each in facts} == {1}
    assert {each["ray"] for each in facts} != {None}
    assert {each["attention"] for each in facts} <= {"flash", "math"}


def test_a_replay_of_the_best_on_a_clean_home_gives_the_same_artifact(
    finished: Finished, tmp_path: Path
):
    best = finished.cli.json("best", "micro")
    folder = finished.cli.home / "store/finals" / best["final"]
    clean = Cli(tmp_path / "home", finished.cli.sweep)

    done = clean("replay", str(folder / "sheet.json"), "-o", "json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    weights = folder / "artifact" / "weights.fw"
    assert document["criterion"] == "the same bytes"
    assert document["replayed"] == document["recorded"]
    assert document["replayed"]["weights_sha256"] == sha256_file(weights)


def test_running_again_computes_nothing(finished: Finished):
    before = by_point(finished.cli.home, ["weights_sha256"])
    lost = next(finished.cli.home.glob("store/finals/*/sheet.json"))
    sheet = lost.read_text()
    lost.unlink()

    done = finished.cli.run()

    status = finished.cli.json("status", "micro")
    assert done.returncode == 0, done.stderr
    assert lost.read_text() == sheet
    assert status["cache_hits"] == NUM_TRAININGS + NUM_FINALS
    assert status["trained_steps"] == TRUNK_STEPS + sum(TAIL_STEPS)
    assert by_point(finished.cli.home, ["weights_sha256"]) == before


def test_over_a_tiny_cap_run_and_best_exit_3_and_name_the_smallest_overshoot(finished: Finished):
    options = ("-S", "name=capped", "-S", "constraints=[artifact_bytes <= 20_000]")

    done = finished.cli.run(*options)
    best = finished.cli("best", "capped")

    status = finished.cli.json("status", "capped")
    smallest = min(
        final["artifact_bytes"]
        for final in by_point(finished.cli.home, ["artifact_bytes"], "capped").values()
    )
    assert status["trained_steps"] == 0  # another sweep, the same stages
    assert status["cache_hits"] == NUM_TRAININGS + NUM_FINALS
    assert (done.returncode, best.returncode) == (3, 3)
    assert status["finals"]["infeasible"] == NUM_FINALS
    assert f"{smallest - 20_000:,} bytes over the cap" in best.stderr
    assert len(best.stderr.strip().splitlines()) == 1


def test_the_report_has_table_plot_and_page(finished: Finished):
    (folder,) = finished.cli.home.glob("sweeps/micro-*/report")

    assert (folder / "bpb_by_bytes.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (folder / "report.html").read_text()[:500]
    assert len((folder / "finals.csv").read_text().splitlines()) == NUM_FINALS + 1


def test_the_run_ends_by_saying_how_to_open_the_page(finished: Finished):
    assert "mlflow server" in finished.done.stderr
    assert re.search(r"http://\S+#/experiments/\d+", finished.done.stderr)


def test_mlflow_has_every_run_once_with_the_ledgers_numbers(finished: Finished):
    from mlflow import MlflowClient

    client = MlflowClient(default_uri(Paths(finished.cli.home)))
    experiment = client.get_experiment_by_name("micro")
    runs = client.search_runs([experiment.experiment_id], "tags.`fairway.kind` = 'final'")

    finals = by_point(finished.cli.home, ["artifact_bytes"])
    logged = sorted(run.data.metrics["final/val_bpb"] for run in runs)
    assert logged == sorted(final["bpb"] for final in finals.values())
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_an_artifact_can_be_scored_again_by_its_finals_id(finished: Finished):
    best = finished.cli.json("best", "micro")

    again = finished.cli.json("score", best["final"])

    assert again["val_bpb"] == pytest.approx(best["val_bpb"], abs=1e-6)


def test_the_counted_code_scores_the_counted_weights_by_itself(finished: Finished):
    best = finished.cli.json("best", "micro")
    artifact = Path(best["artifact"])
    words = [sys.executable, "-I", str(artifact / "code.pyz"), str(artifact)]
    words += ["--data", str(finished.cli.home / "data/embedded"), "-S", "window=128"]

    done = subprocess.run([*words, "-S", "stride=64"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val_bpb"] == pytest.approx(best["val_bpb"], abs=1e-6)


def test_best_names_its_mlflow_run(finished: Finished):
    from mlflow import MlflowClient

    best = finished.cli.json("best", "micro")

    run = MlflowClient(default_uri(Paths(finished.cli.home))).get_run(best["mlflow_run_id"])
    assert run.data.metrics["final/val_bpb"] == pytest.approx(best["val_bpb"])


def test_a_gang_that_cannot_fit_is_refused_with_the_reason(finished: Finished, tmp_path: Path):
    done = finished.cli.run("--num-cpus", "1", "-S", "train.iterations=161")

    assert done.returncode == 2
    assert "need 2 × 1 CPU on one node, have 1" in done.stderr
    assert "Traceback" not in done.stderr

"""What each MLflow run of a sweep carries: name, tags, params, metrics, times.

An event of the ledger goes in, and what its stage was computed with; plain data comes out, which
`tracking` writes. Params hold only
what varies, the recipe and the seed, because that is what the comparison pages line up. Whatever
must be filtered by number is a metric, since MLflow compares params as text only.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.confirmed import is_legal, is_within_cap
from service.facts import FACTS_FILE
from service.labels import knob_names, run_name
from service.ledger import SweepView
from service.paths import Paths
from service.report import best, has_several_seeds, status_document
from service.sheet import SHEET_FILE
from service.states import State
from trainer.runtime.files import read_json

ID_TAG, SWEEP_TAG, KIND_TAG = "fairway.id", "fairway.sweep", "fairway.kind"
PARENT_TAG, STATE_TAG = "mlflow.parentRunId", "fairway.state"
MAX_TAG_CHARS = 7_900  # MLflow takes 8,000
_DIGEST_CHARS = 12  # the run page cuts a tag at about 25 characters
# Facts that identify the sweep itself are told by other tags.
_VERSION_FACTS = ("image_digest", "python", "torch", "ray", "mlflow", "zstandard")
_WORKER_FACTS = (
    *("image_digest", "driver", "cuda", "nccl", "attention", "fused", "triton", "flash_attn"),
    *("python", "torch", "ray", "zstandard", "brotli"),
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run as it should stand in MLflow. Every metric is logged at step 0."""

    id: str
    name: str
    tags: dict[str, str]
    started_at_s: float
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    ended_at_s: float | None = None
    status: str = "RUNNING"
    files: tuple[Path, ...] = ()
    worker: dict[str, Any] = field(default_factory=dict)
    """What the stage was computed with."""


def sweep_run(view: SweepView, files: tuple[Path, ...] = ()) -> RunFacts:
    """Describe the parent run while its sweep is running."""
    started = view.started
    return RunFacts(
        id=started["sweep_id"],
        name=started["sweep_id"],
        tags=_tags(view, "sweep", started["sweep_id"], State.RUNNING)
        | {"mlflow.note.content": _note(view)},
        params={"recipe": str(started["recipe"])},
        started_at_s=started["at"],
        files=files,
    )


def finished_sweep_run(
    view: SweepView, event: dict[str, Any], files: tuple[Path, ...] = ()
) -> RunFacts:
    """Describe the parent run once `sweep_finished` is in the ledger."""
    status, top = status_document(view), best(view)
    metrics = {
        "clock/worker_s": status["worker_seconds"],
        "clock/gpu_s": status["gpu_seconds"],
        "train/steps_computed": status["trained_steps"],
    }
    tags = _tags(view, "sweep", view.started["sweep_id"], view.state)
    if top is not None:
        result = top["result"]
        metrics |= {
            "best/val_bpb": result["score"]["val_bpb"],
            "best/val_mbpb": result["score"]["val_bpb"] * 1_000,
            "best/artifact_bytes": result["artifact_bytes"],
        }
        tags["fairway.best"] = top["final"]
    return RunFacts(
        id=view.started["sweep_id"],
        name=view.started["sweep_id"],
        tags=tags | {"mlflow.note.content": _note(view)},
        metrics=_numbers(metrics),
        started_at_s=view.started["at"],
        ended_at_s=event["at"],
        status=run_status(view.state),
        files=files,
    )


def training_run(view: SweepView, event: dict[str, Any], paths: Paths) -> RunFacts:
    """Describe a training from its `training_started` or `training_finished` event."""
    key, is_finished = event["training"], event["event"] == "training_finished"
    state = State(event["state"]) if is_finished else State.RUNNING
    result = event.get("result") or {}
    spent_s = result.get("train_clock_s", 0.0) if not event.get("cached") else 0.0
    folder = paths.store / "trainings" / key
    worker = _worker(folder)
    return RunFacts(
        id=key,
        name=_name(view, event, key),
        tags=_tags(view, "training", key, state) | _outcome(event) | _worker_tags(worker),
        params=_params(view, event),
        metrics=_training_metrics(result),
        started_at_s=event["at"] - spent_s,
        ended_at_s=event["at"] if is_finished else None,
        status=run_status(state),
        files=(folder / "task.json", folder / "result.json") if is_finished else (),
        worker=worker,
    )


def final_run(view: SweepView, event: dict[str, Any], paths: Paths) -> RunFacts:
    """Describe a final from its `final_scored` event."""
    key, state, result = event["final"], State(event["state"]), event["result"]
    folder = paths.store / "finals" / key
    worker = _worker(folder)
    tags = _tags(view, "final", key, state) | _outcome(event) | _worker_tags(worker)
    tags["fairway.training"] = event["training"]
    if event.get("fitted"):
        tags["fairway.fitted"] = _flag(True)
    if result:
        tags["fairway.feasible"] = _flag(state != State.INFEASIBLE and is_within_cap(view, result))
        tags["fairway.legal"] = _flag(state != State.ILLEGAL and is_legal(result))
    spent_s = 0.0 if event["cached"] or not result else _final_clock_s(result)
    return RunFacts(
        id=key,
        name=_name(view, event, key),
        tags=tags,
        params=_params(view, event),
        metrics=(_final_metrics(view, event) if result else {}) | _ranked_metrics(view, key),
        started_at_s=event["at"] - spent_s,
        ended_at_s=event["at"],
        status=run_status(state),
        files=tuple(
            folder / name
            for name in ("task.json", "score.json", "audit.json", "result.json", SHEET_FILE)
        ),
        worker=worker,
    )


def _worker(folder: Path) -> dict[str, Any]:
    """The facts in a stage's folder, whichever version of Fairway wrote them."""
    path = folder / FACTS_FILE
    facts = read_json(path) if path.is_file() else {}
    return facts if isinstance(facts, dict) else {}


def _worker_tags(worker: dict[str, Any]) -> dict[str, str]:
    tags = {f"fairway.{n}": str(worker[n]) for n in _WORKER_FACTS if worker.get(n)}
    gpus = [gpu["name"] for gpu in worker.get("gpus") or ()]
    counts = (f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    return tags | ({"fairway.gpu": ", ".join(counts)} if gpus else {})


def _name(view: SweepView, event: dict[str, Any], key: str) -> str:
    varying = [path for path in view.started["varying"] if path in event["point"]]
    point = {path: event["point"][path] for path in varying}
    return run_name(point, key, seed=event["seed"] if has_several_seeds(view) else None)


def _params(view: SweepView, event: dict[str, Any]) -> dict[str, str]:
    names = param_names(view)
    point = {names[path]: str(value) for path, value in event["point"].items() if path in names}
    return {**point, "recipe": str(view.started["recipe"]), "seed": str(event["seed"])}


def param_names(view: SweepView) -> dict[str, str]:
    """Name the param of every varying knob, by the knob's dotted path."""
    return knob_names(view.started["varying"])


def _tags(view: SweepView, kind: str, key: str, state: State) -> dict[str, str]:
    started = view.started
    facts = started.get("facts") or {}
    tags = {
        KIND_TAG: kind,
        ID_TAG: key,
        SWEEP_TAG: started["sweep_id"],
        STATE_TAG: str(state),
        "mlflow.source.name": "fairway",
    }
    for tag, fact in (
        ("fairway.spec_digest", "spec_digest"),
        ("fairway.data_digest", "data_digest"),
    ):
        if facts.get(fact):
            tags[tag] = short_digest(facts[fact])
    if facts.get("git_commit"):
        tags["mlflow.source.git.commit"] = str(facts["git_commit"])
        tags["fairway.git_dirty"] = _flag(bool(facts.get("git_dirty")))
    return tags | {f"fairway.{n}": str(facts[n]) for n in _VERSION_FACTS if facts.get(n)}


def short_digest(digest: str) -> str:
    """Cut `sha256:<64 digits>` to its first 12 digits; the full one is in environment.json."""
    return digest.rpartition(":")[2][:_DIGEST_CHARS]


def _outcome(event: dict[str, Any]) -> dict[str, str]:
    tags = {"fairway.cached": _flag(event["cached"])} if "cached" in event else {}
    tags |= {f"fairway.{name}": event[name] for name in ("phase", "branch") if event.get(name)}
    reason = event.get("reason")
    return tags | ({"fairway.reason": reason[:MAX_TAG_CHARS]} if reason else {})


def _flag(holds: bool) -> str:
    return "true" if holds else "false"


def run_status(state: State) -> str:
    """MLflow's word for a state of ours."""
    # Infeasible and illegal finals did finish: their tags say why they cannot be best.
    if state == State.RUNNING:
        return "RUNNING"
    if state in (State.STOPPED, State.CANCELLED, State.LOST):
        return "KILLED"
    return "FAILED" if state == State.FAILED else "FINISHED"


def _training_metrics(result: dict[str, Any]) -> dict[str, float]:
    if not result:
        return {}
    metrics = {
        "train/final_loss": result["final_train_loss"],
        "train/steps": result["steps"],
        "train/steps_computed": result["steps_computed"],
        "train/tokens": result["tokens"],
        "val/untrained_bpb": result["untrained_val_bpb"],
        "val/parity_bpb": result["parity_bpb"],
        "size/num_params": result["num_params"],
        "clock/train_s": result["train_clock_s"],
    }
    phases = {f"clock/{phase}_s": seconds for phase, seconds in result["clock_s"].items()}
    return _numbers(phases | metrics)


def _final_metrics(view: SweepView, event: dict[str, Any]) -> dict[str, float]:
    result, cap = event["result"], view.started.get("cap_bytes")
    score, num_bytes = result["score"], result["artifact_bytes"]
    metrics = {
        "final/val_bpb": score["val_bpb"],
        "final/val_mbpb": score["val_bpb"] * 1_000,
        "final/val_loss": score["val_loss"],
        "final/artifact_bytes": num_bytes,
        "final/artifact_mb": num_bytes / 1e6,
        "size/weights_bytes": result["weights_bytes"],
        "size/code_bytes": result["code_bytes"],
        "size/forecast_bytes": result["forecast_bytes"],
        "size/num_params": result["num_params"],
        "clock/eval_s": score["eval_clock_s"],
        "clock/finalize_s": result["finalize_clock_s"],
    }
    if cap is not None:
        metrics["final/bytes_headroom"] = cap - num_bytes
    training = view.trainings.get(event["training"], {}).get("result")
    if training:
        metrics["clock/train_s"] = training["train_clock_s"]
    return _numbers(metrics)


def _ranked_metrics(view: SweepView, final: str) -> dict[str, float]:
    """What a final reached on held-out training shards, if it was ranked there."""
    result = view.ranked.get(final, {}).get("result")
    return {"final/holdout_bpb": float(result["holdout_bpb"])} if result else {}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _final_clock_s(result: dict[str, Any]) -> float:
    return result["finalize_clock_s"] + result["score"]["eval_clock_s"]


def _note(view: SweepView) -> str:
    """The description on the parent's page: the knobs by their paths, and the outcome."""
    cap, status = view.started.get("cap_bytes"), status_document(view)
    names, axes = param_names(view), view.started.get("axes") or {}
    lines = [f"Sweep `{view.started['sweep_id']}` of recipe `{view.started['recipe']}`."]
    if cap is not None:
        lines.append(f"Byte cap: {cap:,}.")
    if status["best"] is not None:
        top = status["best"]
        lines.append(f"Best: {top['val_bpb']:.4f} bpb in {top['artifact_bytes']:,} bytes.")
    phases = {path: f" ({axes[path]})" for path in names if path in axes}
    knobs = [f"- `{names[path]}`: `{path}`{phases.get(path, '')}" for path in names]
    return ("\n\n".join(lines) + "\n\nKnobs:\n" + "\n".join(knobs))[:MAX_TAG_CHARS]

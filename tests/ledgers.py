"""Builds realistic ledgers and stage folders through the real Ledger, for tests of what reads them.

The numbers follow the shape of real sweeps: a longer warmdown and a slower EMA help a little,
pruning costs bpb and saves bytes, a tighter clip does both. No maths of the trainer is used.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.ledger import Ledger
from service.paths import Paths
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.runtime.files import write_json, write_text

START = 1_790_000_000.0
WARMDOWN, EMA = "train.schedule.warmdown_iters", "train.averages.ema_decay"
CLIP, PRUNE = "final.quantize.clip", "final.prune.ratio"
NTK, WINDOW = "model.attention.rope.ntk_reference", "evaluate.window"
PHASES = {WARMDOWN: "train", EMA: "bank", CLIP: "final", PRUNE: "final"}
PHASES |= {NTK: "train", WINDOW: "eval"}


@dataclass
class Sweep:
    """A sweep to be written: 2 warmdowns x 2 decays x 2 clips x 2 prunings unless told else."""

    home: Path
    sweep_id: str = "warmdown-ema-clip-prune-3f9a2c"
    cap_bytes: int | None = ARTIFACT_BYTES_CAP
    mean_bytes: int = 15_850_000
    seed: int = 1337
    dead: tuple[str, ...] = ()
    """Knobs that change no byte and no score."""
    space: dict[str, list[Any]] = field(
        default_factory=lambda: {
            WARMDOWN: [2500, 3500],
            EMA: [0.995, 0.997],
            CLIP: ["none", "p5"],
            PRUNE: [0.0, 0.05],
        }
    )

    def __post_init__(self) -> None:
        self.paths = Paths(self.home)
        self._at = START

    def train_points(self) -> list[dict[str, Any]]:
        return list(self._points("train"))

    def _points(self, *phases: str) -> Iterator[dict[str, Any]]:
        axes = {path: values for path, values in self.space.items() if PHASES[path] in phases}
        for combination in itertools.product(*axes.values()):
            yield dict(zip(axes, combination, strict=True))

    def final_points(self, train_point: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**train_point, **rest} for rest in self._points("bank", "final", "eval")]

    def write(self) -> Path:
        """Write the whole sweep, from `sweep_started` to `sweep_finished`."""
        with self.open() as ledger:
            self.start(ledger)
            for point in self.train_points():
                self.train(ledger, point)
                for final_point in self.final_points(point):
                    self.score(ledger, final_point)
            self.finish(ledger)
        return self.paths.sweep(self.sweep_id).ledger

    def open(self) -> Ledger:
        return Ledger(self.paths.sweep(self.sweep_id).ledger)

    def start(self, ledger: Ledger) -> None:
        trainings = self.train_points()
        ledger.append(
            "sweep_started",
            at=self.tick(1.0),
            sweep_id=self.sweep_id,
            name=self.sweep_id.rpartition("-")[0],
            recipe="pr414",
            spec={
                "resources": {"workers": 8, "gpus_per_worker": 1},
                "seeds": {"search": [self.seed]},
            },
            varying=list(self.space),
            axes={path: PHASES[path] for path in self.space},
            num_trainings=len(trainings),
            num_finals=sum(len(self.final_points(point)) for point in trainings),
            cap_bytes=self.cap_bytes,
            facts=FACTS,
        )

    def train(self, ledger: Ledger, point: dict[str, Any], *, cached: bool = False) -> str:
        key = self.begin(ledger, point)
        self.tick(600.0)
        self.end(ledger, point, cached=cached)
        return key

    def begin(self, ledger: Ledger, point: dict[str, Any]) -> str:
        """Write `training_started` and the whole curve of a training."""
        key = stage_id("training", point, self.seed)
        ledger.append(
            "training_started", at=self.tick(2.0), training=key, point=point, seed=self.seed
        )
        folder = self.paths.store / "trainings" / key
        write_json(folder / "task.json", {"train": point, "seed": self.seed})
        write_text(folder / "metrics.jsonl", "".join(curve_lines(self._at, range(0, 7001, 100))))
        return key

    def end(self, ledger: Ledger, point: dict[str, Any], *, cached: bool = False) -> None:
        key = stage_id("training", point, self.seed)
        result = train_result(float(point.get(WARMDOWN, 3000)), cached=cached)
        write_json(self.paths.store / "trainings" / key / "result.json", result)
        ledger.append(
            "training_finished",
            at=self.tick(1.0),
            training=key,
            point=point,
            seed=self.seed,
            phase="search",
            state="succeeded",
            reason=None,
            cached=cached,
            tries=0 if cached else 1,
            occupied_s=0.0 if cached else 600.0,
            result=result,
        )

    def score(self, ledger: Ledger, point: dict[str, Any], **overrides: Any) -> str:
        """Write `final_scored`; `state`, `reason`, `result` and `cached` may be overridden."""
        key = stage_id("final", point, self.seed)
        acting = {path: value for path, value in point.items() if path not in self.dead}
        result = final_result(acting, self.mean_bytes)
        over = 0 if self.cap_bytes is None else result["artifact_bytes"] - self.cap_bytes
        facts = {
            "state": "infeasible" if over > 0 else "succeeded",
            "reason": f"artifact_bytes is {over:,} over the cap" if over > 0 else None,
            "cached": False,
            "result": result,
            "phase": "search",
            **overrides,
        }
        facts["occupied_s"] = 0.0 if facts["cached"] else 95.0
        folder = self.paths.store / "finals" / key
        write_json(folder / "task.json", {"final": point, "seed": self.seed})
        if facts["result"] is not None:
            write_json(folder / "score.json", facts["result"]["score"])
            write_json(folder / "audit.json", facts["result"]["audit"])
            write_json(folder / "result.json", facts["result"])
        train_point = {path: value for path, value in point.items() if PHASES[path] == "train"}
        ledger.append(
            "final_scored",
            at=self.tick(95.0),
            final=key,
            training=stage_id("training", train_point, self.seed),
            point=point,
            seed=self.seed,
            **facts,
        )
        return key

    def finish(self, ledger: Ledger, state: str = "succeeded") -> None:
        ledger.append("sweep_finished", at=self.tick(1.0), state=state, cache_hits=0)

    def tick(self, seconds: float) -> float:
        """Let time pass on the sweep's own clock and return it."""
        self._at = round(self._at + seconds, 3)
        return self._at


FACTS = {
    "git_commit": "9f1c2ab47d3e5f60718293a4b5c6d7e8f9012345",
    "git_dirty": False,
    "data_name": "fineweb10B_sp1024",
    "data_digest": "sha256:" + "5e" * 32,
    "tokenizer_sha256": "a7" * 32,
    "spec_digest": "c4" * 32,
    "python": "3.11.13",
    "torch": "2.11.0",
    "ray": "2.60.0",
    "mlflow": "3.17.2",
    "zstandard": "0.25.0",
    "platform": "Linux x86_64",
}


def stage_id(kind: str, point: dict[str, Any], seed: int) -> str:
    text = json.dumps([kind, point, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def curve_lines(at: float, steps: range) -> Iterator[str]:
    """The lines of a metrics.jsonl: losses every 100 steps, validation every 1,000."""
    for step in steps:
        loss = 3.2 + 3.7 * math.exp(-step / 900) - 0.00006 * step
        line: dict[str, Any] = {
            "step": step,
            "at": round(at + 0.085 * step, 3),
            "train/loss": round(loss, 5),
            "train/lr_scale": round(min(1.0, (7_000 - step) / 3_000), 5),
        }
        if step % 1_000 == 0:
            line["val/bpb"] = round(loss / 2.4, 5)
        yield json.dumps(line) + "\n"


def train_result(warmdown: float, *, cached: bool = False) -> dict[str, Any]:
    return {
        "steps": 7_000,
        "steps_computed": 0 if cached else 7_000,
        "num_params": 26_993_756,
        "tokens": 7_000 * 524_288,
        "world_size": 8,
        "train_clock_s": 598.4,
        "clock_s": {"train": 598.4, "validate": 21.7},
        "final_train_loss": 1.9,
        "untrained_val_bpb": 4.1076,
        "entries": ["raw", "ema-0.995", "ema-0.997"],
        "parity_entry": "raw",
        "parity_bpb": 1.142 - 3e-6 * warmdown,
        "parity_tolerance": 1e-4,
    }


def final_result(point: dict[str, Any], mean_bytes: int) -> dict[str, Any]:
    """Make up a final: smooth in its point, plus a jitter from the point's hash."""
    jitter = int(stage_id("jitter", point, 0)[:6], 16) / 16**6 - 0.5
    prune, clip = point.get(PRUNE, 0.0), point.get(CLIP, "none")
    bpb = (
        1.1342 - 2.1e-6 * (point.get(WARMDOWN, 3000) - 2500) - 0.9 * (point.get(EMA, 0.995) - 0.995)
    )
    bpb += 0.35 * prune**2 + (0.0009 if clip == "none" else 0.0) + 0.0008 * jitter
    num_bytes = round(mean_bytes * (1.012 - 0.9 * prune + (0.004 if clip == "none" else 0.0)))
    num_bytes += round(0.002 * mean_bytes * jitter)
    return {
        "entry": f"ema-{point.get(EMA, 0.995)}",
        "num_params": 26_993_756,
        "artifact_bytes": num_bytes,
        "weights_bytes": num_bytes - 61_204,
        "code_bytes": 61_204,
        "forecast_bytes": round(num_bytes * 1.004),
        "weights_sha256": stage_id("weights", point, 0),
        "score": {
            "val_bpb": round(bpb, 8),
            "val_loss": round(bpb * 1.69, 8),
            "tokens": 62_021_632,
            "bytes": 151_080_633,
            "eval_clock_s": 84.2,
        },
        "audit": [
            {
                "id": "bytes-from-files",
                "verdict": "pass",
                "detail": "counted on disk",
                "source": "rules",
            }
        ],
        "finalize_clock_s": 9.6,
    }

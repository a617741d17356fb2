"""A ledger and a store with all that a report can show, through the real Ledger, for its tests.

320 finals of four tails from one trunk, a knob that only some points have, finals over the cap, an
illegal and a failed one, three confirmed points of three seeds, a budget in money. The numbers
follow `tests.ledgers`; what is written is what a real sweep writes.
"""

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.ledger import Ledger, SweepView, replay
from service.paths import Paths
from tests.ledgers import CLIP, EMA, FACTS, PRUNE, START, WARMDOWN, final_result, stage_id
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.runtime.files import write_json, write_text

STEPS, STEP_S, WORKERS, SEARCH_SEED = 7_000, 0.085, 8, 1337
CONFIRM_SEEDS = (42, 314, 999)
LEVEL = "final.compress.level"
SPACE: dict[str, dict[str, Any]] = {
    WARMDOWN: {"phase": "train", "values": [2500, 3000, 3500, 4000]},
    EMA: {"phase": "bank", "values": [0.995, 0.996, 0.997, 0.998]},
    CLIP: {"phase": "final", "values": ["none", "sd12", "p3", "p5", "p8"]},
    PRUNE: {"phase": "final", "values": [0.0, 0.03, 0.06, 0.09]},
    LEVEL: {"phase": "final", "values": [19, 22], "when": "final.quantize.clip != none"},
}


@dataclass
class Showcase:
    """One sweep, written whole by `write`. seeds: of its search."""

    home: Path
    sweep_id: str = "warmdown-ema-clip-prune-5d71c0"
    seeds: tuple[int, ...] = (SEARCH_SEED,)
    _at: float = field(default=START, init=False)

    def __post_init__(self) -> None:
        self.paths = Paths(self.home)

    def write(self) -> SweepView:
        path = self.paths.sweep(self.sweep_id).ledger
        with Ledger(path) as ledger:
            self._start(ledger)
            self._trunk(ledger)
            for seed, warmdown in itertools.product(self.seeds, SPACE[WARMDOWN]["values"]):
                self._search(ledger, warmdown, seed)
            self._confirm(ledger)
            ledger.append("sweep_finished", at=self._tick(2), state="succeeded", cache_hits=0)
        return replay(path)

    def _start(self, ledger: Ledger) -> None:
        ledger.append(
            "sweep_started", at=self._tick(1), sweep_id=self.sweep_id,
            name=self.sweep_id.rpartition("-")[0], recipe="pr414", varying=list(SPACE),
            axes={path: axis["phase"] for path, axis in SPACE.items()},
            spec={
                "resources": {"workers": WORKERS, "gpus_per_worker": 1},
                "seeds": {"search": list(self.seeds), "confirm": list(CONFIRM_SEEDS)},
                "space": SPACE,
                "budget": {"usd": 60.0, "usd_per_gpu_hour": 2.5},
            },
            num_trunks=1, num_trainings=4 * len(self.seeds), num_finals=320 * len(self.seeds),
            cap_bytes=ARTIFACT_BYTES_CAP, facts=FACTS,
        )  # fmt: skip

    def _trunk(self, ledger: Ledger) -> None:
        ledger.append(
            "trunk_finished", at=self._tick(340), trunk=stage_id("trunk", {}, 0),
            states=[stage_id("state", {}, 0)], state="succeeded", reason=None, cached=False,
            steps_computed=3_000, occupied_s=300.0, tries=1,
        )  # fmt: skip

    def _search(self, ledger: Ledger, warmdown: int, seed: int) -> None:
        training = self._train(ledger, warmdown, seed, first_step=STEPS - warmdown)
        others = [axis["values"] for path, axis in SPACE.items() if path not in (WARMDOWN, LEVEL)]
        for number, (ema, clip, prune) in enumerate(itertools.product(*others)):
            point = {WARMDOWN: warmdown, EMA: ema, CLIP: clip, PRUNE: prune}
            if clip != "none":
                point[LEVEL] = (19, 22)[number % 2]
            facts: dict[str, Any] = {}
            if number == 33:
                facts = {"state": "illegal", "reason": "eval_clock_s 640.2 > 600"}
            if number == 57:
                facts = {"state": "failed", "reason": "out of memory", "result": None}
            self._score(ledger, training, point, seed, "search", facts)

    def _confirm(self, ledger: Ledger) -> None:
        best = {WARMDOWN: 4000, EMA: 0.998, CLIP: "p5", LEVEL: 22}
        for seed in CONFIRM_SEEDS:
            training = self._train(ledger, 4000, seed, first_step=0, phase="confirm")
            for prune in (0.0, 0.03, 0.06):
                self._score(ledger, training, {**best, PRUNE: prune}, seed, "confirm", {})

    def _train(
        self, ledger: Ledger, warmdown: int, seed: int, *, first_step: int, phase: str = "search"
    ) -> str:
        point = {WARMDOWN: warmdown}
        key, seconds = stage_id("training", point, seed), STEP_S * (STEPS - first_step)
        begun = ledger.append(
            "training_started", at=self._tick(5), training=key, point=point, seed=seed,
            phase=phase, branch=None,
        )  # fmt: skip
        folder = self.paths.store / "trainings" / key
        write_text(folder / "metrics.jsonl", journal(begun["at"], warmdown, seed, first_step))
        clock_s = {"setup": 21.0, "warmup": 9.5, "train": STEPS * STEP_S, "validate": 30.8}
        ledger.append(
            "training_finished", at=self._tick(seconds + 70), training=key, point=point,
            seed=seed, phase=phase, state="succeeded", reason=None, cached=False, tries=1,
            occupied_s=seconds + 66,
            result={
                "steps": STEPS, "steps_computed": STEPS - first_step, "num_params": 26_993_756,
                "tokens": STEPS * 524_288, "world_size": WORKERS, "train_clock_s": 595.0,
                "clock_s": {**clock_s, "checkpoint": 6.0, "bank": 4.2}, "final_train_loss": 1.9,
                "untrained_val_bpb": 4.1076, "entries": ["raw"], "parity_entry": "raw",
                "parity_bpb": 1.131, "parity_tolerance": 1e-4,
            },
        )  # fmt: skip
        return key

    def _score(
        self, ledger: Ledger, training: str, point: dict[str, Any], seed: int, phase: str,
        facts: dict[str, Any],
    ) -> None:  # fmt: skip
        result = final_result(point, 15_850_000)
        luck = int(stage_id("luck", point, seed)[:6], 16) / 16**6 - 0.5
        unlucky = 0.0006 if phase == "confirm" else 0.0  # the search's best were lucky ones
        result["score"]["val_bpb"] = round(result["score"]["val_bpb"] + unlucky + 0.001 * luck, 8)
        error = int(stage_id("forecast", point, seed)[:6], 16) / 16**6 - 0.4
        result["forecast_bytes"] = round(result["artifact_bytes"] * (1 + 0.008 * error))
        over = result["artifact_bytes"] - ARTIFACT_BYTES_CAP
        state, reason = "succeeded", None
        if over > 0:
            state, reason = "infeasible", f"artifact_bytes is {over:,} over the cap"
        given = {"state": state, "reason": reason, "result": result, "cached": False, **facts}
        ledger.append(
            "final_scored", at=self._tick(14), final=stage_id("final", point, seed),
            training=training, point=point, seed=seed, phase=phase, occupied_s=95.0, **given,
        )  # fmt: skip

    def _tick(self, seconds: float) -> float:
        self._at = round(self._at + seconds, 3)
        return self._at


def journal(at: float, warmdown: int, seed: int, first_step: int) -> str:
    """A metrics.jsonl: a trunk's lines up to `first_step`, its tail's half an hour later."""
    lines: list[dict[str, Any]] = []
    trained_s, now = 0.0, at
    for step in range(0, STEPS + 1, 50):
        scale = min(1.0, (STEPS - step) / warmdown)
        noise = 0.02 * math.sin(step * 0.37 + seed)
        loss = 1.95 + 4.7 * math.exp(-step / 420) + 0.25 * scale - 2e-5 * step + noise
        if step:
            trained_s, now = trained_s + 50 * STEP_S, now + 50 * STEP_S
            if step == first_step + 50 and first_step:
                now += 1_800.0
            lines.append(
                {"step": step, "at": round(now, 3), "train/loss": round(loss, 5),
                 "train/lr_scale": round(scale, 5), "train/clock_s": round(trained_s, 3)}
            )  # fmt: skip
        if step % 1_000 == 0:
            now += 4.1
            lines.append({"step": step, "at": round(now, 3), "val/bpb": round(loss / 1.69, 5)})
        if step % 2_000 == 0 and step:
            now += 3.0
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_tensors(paths: Paths, final: str, result: dict[str, Any]) -> None:
    """Write what the bytes of a final's artifact are spent on, so that they add up to it."""
    parts = [("embedding.tokens", "embed", 0.05), ("embedding.bigram", "hash", 0.09)]
    for layer in range(11):
        parts.append((f"blocks.{layer}.attention.qkv", "attention", 0.026))
        parts.append((f"blocks.{layer}.mlp.up", "mlp", 0.05 + 0.0008 * layer))
    weights = result["weights_bytes"] - 20_000
    records = [
        {"name": name, "part": part, "role": "matrix", "bytes": int(weights * share / 1.03)}
        for name, part, share in parts
    ]
    write_json(paths.store / "finals" / final / "tensors.json", records)

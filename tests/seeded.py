"""Ledgers of sweeps whose points were scored with several seeds, through the real Ledger."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.ledger import Ledger, SweepView, replay
from service.paths import Paths
from tests.ledgers import CLIP, EMA, WARMDOWN, final_result, train_result

# What a final's fact may be overridden with, by seed.
Facts = Mapping[int, Mapping[str, Any]]
TOKENIZER = "a7" * 32


@dataclass
class Seeded:
    """A sweep over warmdown (a bank each) and clip (finals of one bank). Scores are given."""

    home: Path
    sweep_id: str = "seeded-3f9a2c"
    search: tuple[int, ...] = (1,)
    confirm: tuple[int, ...] = ()
    tokens: int = 62_021_632
    bytes: int = 151_079_963
    tokenizer: str = TOKENIZER
    occupied_s: float = 600.0
    steps_computed: int = 7_000
    """Of the 7,000 of each training."""
    _trainings: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        self.path = Paths(self.home).sweep(self.sweep_id).ledger
        with Ledger(self.path) as ledger:
            ledger.append(
                "sweep_started",
                sweep_id=self.sweep_id,
                name=self.sweep_id.rpartition("-")[0],
                spec={
                    "resources": {"workers": 8, "gpus_per_worker": 1},
                    "seeds": {"search": self.search, "confirm": self.confirm},
                },
                varying=[WARMDOWN, CLIP],
                axes={WARMDOWN: "train", CLIP: "final"},
                cap_bytes=16_000_000,
                facts={"tokenizer_sha256": self.tokenizer},
            )

    def add(
        self,
        phase: str,
        point: Mapping[str, Any],
        scores: Mapping[int, float],
        facts: Facts | None = None,
    ) -> list[str]:
        """Score a point with each seed; return the finals' ids."""
        with Ledger(self.path) as ledger:
            return [
                self._add_one(ledger, phase, dict(point), seed, bpb, (facts or {}).get(seed, {}))
                for seed, bpb in scores.items()
            ]

    def grow_trunk(self, steps: int, occupied_s: float) -> None:
        """Compute steps that several trainings share."""
        with Ledger(self.path) as ledger:
            ledger.append(
                "trunk_finished", trunk=_id(["trunk", steps]), states=[_id(["state", steps])],
                state="succeeded", reason=None, cached=False, tries=1, steps_computed=steps,
                occupied_s=occupied_s,
            )  # fmt: skip

    def _add_one(
        self, ledger: Ledger, phase: str, point: dict[str, Any], seed: int, bpb: float,
        facts: Mapping[str, Any],
    ) -> str:  # fmt: skip
        bank = {path: value for path, value in point.items() if path in (WARMDOWN, EMA)}
        training = _id(["training", bank, seed])
        final = _id(["final", point, seed, facts.get("fitted", False)])
        if training not in self._trainings:
            self._trainings.add(training)
            ledger.append(
                "training_finished", training=training, point=bank, seed=seed, phase=phase,
                state="succeeded", reason=None, cached=False, tries=1,
                occupied_s=self.occupied_s,
                result=train_result(2500.0) | {"steps_computed": self.steps_computed},
            )  # fmt: skip
        result = final_result(point, 15_000_000)
        result["score"] |= {"val_bpb": bpb, "tokens": self.tokens, "bytes": self.bytes}
        given = {
            "state": "succeeded",
            "reason": None,
            "result": result,
            "occupied_s": 90.0,
            **facts,
        }
        ledger.append(
            "final_scored", final=final, training=training, point=point, seed=seed, phase=phase,
            cached=False, **given,
        )  # fmt: skip
        return final

    def finish(self) -> "Seeded":
        with Ledger(self.path) as ledger:
            ledger.append("sweep_finished", state="succeeded", cache_hits=0, reason=None)
        return self

    def view(self) -> SweepView:
        return replay(self.path)


def point(warmdown: int, clip: str = "none") -> dict[str, Any]:
    return {WARMDOWN: warmdown, CLIP: clip}


def _id(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

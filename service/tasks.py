"""The stages of finals as tasks: a bank's parity, an artifact, its rank, its fit, its score.

Each runs on one worker and starts from the store: what another has computed is found there, and
two that need the same do not compute it twice. A job is JSON-like:

    store data training task (plain FinalTask) artifact hessians (ids) cpus device
    and the stage's own id: final | rank | fit, with cap_bytes
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from service.attention import choice, of_evaluation
from service.facts import WorkerFacts, write_facts
from service.identity import ID_LENGTH, fit_digest, parity_id
from service.store import Store
from service.worker_facts import worker_facts
from trainer.artifacts import collect, load_training, make_artifact
from trainer.choosing import fit_artifact, rank
from trainer.codec import dump, fingerprint, parse
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import InfeasibleError, TrainingError
from trainer.finalize.code import code_digest
from trainer.protocol import SPEC_VERSION
from trainer.results import ParityResult, Rule
from trainer.run import check_parity, finalize
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import read_json, write_json
from trainer.specs.task import (
    ArtifactTask,
    FinalTask,
    artifact_task,
    fit_task,
    hessians_task,
)


def run_final(job: dict[str, Any]) -> dict[str, Any]:
    """Compute a final, or find it; return {result, cached}, the result of `trainer.run.finalize`.

    Every stage is computed by the first final that needs it. A bank that fails its parity check
    is quarantined: {quarantined: why}. TrainingError where memory does not suffice.
    """

    def score(bench: _Bench, parity: Rule) -> dict[str, Any]:
        return bench.score(bench.task, bench.artifact(), job["final"], parity)

    return _on_sound_bank(job, score)


def run_rank(job: dict[str, Any]) -> dict[str, Any]:
    """Score a final's artifact on held-out training shards, as `run_final` does on validation.

    Returns {result, cached}, the result of `trainer.choosing.rank`, or {quarantined}.
    """

    def score(bench: _Bench, parity: Rule) -> dict[str, Any]:
        made = bench.artifact()
        result, cached = bench.compute(
            "ranks",
            job["rank"],
            lambda folder: rank(
                bench.task, bench.training, made, bench.dataset, folder, bench.ranks
            ),
            resumes=True,
        )
        return {"result": result, "cached": cached}

    return _on_sound_bank(job, score)


def run_fit(job: dict[str, Any]) -> dict[str, Any]:
    """Choose a final's clips and bits so that its artifact takes at most `cap_bytes`, and score it
    as a final of its own, the job's `fit`.

    Returns what `run_final` does, or {infeasible: why}, with the smallest size reached.
    """

    def score(bench: _Bench, parity: Rule) -> dict[str, Any]:
        task = fit_task(bench.task)
        made = bench.fitted(artifact_task(task), job["cap_bytes"])
        found = read_json(made / "result.json")
        if "infeasible" in found:
            return {"infeasible": found["infeasible"]}
        path = made / "fitted.json"
        chosen = parse(ArtifactTask, read_json(path), str(path))
        return bench.score(replace(task, final=chosen.final), made, job["fit"], parity)

    return _on_sound_bank(job, score)


@dataclass(frozen=True, slots=True)
class _Bench:
    """What the stages of one job work with."""

    job: dict[str, Any]
    task: FinalTask
    store: Store
    dataset: Dataset
    ranks: Ranks

    @property
    def training(self) -> Path:
        return self.store.folder("trainings", self.job["training"])

    def compute(
        self, kind: str, key: str, build: Callable[[Path], object], *, resumes: bool = False
    ) -> tuple[dict[str, Any], bool]:
        """Compute a stage, with the facts of who does beside it, or find it. Who resumes a score is
        told from who began it by the journal that it left."""

        def told(folder: Path) -> None:
            write_facts(folder, self._facts(), goes_on=any(folder.glob("journal/*/*.npz")))
            build(folder)

        return self.store.compute(kind, key, told, resumes=resumes)

    def _facts(self) -> WorkerFacts:
        """What this process computes with; the kernel is that of the evaluation."""
        trained_as, _ = load_training(self.training)
        device, dtype = self.ranks.device, trained_as.train.dtype
        asked = of_evaluation(trained_as.model, device.type, dtype, self.task.evaluate)
        facts = worker_facts(device, choice(asked, learns=False))
        return replace(facts, fused=self.task.evaluate.fused and device.type == "cuda")

    def parity(self) -> Rule:
        checked, _ = self.compute(
            "parities",
            parity_id(self.job["training"]),
            lambda folder: check_parity(self.training, self.dataset, folder, self.ranks),
        )
        return parse(ParityResult, checked, "parity").rule

    def hessians(self) -> Path | None:
        """Collect the bank's Hessians where the artifact takes them, or find them."""
        needed = hessians_task(artifact_task(self.task))
        if needed is None:
            return None
        self.compute(
            "hessians",
            self.job["hessians"],
            lambda folder: collect(needed, self.training, self.dataset, folder, self.ranks),
        )
        return self.store.folder("hessians", self.job["hessians"])

    def artifact(self) -> Path:
        """Make the artifact, or find it."""
        hessians, task = self.hessians(), artifact_task(self.task)
        self.compute(
            "artifacts",
            self.job["artifact"],
            lambda folder: make_artifact(
                task, self.training, self.dataset, folder, hessians, self.ranks
            ),
        )
        return self.store.folder("artifacts", self.job["artifact"])

    def fitted(self, task: ArtifactTask, cap_bytes: int) -> Path:
        """Fit an artifact to a cap, or find it; what no choice can reach is a result as well."""
        hessians = self.hessians()

        def build(folder: Path) -> None:
            try:
                fit_artifact(
                    task, self.training, self.dataset, folder, hessians, cap_bytes, self.ranks
                )
            except InfeasibleError as error:
                write_json(folder / "result.json", {"infeasible": str(error)})

        key = self._fitted_id(task, cap_bytes)
        self.compute("fits", key, build)
        return self.store.folder("fits", key)

    def _fitted_id(self, task: ArtifactTask, cap_bytes: int) -> str:
        """Identity of a fitted artifact, whatever it is scored by."""
        facts = {
            "kind": "fitted",
            "spec_version": SPEC_VERSION,
            "task": dump(task),
            "training": self.job["training"],
            "cap_bytes": cap_bytes,
            "search": fit_digest(),
            "code": code_digest(),
            "device": self.job["device"],
            "threads": self.job["cpus"] if self.job["device"] == "cpu" else None,
        }
        return fingerprint(facts)[:ID_LENGTH]

    def score(self, task: FinalTask, made: Path, key: str, parity: Rule) -> dict[str, Any]:
        """Score and audit the artifact in `made` as the final of that id, or find it."""
        result, cached = self.compute(
            "finals",
            key,
            lambda folder: finalize(
                task, self.training, made, self.dataset, folder, parity, self.ranks
            ),
            resumes=True,
        )
        return {"result": result, "cached": cached}


def _on_sound_bank(
    job: dict[str, Any], work: Callable[[_Bench, Rule], dict[str, Any]]
) -> dict[str, Any]:
    """Work on a bank once it has passed its parity check."""
    torch.set_num_threads(job["cpus"])
    bench = _Bench(
        job,
        parse(FinalTask, job["task"], "task"),
        Store(Path(job["store"])),
        load_dataset(Path(job["data"])),
        Ranks(device=torch.device(job["device"])),
    )
    with _memory_is_named():
        parity = bench.parity()
        if parity.verdict == "fail":
            return {"quarantined": f"bank quarantined by its parity check: {parity.detail}"}
        return work(bench, parity)


@contextmanager
def _memory_is_named() -> Iterator[None]:
    """Turn memory that does not suffice, the device's or the host's, into a failure of the final
    that says what to lower; another try would end the same way."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), "")
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and "DefaultCPUAllocator" not in first:  # torch has no type for the host's
            raise
        raise TrainingError(
            f"out of memory: {first or 'of the host'}; lower evaluate.batch_windows or "
            "evaluate.window, or final.quantize.gptq.seq_len where Hessians were collected"
        ) from error

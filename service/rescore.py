"""Score an artifact on disk again, for anybody who doubts its number."""

from pathlib import Path
from typing import Any

from service.catalogue_view import data_of
from service.paths import Paths
from trainer.codec import dump, parse
from trainer.errors import UsageError
from trainer.runtime.files import read_json
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.recipe import DataSpec
from trainer.specs.task import FinalTask


def artifact_of(paths: Paths, ref: str) -> tuple[Path, EvaluateSpec | None]:
    """Find an artifact by path or by its final's id (or a unique start of it).

    A final also tells how it was scored. UsageError when nothing or more than one fits.
    """
    if Path(ref).exists():
        path = Path(ref)
        return (path if path.is_dir() else path.parent), None
    finished = sorted((paths.store / "finals").glob("*/result.json"))
    matching = [path.parent for path in finished if path.parent.name.startswith(ref)]
    if len(matching) != 1:
        raise UsageError(
            f"{ref}: no such artifact, and {len(matching)} finals in {paths.store} start so; "
            "give a path, or a final's id as `fairway best` prints it"
        )
    folder = matching[0]
    task = parse(FinalTask, read_json(folder / "task.json"), str(folder / "task.json"))
    return folder / "artifact", task.evaluate


def rescore(paths: Paths, ref: str, data: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Load an artifact into a fresh model and score it; `asked` may set window, stride, variant."""
    from trainer.run import score_artifact
    from trainer.runtime.distributed import current

    artifact, known = artifact_of(paths, ref)
    wanted = {**(dump(known) if known else {}), **asked}
    if "window" not in wanted:
        raise UsageError(f"{artifact}: say how long a window the model was trained on: --window")
    wanted.setdefault("stride", wanted["window"])
    spec = parse(EvaluateSpec, wanted, "score")
    score, _ = score_artifact(
        artifact, data_of(paths, DataSpec(name=data)), spec, current(), dtype="float32"
    )
    return {"artifact": str(artifact), **dump(score)}

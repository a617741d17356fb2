"""A complete, named configuration, and what it takes to be one."""

from trainer.specs.base import require, require_positive, spec
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.final import FinalSpec
from trainer.specs.model import ModelSpec
from trainer.specs.train import TrainSpec


@spec
class DataSpec:
    """Prepared shards by name; `digest` pins their manifest."""

    name: str
    digest: str | None = None


@spec
class Observe:
    """What a training writes down on its way. Changes no weight, so it enters no identity."""

    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            log_every=self.log_every,
            validate_every=self.validate_every,
            checkpoint_every=self.checkpoint_every,
        )


@spec
class Recipe:
    """Model, data, training, averaging, finalization and evaluation under one name."""

    name: str
    model: ModelSpec
    data: DataSpec
    train: TrainSpec
    final: FinalSpec
    evaluate: EvaluateSpec
    observe: Observe = Observe()

    def __post_init__(self) -> None:
        averages = self.train.averages
        missing = {
            "raw": False,
            "ema": averages.ema_decay is None,
            "swa": averages.swa is None,
        }[self.final.average]
        fix = {"ema": "set train.averages.ema_decay", "swa": "add train.averages.swa: {}"}
        require(
            not missing,
            f"final.average={self.final.average} but the training keeps none; "
            f"{fix.get(self.final.average)}",
        )

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
    """What a training writes down on its way. Changes no weight, so it enters no identity.

    `forecast`: the final whose weights file is forecast at every validation; the recipe's own
    unless another is given.
    """

    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int | None = None
    forecast: FinalSpec | None = None

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
        self._check_kept_keys()
        self._check_qat()
        mtp = self.model.mtp
        require(
            mtp is None or mtp.num_heads < self.train.seq_len,
            f"model.mtp.num_heads={mtp and mtp.num_heads} looks past the end of "
            f"train.seq_len={self.train.seq_len}",
        )

    def _check_qat(self) -> None:
        model, qat = self.model, self.train.qat
        others = (model.bigram, model.trigram, model.value_embedding, model.head, model.mtp)
        require(
            qat is None or bool(qat.mlp_bits or qat.attention_bits or any(others)),
            f"train.qat.other_bits={qat and qat.other_bits} alone reaches no matrix of this model; "
            "set mlp_bits or attention_bits, or leave train.qat out",
        )

    def _check_kept_keys(self) -> None:
        depth, kv = self.model.num_layers, self.model.attention.shared_kv
        num_owners = depth if kv is None else 1 if kv.last is None else depth - kv.last
        for layer in self.final.quantize.float16_keys:
            require(
                0 <= layer < num_owners,
                f"final.quantize.float16_keys: layer {layer} has no key projection of its own, "
                f"layers 0..{num_owners - 1} have; set final.quantize.float16_keys=[]",
            )

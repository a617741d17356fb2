"""Test-time training: how a model adapts to the text that it is scored on."""

from typing import Literal

from trainer.specs.base import require, require_fraction, require_positive, spec

LORA_TARGETS = ("query", "key", "value", "out", "mlp", "head")


@spec
class Phases:
    """Global SGD between documents: when the count of scored documents passes each of `count`
    equal parts of `documents`, the base weights train on what has been scored, in one pass.

    Source: parameter-golf PRs #1610, #1626 and #1855 (techniques 4.3-19).
    """

    documents: int = 2500
    count: int = 3
    lr: float = 0.001
    momentum: float = 0.9
    clip_norm: float = 1.0
    chunk_tokens: int = 32_768
    epochs: int = 1

    def __post_init__(self) -> None:
        require_positive(
            documents=self.documents,
            count=self.count,
            clip_norm=self.clip_norm,
            chunk_tokens=self.chunk_tokens,
            epochs=self.epochs,
        )
        require(self.lr >= 0, f"lr={self.lr} is below 0")
        require_fraction(momentum=self.momentum)
        require(
            self.count <= self.documents, f"count={self.count} exceeds documents={self.documents}"
        )


@spec
class LoraTtt:
    """Low-rank adapters of each document's own, one step after every scored chunk.

    Adapters stand on `targets`; `mlp` is a D→D adapter beside the whole MLP, `head` is on the
    output matrix. A starts uniform and keeps its values between batches of documents when `warm_a`;
    B starts at zero with each. The chunk is the evaluation's `stride`.

    Source: the LoRA record and PRs #1530, #1855 (techniques 2.28, 4.3-18).
    """

    kind: Literal["lora"] = "lora"
    rank: int = 96
    alpha: float = 144.0
    lr: float = 1e-4
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1.0
    targets: tuple[str, ...] = LORA_TARGETS
    warm_a: bool = True
    batch_documents: int = 64
    order: Literal["longest", "file"] = "longest"
    seed: int = 0
    phases: Phases | None = None

    def __post_init__(self) -> None:
        require_positive(
            rank=self.rank,
            alpha=self.alpha,
            eps=self.eps,
            batch_documents=self.batch_documents,
        )
        require_fraction(beta1=self.beta1, beta2=self.beta2)
        require(self.lr >= 0, f"lr={self.lr} is below 0")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} is below 0")
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        require(
            bool(self.targets) and not unknown and len(set(self.targets)) == len(self.targets),
            f"targets={list(self.targets)} is not a choice of {', '.join(LORA_TARGETS)}",
        )


@spec
class SgdTtt:
    """SGD on every chunk of the stream once its scores are sealed, cosine over the chunks.

    `freeze_layers`: the first so many layers stay as they are; `freeze_tables`: the token, hash and
    value tables too.

    Source: parameter-golf PRs #549 and #610 (techniques 2.29).
    """

    kind: Literal["sgd"] = "sgd"
    lr: float = 0.002
    momentum: float = 0.9
    epochs: int = 3
    chunk_tokens: int = 32_768
    batch_sequences: int = 32
    clip_norm: float = 1.0
    freeze_layers: int = 0
    freeze_tables: bool = False

    def __post_init__(self) -> None:
        require_positive(
            epochs=self.epochs,
            chunk_tokens=self.chunk_tokens,
            batch_sequences=self.batch_sequences,
            clip_norm=self.clip_norm,
        )
        require(self.lr >= 0, f"lr={self.lr} is below 0")
        require_fraction(momentum=self.momentum)
        require(self.freeze_layers >= 0, f"freeze_layers={self.freeze_layers} is below 0")


@spec
class OracleTtt:
    """The whole model trains on the text before it is scored: an upper bound, never legal.

    AdamW with `mlp_down_lr` and `mlp_up_lr` as factors, cosine over all steps (PRs #672, #951), or
    SGD over shuffled sequences (PR #348's late commits); techniques 2.30, 2.31.
    """

    kind: Literal["oracle"] = "oracle"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-4
    epochs: int = 30
    batch_sequences: int = 32
    clip_norm: float = 1.0
    momentum: float = 0.9
    mlp_down_lr: float = 3.0
    mlp_up_lr: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(
            epochs=self.epochs,
            batch_sequences=self.batch_sequences,
            clip_norm=self.clip_norm,
            mlp_down_lr=self.mlp_down_lr,
            mlp_up_lr=self.mlp_up_lr,
        )
        require(self.lr >= 0, f"lr={self.lr} is below 0")
        require_fraction(momentum=self.momentum)

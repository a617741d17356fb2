"""What a model is built to compute with, chosen once for a device."""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from trainer.errors import UsageError
from trainer.kernels.attention import Attend, at_hand, attend, attention_of
from trainer.kernels.documents import Within, attend_within
from trainer.kernels.mlp import takes_mlp
from trainer.kernels.varlen import package_of, within_by
from trainer.specs.documents import Documents
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.kernels import APART, AttentionKernel, Backend


@dataclass(frozen=True, slots=True)
class Kernels:
    """attend: the attention. fused: whether a training computes what lies between the matrices by
    our own kernels. scores: whether a score computes heads and MLP by them. mlp: whether there is
    one for the MLP. within: the attention of a training that keeps documents apart."""

    attend: Attend = attend
    fused: bool = False
    scores: bool = False
    mlp: bool = False
    within: Within | None = None


PLAIN = Kernels()


def kernels_of(
    attention: AttentionKernel | None,
    device: torch.device,
    dtype: str,
    field: str,
    *,
    fused: bool = False,
    scores: bool = False,
    documents: Documents | None = None,
) -> Kernels:
    """The kernels that a spec gets on a device for a model of a dtype; UsageError, naming its
    `field`, for what is not to be had there."""
    if fused:
        require_triton(device, "train.fused", "set train.fused=false")
    if scores:
        require_triton(device, "evaluate.fused", "set evaluate.fused=false")
    name = at_hand(attention, device, dtype, field)
    try:
        within = None if documents is None else within_of(name, documents, field)
        has_mlp = (fused or scores) and takes_mlp(device, dtype)
        return Kernels(attention_of(name), fused, scores, has_mlp, within)
    except ImportError as error:  # installed, and for another torch
        raise UsageError(
            f"{field}: {name} cannot be imported ({error}); install it again or name another"
        ) from error


def kernels_of_score(spec: EvaluateSpec, device: torch.device, dtype: str) -> Kernels:
    """The kernels that an evaluation's spec gets, as `kernels_of`."""
    return kernels_of(spec.attention, device, dtype, "evaluate.attention", scores=spec.fused)


def require_triton(device: torch.device, field: str, instead: str) -> None:
    """UsageError, naming `field`, where our own kernels are to run on a CUDA device, without it."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise UsageError(f"{field}: triton is not installed; install it or {instead}")


def within_of(name: Backend, documents: Documents, field: str) -> Within:
    """Return what a back end keeps documents apart with; what it needs is imported now.

    UsageError, naming `field`, for one that cannot.
    """
    if name not in APART:
        raise UsageError(
            f"train.documents: {name} attends across documents; "
            f"set {field}.name to {', '.join(APART[:-1])} or {APART[-1]}"
        )
    if name == "torch":
        return partial(attend_within, bos=documents.bos)
    return within_by(package_of(name), documents.bos)

"""Which attention kernel a model gets on a device here, found by running it in a process apart.

Apart, because torch on a GPU keeps some 500 MB of it for as long as the process lives, and because
what plans and checks loads no torch. `python -m service.attention QUESTION` is that process.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, get_args

from trainer.codec import dump, parse
from trainer.errors import UsageError
from trainer.specs.documents import Documents
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.kernels import AttentionKernel, Backend
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe
from trainer.specs.train import TrainSpec

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.kernels.attention import Attend

TRAIN_FIELD, EVALUATE_FIELD = "train.attention", "evaluate.attention"
FIELDS = (TRAIN_FIELD, EVALUATE_FIELD, "train.fused", "evaluate.fused", "train.documents")
"""What an answer begins with where a spec's own choice cannot run."""
TRY_S = 120.0  # a first import of torch from a cold disk takes half a minute


@dataclass(frozen=True, slots=True)
class Kernel:
    """An attention that a spec names, and the field that it stands in."""

    field: str
    named: AttentionKernel | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One layer's attention: `dtype` and shapes are the training's, device `cpu` or `cuda`.

    kernel: which one is asked for. others: what must run there too. keeps_documents: whether a
    training's stays inside of documents, which torch does by a mask. fused: the fields that ask for
    our own kernels, which a CPU has twins of.
    """

    device: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_len: int
    kernel: Kernel = Kernel(TRAIN_FIELD)
    others: tuple[Kernel, ...] = ()
    keeps_documents: bool = False
    fused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attention:
    """The named one that runs, or torch's choice: flash, cudnn, efficient or math, and why flash is
    not; None and the fault where what is asked for cannot run there."""

    backend: str | None
    why: str
    at_hand: tuple[str, ...] = ()
    """All that a spec could name there."""


def of_training(model: ModelSpec, device: str, train: TrainSpec) -> Question:
    """The attention of a model's layers in a training."""
    kernel = Kernel(TRAIN_FIELD, train.attention)
    asked = question_of(model, device, train.dtype, train.seq_len, kernel)
    return replace(asked, keeps_documents=train.documents is not None)


def of_evaluation(model: ModelSpec, device: str, dtype: str, evaluate: EvaluateSpec) -> Question:
    """The attention of a model's layers in windows that are scored."""
    kernel = Kernel(EVALUATE_FIELD, evaluate.attention)
    return question_of(model, device, dtype, evaluate.window, kernel)


def of_recipe(recipe: Recipe, device: str) -> Question:
    """The attention of a recipe's training, and whether it asks for kernels of our own."""
    asked = {"train.fused": recipe.train.fused, "evaluate.fused": recipe.evaluate.fused}
    fields = [field for field, is_asked in asked.items() if is_asked and device == "cuda"]
    return replace(of_training(recipe.model, device, recipe.train), fused=tuple(fields))


def question_of(
    model: ModelSpec,
    device: str,
    dtype: str,
    seq_len: int,
    kernel: Kernel = Kernel(TRAIN_FIELD),
) -> Question:
    """The attention of a model's layers on sequences of so many tokens."""
    attention = model.attention
    return Question(
        device=device,
        dtype=dtype,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=model.dim // attention.num_heads,
        seq_len=seq_len,
        kernel=kernel,
    )


def choice(question: Question, *, learns: bool) -> str:
    """Name the kernel in use in this process: the one that the spec gets, or what torch chooses,
    with a backward pass or without one. UsageError where the spec gets none."""
    import torch

    from trainer.kernels.attention import at_hand

    kernel = question.kernel
    name = at_hand(kernel.named, torch.device(question.device), question.dtype, kernel.field)
    return name if name != "torch" else _torch_choice(question, learns=learns)


def _torch_choice(question: Question, *, learns: bool) -> str:
    import torch
    from torch.nn.attention import SDPBackend

    def heads(num: int) -> torch.Tensor:
        shape = (1, question.seq_len, num, question.head_dim)
        dtype = getattr(torch, question.dtype)
        laid = torch.zeros(shape, dtype=dtype, device=question.device, requires_grad=learns)
        return laid.transpose(1, 2)  # as the model lays it out

    num_queries, num_keys, mask = question.num_heads, question.num_kv_heads, None
    if question.keeps_documents:  # a mask wants as many key heads as query heads
        num_keys, length = num_queries, question.seq_len
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=question.device).tril()
    query, key, value = map(heads, (num_queries, num_keys, num_keys))
    found = torch._fused_sdp_choice(
        query, key, value, mask, 0.0, mask is None, enable_gqa=num_queries != num_keys
    )
    return SDPBackend(found).name.lower().removesuffix("_attention")


def ask(question: Question) -> Attention:
    """Run one layer's attention, forward and backward, in a process apart, and the others."""
    command = [sys.executable, "-m", "service.attention", json.dumps(dump(question))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_S)
    except subprocess.TimeoutExpired:
        return Attention(None, f"no answer within {TRY_S:g} s")
    if done.returncode:
        return Attention(None, (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1])
    told = json.loads(done.stdout.splitlines()[-1])
    return Attention(**(told | {"at_hand": tuple(told["at_hand"])}))


def _answer(question: Question) -> Attention:
    import torch

    from trainer.kernels.chosen import require_triton

    try:
        for field in question.fused:
            require_triton(torch.device(question.device), field, f"set {field}=false")
        for other in question.others:
            _run(question, other)
        name = _run(question, question.kernel)
    except UsageError as error:
        return Attention(None, str(error))
    return Attention(name, "") if name != "torch" else _torch_answer(question)


def _at_hand(device: str, dtype: str) -> tuple[str, ...]:
    import torch

    from trainer.kernels.attention import lacking

    place = torch.device(device)
    return tuple(name for name in get_args(Backend) if lacking(name, place, dtype) is None)


def _run(question: Question, kernel: Kernel) -> str:
    """Run what a kernel's spec gets, forward and backward, and name it; UsageError, naming its
    field, where there is none or where it fails."""
    import torch

    from trainer.kernels.attention import at_hand

    name = at_hand(kernel.named, torch.device(question.device), question.dtype, kernel.field)
    if name == "torch":  # as ever: a fault is no fault of a field
        _attend(question, kernel.field, name)(*_heads(question)).sum().backward()
        return name
    try:
        _attend(question, kernel.field, name)(*_heads(question)).sum().backward()
    except UsageError:
        raise
    except Exception as error:  # a package's own, of any kind
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{kernel.field}: {name} fails here ({said}); name another, or install it again"
        ) from error
    return name


def _attend(question: Question, field: str, name: Backend) -> "Attend":
    """The attention that a field's back end gets; a training's that keeps documents apart works in
    two of them."""
    import torch

    from trainer.kernels.attention import attention_of
    from trainer.kernels.chosen import within_of

    if not (question.keeps_documents and field == TRAIN_FIELD):
        return attention_of(name)
    opens = torch.zeros(1, question.seq_len, dtype=torch.int64, device=question.device)
    opens[:, question.seq_len // 2] = 1
    return within_of(name, Documents(bos=1), field)(opens)


def _heads(question: Question) -> "tuple[Tensor, Tensor, Tensor]":
    import torch

    dtype = getattr(torch, question.dtype)

    def heads(num: int) -> torch.Tensor:
        shape = (1, question.seq_len, num, question.head_dim)
        return torch.randn(shape, dtype=dtype, device=question.device, requires_grad=True)

    num_keys = question.num_kv_heads
    return heads(question.num_heads), heads(num_keys), heads(num_keys)


def _torch_answer(question: Question) -> Attention:
    """What torch chooses, and why it is not flash."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    name = _torch_choice(question, learns=True)
    q, k, v = _heads(question)
    attend = _attend(question, TRAIN_FIELD, "torch")
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        warnings.simplefilter("always")
        try:
            attend(q, k, v)
        except RuntimeError as error:
            told = [str(w.message).partition(" (Triggered")[0] for w in said]
            return Attention(name, reason_of_flash(told) or str(error))
    return Attention(name, "")


def reason_of_flash(told: Sequence[str]) -> str | None:
    """Find flash's own reason in what torch warns of: for each back end a line that ends with
    `because:`, and the reasons after it. None where there is none."""
    is_flash, named = False, None
    for line in told:
        if line.endswith("because:"):
            is_flash = "lash" in line
        elif is_flash:
            return line
        elif "lash" in line:
            named = named or line
    return named


if __name__ == "__main__":
    asked = parse(Question, json.loads(sys.argv[1]), "question")
    answer = replace(_answer(asked), at_hand=_at_hand(asked.device, asked.dtype))
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")

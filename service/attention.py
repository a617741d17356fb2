"""Which attention kernel a model gets on a device here, found by asking torch in a process apart.

Apart, because torch on a GPU keeps some 500 MB of it for as long as the process lives, and because
what plans and checks loads no torch. `python -m service.attention QUESTION` is that process.
"""

import json
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass

from trainer.specs.model import ModelSpec

TRY_S = 120.0  # a first import of torch from a cold disk takes half a minute


@dataclass(frozen=True, slots=True)
class Question:
    """One layer's attention: `dtype` and shapes are the training's, device `cpu` or `cuda`."""

    device: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_len: int


@dataclass(frozen=True, slots=True)
class Attention:
    """torch's choice for it: flash, cudnn, efficient or math, and why flash is not; None and the
    fault where attention cannot run there at all."""

    backend: str | None
    why: str


def question_of(model: ModelSpec, device: str, dtype: str, seq_len: int) -> Question:
    """The attention of a model's layers on sequences of so many tokens."""
    attention = model.attention
    return Question(
        device=device,
        dtype=dtype,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=model.dim // attention.num_heads,
        seq_len=seq_len,
    )


def choice(question: Question, *, learns: bool) -> str:
    """Name the kernel that torch chooses in this process, with a backward pass or without one."""
    import torch
    from torch.nn.attention import SDPBackend

    def heads(num: int) -> torch.Tensor:
        shape = (1, question.seq_len, num, question.head_dim)
        dtype = getattr(torch, question.dtype)
        laid = torch.zeros(shape, dtype=dtype, device=question.device, requires_grad=learns)
        return laid.transpose(1, 2)  # as the model lays it out

    query, key, value = map(
        heads, (question.num_heads, question.num_kv_heads, question.num_kv_heads)
    )
    is_grouped = question.num_heads != question.num_kv_heads
    found = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=is_grouped)
    return SDPBackend(found).name.lower().removesuffix("_attention")


def ask(question: Question) -> Attention:
    """Run one small attention, forward and backward, in a process apart."""
    command = [sys.executable, "-m", "service.attention", json.dumps(asdict(question))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_S)
    except subprocess.TimeoutExpired:
        return Attention(None, f"no answer within {TRY_S:g} s")
    if done.returncode:
        return Attention(None, (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1])
    return Attention(**json.loads(done.stdout.splitlines()[-1]))


def _answer(question: Question) -> Attention:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from trainer.model.kernels import attend

    dtype = getattr(torch, question.dtype)

    def heads(num: int) -> torch.Tensor:
        shape = (1, question.seq_len, num, question.head_dim)
        return torch.randn(shape, dtype=dtype, device=question.device, requires_grad=True)

    q, k, v = heads(question.num_heads), heads(question.num_kv_heads), heads(question.num_kv_heads)
    attend(q, k, v).sum().backward()
    name = choice(question, learns=True)
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        warnings.simplefilter("always")
        try:
            attend(q, k, v)
        except RuntimeError as error:
            # torch warns of each back end; flash's own reason is the one of interest.
            reasons = [str(w.message).partition(" (Triggered")[0] for w in said]
            why = [each for each in reasons if "lash" in each and not each.endswith("because:")]
            return Attention(name, (why or [str(error)])[0])
    return Attention(name, "")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_answer(Question(**json.loads(sys.argv[1]))))) + "\n")

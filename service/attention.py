"""Which attention kernel a model gets on a device here, found by asking torch in a process apart.

Apart, because torch on a GPU keeps some 500 MB of it for as long as the process lives, and because
what plans and checks loads no torch. `python -m service.attention QUESTION` is that process.
"""

import json
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass

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
    is_grouped = question.num_heads != question.num_kv_heads
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=is_grouped)
    name = SDPBackend(choice).name.lower().removesuffix("_attention")
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

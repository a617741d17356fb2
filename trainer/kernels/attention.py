"""Attention back ends behind one signature, and which of them a machine has.

Every one maps q [B, T, H, E] and k, v [B, T, K, E] to [B, T, H, E]: causal, scores scaled by
1/√E, head h reading kv head ⌊h·K/H⌋. They differ by rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.errors import UsageError
from trainer.specs.kernels import AttentionKernel, Backend

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the kernel that torch prefers for these tensors."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attend_masked(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries [B, S, H, E] to the keys [B, T, K, E] that a bool mask, which
    broadcasts to [B, H, S, T], lets each see.

    A kernel that takes a mask wants as many key heads as query heads.
    """
    group = q.shape[2] // k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(group, dim=2).transpose(1, 2),
        v.repeat_interleave(group, dim=2).transpose(1, 2),
        attn_mask=mask,
    )
    return out.transpose(1, 2)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by cuDNN's fused kernel; half precision on a CUDA device."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend(q, k, v)


def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by the flash kernel in torch; half precision on a CUDA device."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend(q, k, v)


@dataclass(frozen=True, slots=True)
class _Package:
    """A distribution with an attention kernel, and how one comes by it. module: of one that may be
    there without a distribution; a top one, because the parents of others would be imported."""

    distribution: str
    capability: int
    install: str
    module: str | None = None


PACKAGES: dict[str, _Package] = {
    "flash_attn_4": _Package("flash-attn-4", 9, 'pip install -e ".[fa4]"'),
    "flash_attn_3": _Package("flash-attn-3", 9, "build it from its source", "flash_attn_interface"),
    "flash_attn_2": _Package("flash-attn", 8, 'pip install --no-build-isolation -e ".[fa2]"'),
}


def lacking(name: Backend, device: torch.device, dtype: str) -> str | None:
    """Say why a back end cannot run on a device in a dtype, None where nothing is against it."""
    if name == "torch":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is a {device.type}"
    if dtype != "bfloat16":
        return f"it needs bfloat16, this model computes in {dtype}"
    package = PACKAGES.get(name)
    capability = 8 if package is None else package.capability
    if torch.cuda.get_device_capability(device)[0] < capability:
        return f"it needs a GPU of compute capability {capability}.0 or newer"
    if package is None:
        return None
    if name != "flash_attn_3" and _has("flash-attn") and _has("flash-attn-4"):
        return "flash-attn and flash-attn-4 overwrite each other's files; uninstall both, then one"
    if not (_has(package.distribution) or (package.module and find_spec(package.module))):
        return f"{package.distribution} is not installed; {package.install}"
    return None


def at_hand(
    kernel: AttentionKernel | None, device: torch.device, dtype: str, field: str
) -> Backend:
    """Return the back end that a spec gets on a device for a model of a dtype: its first choice or
    its substitute.

    UsageError, naming the spec's `field`, where neither can run.
    """
    if kernel is None:
        return "torch"
    why = lacking(kernel.name, device, dtype)
    if why is None:
        return kernel.name
    if kernel.substitute is None:
        raise UsageError(f"{field}.name={kernel.name}: {why}; or set {field}.substitute=torch")
    also = lacking(kernel.substitute, device, dtype)
    if also is not None:
        raise UsageError(
            f"{field}.name={kernel.name}: {why}; {field}.substitute={kernel.substitute}: {also}"
        )
    return kernel.substitute


def attention_of(name: Backend) -> Attend:
    """Return the function of a back end; what it needs is imported now."""
    if name == "flash_attn_4":
        from trainer.kernels.flash_attn_4 import attend_flash_attn_4

        return attend_flash_attn_4
    if name == "flash_attn_3":
        return _flash_attn_3()
    if name == "flash_attn_2":
        return _flash_attn_2()
    if name == "cudnn":
        return attend_cudnn
    return attend_flash if name == "flash" else attend


def _flash_attn_3() -> Attend:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    def attend_flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # older ones return the lse too

    return attend_flash_attn_3


def _flash_attn_2() -> Attend:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def attend_flash_attn_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, causal=True)

    return attend_flash_attn_2


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True

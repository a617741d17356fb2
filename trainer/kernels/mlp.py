"""The MLP with a squared rectifier, its activation computed where the matrix product ends.

    u = x · upᵀ,  h = leaky(u)²,  y = h · downᵀ,  leaky(u) = u where u > 0, else slope · u
    du = (dy · down) ⊙ 2 · leaky(u) · leaky′(u)

Without a slope leaky(u) = √h, so nothing but h is kept for the backward; with one u is, too. The
activation: So et al., arXiv 2109.08668, and parameter-golf PR #549; fused both ways as techniques
4.3, item 26. What is here is the plain twin and what runs on a CPU. On a CUDA device of compute
capability 9 the two products that end in the activation are the kernel of `mlp_triton`, the other
four torch's. Another GPU, another dtype than bfloat16 and widths that its loads cannot take keep
the plain MLP, which torch.compile fuses better than this twin.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_LOADED_BYTES = 16
"""What the starts of a matrix and of its rows are a multiple of, for the loads of the kernel."""


def takes_mlp(device: torch.device, dtype: str) -> bool:
    """Whether an MLP is to be computed here on a device: by the kernel, or by its twin on a CPU."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return device.type == "cpu" or (is_hopper and dtype == "bfloat16")


def fits_mlp(dim: int, hidden: int) -> bool:
    """Whether the kernel's loads take matrices of these widths, in bfloat16."""
    return all(2 * width % _LOADED_BYTES == 0 for width in (dim, hidden))


def relu2_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """Map x [..., D] to [..., D] by up [F, D] and down [D, F], all of one dtype.

    Saved for the backward: x, h [..., F] and, with a slope, u [..., F].
    """
    y, _, _ = _mlp(x, up, down, slope)
    return y


def _square(u: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(u, slope).square()


def _through(dh: Tensor, kept: Tensor, slope: float) -> Tensor:
    """Return du; kept is u with a slope, else h."""
    wide = torch.promote_types(dh.dtype, torch.float32)
    kept = kept.to(wide)
    factor = torch.where(kept > 0, kept, slope * slope * kept) if slope else kept.sqrt()
    return (2 * dh.to(wide) * factor).to(dh.dtype)


def _has_kernel(x: Tensor, width: int) -> bool:
    """Whether the fused product takes rows x [N, D] and a hidden width."""
    is_taken = x.is_cuda and takes_mlp(x.device, str(x.dtype).removeprefix("torch."))
    return is_taken and x.numel() > 0 and fits_mlp(x.shape[-1], width)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % _LOADED_BYTES == 0 else x.clone()


@torch.library.custom_op("fairway::relu2_mlp", mutates_args=())
def _mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h and u, which is of no size without a slope."""
    rows = x.reshape(-1, x.shape[-1])
    if _has_kernel(rows, len(up)):
        from trainer.kernels.mlp_triton import project_up

        h, u = project_up(_aligned(rows), _aligned(up), slope)
    else:
        u = F.linear(rows, up)
        h = _square(u, slope)
    y = F.linear(h, down)
    hidden = (*x.shape[:-1], len(up))
    return y.view(x.shape), h.view(hidden), u.view(hidden) if slope else x.new_empty(0)


@_mlp.register_fake
def _shapes(x: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (*x.shape[:-1], up.shape[0])
    return x.new_empty(x.shape), x.new_empty(hidden), x.new_empty(hidden if slope else 0)


@torch.library.custom_op("fairway::relu2_mlp_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, u: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, up and down."""
    rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    h = h.view(len(rows), len(up))
    kept = u.view(h.shape) if slope else h
    if _has_kernel(dy, len(up)):
        from trainer.kernels.mlp_triton import project_back

        dy = _aligned(dy)
        du = project_back(dy, _aligned(down), _aligned(kept), slope)
    else:
        du = _through(dy @ down, kept, slope)
    return (du @ up).view(x.shape), du.T @ rows, dy.T @ h


@_mlp_backward.register_fake
def _gradient_shapes(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, u: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def _keep_mlp(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *matrices, ctx.slope = inputs
    _, h, u = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h, u)
    ctx.save_for_backward(*matrices, h, u)


def _learn_mlp(ctx, grad: Tensor | None, *_: Tensor | None):
    if grad is None:
        return None, None, None, None
    return *_mlp_backward(grad, *ctx.saved_tensors, ctx.slope), None


_mlp.register_autograd(_learn_mlp, setup_context=_keep_mlp)

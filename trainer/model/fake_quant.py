"""Fake quantization: in training a matrix is multiplied as the artifact would hold it.

Source: techniques 2.21. The public scripts flipped a Python attribute inside a compiled forward
and so never acted; here the switch is a tensor, which is an input of the compiled graph.
"""

import torch
from torch import Tensor, nn

from trainer.errors import UsageError
from trainer.model.gpt import GPT
from trainer.model.linear import Linear
from trainer.quant import dequantize_rows, quantize_rows, row_scale
from trainer.sizes import tensor_sizes
from trainer.specs.train import Qat


class FakeQuant(nn.Module):
    """w → w + strength · sg(Q(w) − w) while training, w itself otherwise. No parameters.

    At strength 1 the result is exactly on the grid, at 0 exactly w; the gradient passes as if
    nothing had happened (straight-through). Scoring never sees it: what is trained is exported
    by its own quantization.
    """

    strength: Tensor

    def __init__(self, bits: int, spec: Qat, strength: Tensor) -> None:
        """Share `strength`, a float32 0-dim tensor on the weight's device, with other modules."""
        super().__init__()
        self.bits = bits
        self.per_tensor = spec.scale == "tensor"
        self.scale_floor = spec.scale_floor
        self.register_buffer("strength", strength, persistent=False)

    @torch.no_grad()
    def on_grid(self, weight: Tensor) -> Tensor:
        """Round weight [rows, cols] to the grid of its largest magnitude, by row or as a whole."""
        clip = weight.abs().amax(dim=1)
        if self.per_tensor:
            clip = clip.amax().expand(len(clip))
        scale = row_scale(clip, self.bits, self.scale_floor)
        return dequantize_rows(quantize_rows(weight, scale, self.bits), scale)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        fixed = weight.detach()
        return (weight - fixed) + torch.lerp(fixed, self.on_grid(fixed), self.strength)


class FakeQuants:
    """Every fake quantizer of a model, and the one strength that they share."""

    def __init__(self, model: GPT, spec: Qat) -> None:
        """Attach one to each matrix whose class has bits. The model is on its device for good:
        moving it would give each module a strength of its own.
        """
        self.start_step: int | None = None
        self.strength = torch.zeros((), device=model.embedding.weight.device)
        self.linears: list[Linear] = []
        bits = {"mlp": spec.mlp_bits, "attention": spec.attention_bits}
        parts = {size.name: size.part for size in tensor_sizes(model.plan)}
        for path, module in list(model.named_modules()):
            if isinstance(module, Linear):
                width = bits.get(parts[f"{path}.weight"], spec.other_bits)
                if width is not None:
                    module.weight_edit = FakeQuant(width, spec, self.strength)
                    self.linears.append(module)
        if not self.linears:
            raise UsageError(
                f"train.qat.other_bits={spec.other_bits} alone reaches no matrix of this model; "
                "set mlp_bits or attention_bits, or leave train.qat out"
            )
        if spec.start is None:
            self.turn_on(0)

    def turn_on(self, step: int) -> None:
        """Act from step `step` on. Fills the shared tensor in place: no graph is built anew."""
        self.start_step = step
        self.strength.fill_(1.0)

    @torch.no_grad()
    def share_on_grid(self) -> float:
        """Return the share of all these weights that is multiplied as a value of its grid."""
        hits = torch.zeros((), dtype=torch.int64, device=self.strength.device)
        for linear in self.linears:
            grid = linear.weight_edit.on_grid(linear.weight)  # type: ignore[operator]
            hits += (linear.weight_edit(linear.weight) == grid).sum()
        return int(hits) / sum(linear.weight.numel() for linear in self.linears)

    def state_dict(self) -> dict[str, int | None]:
        return {"start_step": self.start_step}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        self.start_step = state["start_step"]
        self.strength.fill_(0.0 if self.start_step is None else 1.0)

"""GPT: stem, steps, head. Training, evaluation and every later use run this one forward."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.blueprint import Blueprint
from trainer.model.block import Block
from trainer.model.kernels import token_loss
from trainer.model.linear import Linear, norm
from trainer.model.rotary import Rotary


class Embedding(nn.Module):
    """The token table. It is also the output matrix, so it is initialised small."""

    ROLES = {"weight": "embed"}

    def __init__(self, vocab_size: int, dim: int, init_std: float) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def reset_parameters(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Softcap(nn.Module):
    """cap · tanh(z / cap). Source: Gemma 2, arXiv 2408.00118; no parameters."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        return self.cap * torch.tanh(logits / self.cap)


class GPT(nn.Module):
    """The model that a blueprint describes. What the blueprint leaves out does not exist here."""

    ROLES = {"skip_scale": "scalar"}

    def __init__(self, plan: Blueprint) -> None:
        super().__init__()
        spec = plan.spec
        self.plan = plan
        self.steps = plan.steps
        self.embedding = Embedding(spec.vocab_size, spec.dim, spec.embedding.init_std)
        if plan.num_skips:
            self.skip_scale = nn.Parameter(torch.empty(plan.num_skips, spec.dim))
        self.rotary = Rotary(plan.rope_dims, spec.attention.rope.base)
        self.blocks = nn.ModuleList(Block(plan) for _ in range(spec.num_layers))
        self.softcap = nn.Identity() if spec.softcap is None else Softcap(spec.softcap.cap)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise every parameter from one seed, in module order, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        spec = self.plan.spec
        if spec.unet is not None and self.plan.num_skips:
            nn.init.constant_(self.skip_scale, spec.unet.init)
        for module in self.modules():
            if isinstance(module, Linear):
                module.reset_parameters(generator, orthogonal=spec.ortho_init is not None)
            elif isinstance(module, Embedding):
                module.reset_parameters(generator)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to the normed output stream [B, T, D]."""
        rope = self.rotary(tokens.shape[1], tokens.device)
        x = x0 = norm(self.embedding(tokens))
        skips: list[Tensor] = []
        for step in self.steps:
            if step.pop is not None:
                x = x + self.skip_scale[step.pop].to(x.dtype) * skips.pop()
            x = self.blocks[step.layer](x, x0, rope)
            if step.push:
                skips.append(x)
        return norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [B, T, D] to logits [B, T, V] through the tied table."""
        return self.softcap(F.linear(hidden, self.embedding.weight.to(hidden.dtype)))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in nats of each target [B, S], float32.

        Targets belong to the last S of the T positions: what is not scored needs no logits.
        """
        hidden = self.hidden(tokens)[:, -targets.shape[1] :]
        return token_loss(self.logits(hidden), targets)

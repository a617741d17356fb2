"""GPT: stem, steps, head. Training, evaluation and every later use run this one forward."""

import torch
from torch import Tensor, nn

from trainer.blueprint import Blueprint
from trainer.kernels.chosen import PLAIN, Kernels
from trainer.kernels.loss import WIDEST, capped_loss
from trainer.model.attention import tail
from trainer.model.block import Block
from trainer.model.head import MultiTokenHeads, Softcap, TiedHead, UntiedHead
from trainer.model.linear import Absent, Linear, norm
from trainer.model.loss import token_loss
from trainer.model.rotary import Rotary
from trainer.model.skips import GatedSkips, Skips
from trainer.model.stem import (
    BIGRAM,
    TRIGRAM,
    Embedding,
    HashEmbedding,
    SmearV1,
    SmearV2,
    ValueEmbedding,
)
from trainer.specs import model as specs


class GPT(nn.Module):
    """The model that a blueprint describes. What the blueprint leaves out does not exist here."""

    def __init__(self, plan: Blueprint, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        spec, rope = plan.spec, plan.spec.attention.rope
        self.plan = plan
        self.fused, self.within = kernels.fused, kernels.within
        self.fuses_loss = spec.vocab_size <= WIDEST
        self.steps = plan.steps
        self.embedding = Embedding(spec.vocab_size, spec.dim, spec.embedding.init_std)
        self.skips = _skips(plan)
        self.rotary = Rotary(plan.rope_dims, rope.base, rope.ntk_reference)
        self.blocks = nn.ModuleList()
        for layer in plan.layers:
            is_owner = layer.kv_owner == layer.index
            owner = None if is_owner else self.blocks[layer.kv_owner]
            self.blocks.append(Block(plan, layer, owner, kernels))  # type: ignore[arg-type]
        # Parts that draw random numbers come after the blocks: adding one leaves their init.
        self.smear = _smear(spec)
        self.bigram = _hash_embedding(spec.bigram, spec.dim, BIGRAM)
        self.trigram = _hash_embedding(spec.trigram, spec.dim, TRIGRAM)
        self.value_embedding = (
            Absent()
            if spec.value_embedding is None
            else ValueEmbedding(spec.value_embedding, spec.vocab_size, plan.kv_dim)
        )
        self.softcap = Absent() if spec.softcap is None else Softcap(spec.softcap.cap)
        self.head = TiedHead() if spec.head is None else UntiedHead(spec.vocab_size, spec.dim)
        self.mtp = (
            Absent() if spec.mtp is None else MultiTokenHeads(spec.mtp, spec.vocab_size, spec.dim)
        )
        is_early = isinstance(spec.smear, specs.SmearV2) or (
            spec.smear is not None and spec.smear.before_norm
        )
        # Tuples, because these parts are registered above, under their own names.
        self.before_norm = (self.bigram, self.trigram, *((self.smear,) if is_early else ()))
        self.after_norm = () if is_early else (self.smear,)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise every parameter from one seed, in module order, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        spec = self.plan.spec
        for module in self.modules():
            if isinstance(module, Linear):
                module.reset_parameters(
                    generator, orthogonal=spec.ortho_init is not None, depth=spec.num_layers
                )
            elif isinstance(module, Embedding):
                module.reset_parameters(generator)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    def hidden(self, tokens: Tensor, width: int | None = None, last: int | None = None) -> Tensor:
        """Map tokens [B, T] to the normed output stream [B, T, D], or to its `last` positions.

        Nothing but the keys and values of the last step reaches those from before them, so only
        these are computed there. Tokens that begin a window of `width` turn as they do in it.
        In a training that keeps documents apart, layers attend inside them, at every position.
        """
        attend = self.within(tokens) if self.within is not None and self.training else None
        rope = self.rotary(tokens.shape[1], tokens.device, width)
        values = self.value_embedding(tokens)
        x = self.embedding(tokens)
        for part in self.before_norm:
            x = part(x, tokens)
        x = norm(x)
        for part in self.after_norm:
            x = part(x, tokens)
        x0 = x
        kept: list[Tensor] = []
        for number, step in enumerate(self.steps, start=1):
            if step.pop is not None:
                x = self.skips(x, kept.pop(), step.pop)
            needed = last if number == len(self.steps) and attend is None else None
            x = self.blocks[step.layer](x, x0, rope, values, needed, attend)
            if step.push:
                kept.append(x)
        return norm(tail(x, last))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [B, T, D] to logits [B, T, V]."""
        return self.softcap(self.head(hidden, self.embedding.weight))

    def forward(self, tokens: Tensor, targets: Tensor, width: int | None = None) -> Tensor:
        """Return the loss in nats of each target [B, S], float32.

        Targets belong to the last S of the T positions: only what reaches these is computed.
        """
        hidden = self.hidden(tokens, width, last=targets.shape[1])
        losses = self._losses(hidden, targets)
        return self.mtp(losses, hidden, targets, self.softcap)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.fused and self.fuses_loss and self.training:
            cap = getattr(self.softcap, "cap", None)
            return capped_loss(self.head(hidden, self.embedding.weight), targets, cap)
        return token_loss(self.logits(hidden), targets)


def _skips(plan: Blueprint) -> nn.Module:
    unet = plan.spec.unet
    if unet is None:
        return Absent()
    if unet.gate is None:
        return Skips(plan.num_skips, plan.spec.dim, unet.init)
    return GatedSkips(plan.num_skips, plan.spec.dim, unet.init, unet.gate.init)


def _smear(spec: specs.ModelSpec) -> nn.Module:
    if spec.smear is None:
        return Absent()
    kind = SmearV1 if isinstance(spec.smear, specs.SmearV1) else SmearV2
    return kind(spec.smear, spec.dim)  # type: ignore[arg-type]


def _hash_embedding(
    spec: specs.HashEmbedding | None, dim: int, multipliers: tuple[int, ...]
) -> nn.Module:
    return Absent() if spec is None else HashEmbedding(spec, dim, multipliers)

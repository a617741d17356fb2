"""Roles → optimizers. Every parameter is in exactly one."""

import torch
from torch import nn

from trainer.errors import UsageError
from trainer.model.roles import ROLES, roles_of
from trainer.optim.muon import Muon, momentum_at
from trainer.specs import train as specs


class Optimizers:
    """Muon over the matrices; over the tables, the scalars and an untied head one AdamW each."""

    def __init__(self, model: nn.Module, spec: specs.Optimizer) -> None:
        self.spec = spec
        self.parameters = dict(model.named_parameters())
        roles = roles_of(model)
        members = {
            role: [self.parameters[name] for name in roles if roles[name] == role] for role in ROLES
        }
        self.by_role: dict[str, torch.optim.Optimizer] = {}
        if members["matrix"]:
            self.by_role["matrix"] = Muon(members["matrix"], spec.matrix)
        adamws = {"embed": spec.embed, "scalar": spec.scalar, "head": spec.head}
        for role, adamw in adamws.items():
            if members[role]:
                self.by_role[role] = _adamw(members[role], adamw)
        self._check_each_once()

    def _check_each_once(self) -> None:
        held = [
            id(parameter)
            for optimizer in self.by_role.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        for name, parameter in self.parameters.items():
            if held.count(id(parameter)) != 1:
                raise UsageError(f"{name} is in {held.count(id(parameter))} optimizers, not in one")

    def step(self, step: int, lr_scale: float) -> None:
        """Clip if asked, apply all optimizers at the scaled rates, and clear the gradients."""
        if self.spec.grad_clip is not None:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), self.spec.grad_clip)
        for role, optimizer in self.by_role.items():
            for group in optimizer.param_groups:
                group["lr"] = getattr(self.spec, role).lr * lr_scale
                if role == "matrix":
                    group["momentum"] = momentum_at(self.spec.matrix, step)
            optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, object]:
        return {role: optimizer.state_dict() for role, optimizer in self.by_role.items()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        for role, optimizer in self.by_role.items():
            optimizer.load_state_dict(state[role])


def _adamw(parameters: list[nn.Parameter], spec: specs.AdamW) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=parameters[0].is_cuda,
    )

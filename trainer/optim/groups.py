"""Roles → optimizers. Every parameter is in exactly one."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from trainer.errors import UsageError
from trainer.model.roles import ROLES, roles_of
from trainer.optim.captured import CapturedUpdate
from trainer.optim.muon import Muon, momentum_at
from trainer.specs import train as specs


class Optimizers:
    """Muon over the matrices; over the tables, the scalars and an untied head one AdamW each.

    `captured`: an update is recorded as a CUDA graph and replayed. A gang's updates cannot be:
    its ranks exchange their shares in the middle.
    """

    def __init__(self, model: nn.Module, spec: specs.Optimizer, *, captured: bool = False) -> None:
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
        optimizers, parameters = list(self.by_role.values()), list(self.parameters.values())
        self._update: Callable[[], None] = partial(_apply, optimizers, parameters, spec.grad_clip)
        if captured:
            self._update = CapturedUpdate(self._update, parameters, optimizers)

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
        """Move all weights at the scaled rates, and clear the gradients."""
        for role, optimizer in self.by_role.items():
            for group in optimizer.param_groups:
                group["lr"] = getattr(self.spec, role).lr * lr_scale
                if role == "matrix":
                    group["momentum"] = momentum_at(self.spec.matrix, step)
        self._update()
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, object]:
        return {role: optimizer.state_dict() for role, optimizer in self.by_role.items()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Take up a state. What tensors there are stay the same objects and are filled."""
        for role, optimizer in self.by_role.items():
            kept = dict(optimizer.state)
            fused = [group.get("fused") for group in optimizer.param_groups]
            optimizer.load_state_dict(state[role])
            _refill(optimizer, kept)
            _belong(optimizer, fused)


def _apply(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Sequence[nn.Parameter],
    grad_clip: float | None,
) -> None:
    """Clip if asked and apply every optimizer at the rates of its groups."""
    if grad_clip is not None:
        nn.utils.clip_grad_norm_(parameters, grad_clip)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def _refill(optimizer: torch.optim.Optimizer, kept: dict[Tensor, dict[str, Tensor]]) -> None:
    """Put the tensors of before in the place of those just loaded, with their values: a recorded
    update knows the former. What was saved before a first step holds none, and zeros begin it."""
    for parameter, tensors in kept.items():
        loaded = optimizer.state[parameter]
        for name, tensor in tensors.items():
            if name in loaded:
                tensor.copy_(loaded[name])
            else:
                tensor.zero_()
            loaded[name] = tensor


def _belong(optimizer: torch.optim.Optimizer, fused: list[bool | None]) -> None:
    """Have a state that was saved on another kind of device go on as this one's: torch takes over
    which kernel the groups were moved by, and where their steps were counted."""
    for group, own in zip(optimizer.param_groups, fused, strict=True):
        if own is None or group["fused"] == own:
            continue
        group["fused"] = own
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if own else "cpu")


def _adamw(parameters: list[nn.Parameter], spec: specs.AdamW) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=parameters[0].is_cuda,
    )

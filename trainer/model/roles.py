"""Parameter → role. Optimizer groups, bit widths and counts all read this, never a name pattern."""

from torch import nn

from trainer.errors import UsageError

ROLES = ("matrix", "embed", "scalar", "head")


def roles_of(model: nn.Module) -> dict[str, str]:
    """Map every parameter's name to matrix, embed, scalar or head, as its owner's ROLES declare.

    A parameter that no owner declares raises: an orphan would train for nothing
    (parameter-golf PR #951 lost its trigram table so).
    """
    roles: dict[str, str] = {}
    for path, module in model.named_modules():
        declared = getattr(module, "ROLES", {})
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if declared.get(name) not in ROLES:
                raise UsageError(
                    f"{full} {tuple(parameter.shape)}: declare its role in "
                    f"{type(module).__name__}.ROLES ({', '.join(ROLES)})"
                )
            roles[full] = declared[name]
    return roles

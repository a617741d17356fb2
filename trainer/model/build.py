"""From a spec to a model on a device, in the training's dtypes."""

import torch

from trainer.blueprint import blueprint
from trainer.kernels.chosen import PLAIN, Kernels
from trainer.model.gpt import GPT
from trainer.model.roles import roles_of
from trainer.specs.model import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(
    spec: ModelSpec, *, seed: int | None = None, dtype: str = "float32", kernels: Kernels = PLAIN
) -> GPT:
    """Build the model on the CPU, initialised from `seed` (uninitialised without one).

    dtype bfloat16 puts the embedding table in bfloat16, which sets the dtype of the whole
    stream; matrices and scalars keep float32 masters and are cast where they are used.
    """
    model = GPT(blueprint(spec), kernels)
    if seed is not None:
        model.reset_parameters(seed)
    roles = roles_of(model)
    for name, parameter in model.named_parameters():
        if roles[name] == "embed":
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def load_state(model: GPT, state: dict[str, torch.Tensor]) -> None:
    """Copy a float32 state into the model, cast to its dtypes; names must match exactly."""
    own = model.state_dict()
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})

"""ModelSpec → Blueprint: per-layer plans and the order of execution. Pure, no torch.

Whatever depends on a layer's place in the stack is decided here, so that modules, sizes and
tests read the same plan and `forward` has nothing to decide.
"""

from dataclasses import dataclass

from trainer.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Step:
    """Run one layer; first add skip `pop` to the stream, afterwards keep the output if `push`."""

    layer: int
    push: bool = False
    pop: int | None = None


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything that is needed to build the model or to count it."""

    spec: ModelSpec
    head_dim: int
    kv_dim: int
    mlp_dim: int
    rope_dims: int
    num_skips: int
    steps: tuple[Step, ...]


def blueprint(spec: ModelSpec) -> Blueprint:
    """Resolve a model spec into plans."""
    head_dim = spec.dim // spec.attention.num_heads
    steps = _depth_steps(spec)
    return Blueprint(
        spec=spec,
        head_dim=head_dim,
        kv_dim=spec.attention.num_kv_heads * head_dim,
        mlp_dim=int(spec.mlp.mult * spec.dim),
        rope_dims=spec.attention.rope.dims or head_dim,
        num_skips=sum(step.pop is not None for step in steps),
        steps=steps,
    )


def _depth_steps(spec: ModelSpec) -> tuple[Step, ...]:
    """First half pushes, second half pops in reverse; an odd depth leaves the last without skip."""
    if spec.unet is None:
        return tuple(Step(layer) for layer in range(spec.num_layers))
    half = spec.num_layers // 2
    encoder = tuple(Step(layer, push=True) for layer in range(half))
    decoder = tuple(
        Step(layer, pop=layer - half if layer - half < half else None)
        for layer in range(half, spec.num_layers)
    )
    return encoder + decoder

"""ModelSpec → Blueprint: per-layer plans and the order of execution. Pure, no torch.

Whatever depends on a layer's place in the stack is decided here, so that modules, sizes and
tests read the same plan and `forward` has nothing to decide.
"""

from dataclasses import dataclass

from trainer.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer has. `kv_owner` is the layer whose key and value matrices it uses."""

    index: int
    kv_owner: int
    norm_scale: float | None
    has_xsa: bool
    uses_value_embedding: bool


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
    layers: tuple[LayerPlan, ...]
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
        layers=tuple(_layer_plan(spec, index) for index in range(spec.num_layers)),
        steps=steps,
    )


def _layer_plan(spec: ModelSpec, index: int) -> LayerPlan:
    xsa, values = spec.attention.xsa, spec.value_embedding
    from_end = spec.num_layers - index
    return LayerPlan(
        index=index,
        kv_owner=_kv_owner(spec, index),
        norm_scale=None if spec.ln_scale is None else (index + 1) ** -0.5,
        has_xsa=xsa is not None and (xsa.last is None or from_end <= xsa.last),
        uses_value_embedding=values is not None and from_end <= values.last,
    )


def _kv_owner(spec: ModelSpec, index: int) -> int:
    shared = spec.attention.shared_kv
    if shared is None:
        return index
    if shared.last is None:
        return 0
    return index - shared.last if spec.num_layers - index <= shared.last else index


def _visits(spec: ModelSpec) -> tuple[int, ...]:
    """The layers in the order they are run: a recurrent stretch comes several times in a row."""
    layers = tuple(range(spec.num_layers))
    again = spec.recurrence
    if again is None:
        return layers
    stretch = layers[again.first : again.last + 1]
    return layers[: again.first] + stretch * again.passes + layers[again.last + 1 :]


def _depth_steps(spec: ModelSpec) -> tuple[Step, ...]:
    """First half pushes, second half pops in reverse; an odd depth leaves the last without skip."""
    visits = _visits(spec)
    if spec.unet is None:
        return tuple(Step(layer) for layer in visits)
    half = len(visits) // 2
    encoder = tuple(Step(layer, push=True) for layer in visits[:half])
    decoder = tuple(
        Step(layer, pop=index if index < half else None)
        for index, layer in enumerate(visits[half:])
    )
    return encoder + decoder

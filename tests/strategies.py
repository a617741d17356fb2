"""Hypothesis strategies for specs that keep every rule."""

from hypothesis import strategies as st

from trainer.specs import model as parts
from trainer.specs import train
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.final import FinalSpec, Prune, Quantize, Zstd
from trainer.specs.recipe import DataSpec, Observe, Recipe

_positive = st.floats(1e-6, 1e3)
_fraction = st.floats(0.0, 0.999)
_count = st.integers(1, 1000)


def _maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


@st.composite
def attentions(draw: st.DrawFn, head_dim: int) -> parts.Attention:
    num_kv_heads = draw(st.integers(1, 3))
    return parts.Attention(
        num_heads=num_kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=num_kv_heads,
        rope=parts.Rope(
            dims=draw(_maybe(st.sampled_from(range(2, head_dim + 1, 2)))),
            base=draw(st.floats(10.0, 1e6)),
        ),
        q_gain=draw(_maybe(st.builds(parts.QGain, init=_positive))),
    )


@st.composite
def models(draw: st.DrawFn) -> parts.ModelSpec:
    """Draw small models with any choice of parts."""
    head_dim = draw(st.sampled_from((2, 4, 8)))
    attention = draw(attentions(head_dim))
    leaky = st.builds(parts.LeakyRelu2, slope=_fraction)
    return parts.ModelSpec(
        vocab_size=draw(st.integers(1, 40)),
        num_layers=draw(st.integers(1, 5)),
        dim=attention.num_heads * head_dim,
        embedding=parts.Embedding(init_std=draw(_positive)),
        attention=attention,
        mlp=parts.Mlp(
            mult=draw(st.floats(0.5, 4.0)),
            activation=draw(st.just(parts.Relu2()) | leaky),
        ),
        residual_scale=draw(_maybe(st.builds(parts.ResidualScale, init=_positive))),
        x0_mix=draw(_maybe(st.just(parts.X0Mix()))),
        unet=draw(_maybe(st.builds(parts.UNetSkips, init=_positive))),
        softcap=draw(_maybe(st.builds(parts.Softcap, cap=_positive))),
        ortho_init=draw(_maybe(st.just(parts.OrthoInit()))),
    )


_adamws = st.builds(
    train.AdamW,
    lr=_positive,
    beta1=_fraction,
    beta2=_fraction,
    eps=_positive,
    weight_decay=_positive,
)
_muons = st.builds(train.Muon, lr=_positive, momentum=_fraction, ns_steps=_count)
_averages = st.builds(
    train.Averages,
    ema_decay=st.floats(0.1, 0.999),
    ema_bank=st.lists(st.floats(0.1, 0.999), max_size=3).map(tuple),
    swa=_maybe(st.builds(train.Swa, start_scale=_positive, every=_count)),
)


@st.composite
def trainings(draw: st.DrawFn) -> train.TrainSpec:
    seq_len, iterations = draw(_count), draw(_count)
    return train.TrainSpec(
        iterations=iterations,
        batch_tokens=seq_len * draw(_count),
        seq_len=seq_len,
        micro_batch_tokens=draw(_maybe(st.just(seq_len))),
        max_clock_s=draw(_maybe(_positive)),
        dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        compile=draw(st.booleans()),
        order=draw(st.sampled_from(("sequential", "shuffled"))),
        schedule=train.Schedule(warmdown_iters=draw(st.integers(0, iterations))),
        optimizer=draw(
            st.builds(
                train.Optimizer,
                matrix=_muons,
                embed=_adamws,
                scalar=_adamws,
                grad_clip=_maybe(_positive),
            )
        ),
        averages=draw(_averages),
    )


_quantizes = st.builds(
    Quantize,
    matrix_bits=st.integers(2, 8),
    embed_bits=st.integers(2, 8),
    clip=st.sampled_from(("none", "p5", "r9", "sd12", "sd12.85")),
    scale_floor=_positive,
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw whole recipes; the model is small, the numbers are anything allowed."""
    window = draw(st.integers(1, 4096))
    return Recipe(
        name=draw(st.text(min_size=1, max_size=20)),
        model=draw(models()),
        data=DataSpec(name="d", digest=draw(_maybe(st.text(max_size=9)))),
        train=draw(trainings()),
        final=FinalSpec(
            average=draw(st.sampled_from(("raw", "ema"))),
            prune=draw(_maybe(st.builds(Prune, ratio=_fraction))),
            quantize=draw(_quantizes),
            compress=Zstd(level=draw(st.integers(1, 22))),
        ),
        evaluate=EvaluateSpec(window=window, stride=draw(st.integers(1, window))),
        observe=draw(st.builds(Observe, log_every=_count, validate_every=_maybe(_count))),
    )

"""Hypothesis strategies for specs that keep every rule."""

from dataclasses import replace

from hypothesis import strategies as st

from trainer.specs import model as parts
from trainer.specs import train
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.final import Bits, FinalSpec, Int8Rule, Prune, Quantize, Zstd
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
        xsa=draw(_maybe(st.just(parts.Xsa()) | st.just(parts.Xsa(last=1)))),
    )


_hash_embeddings = st.builds(
    parts.HashEmbedding, num_buckets=st.integers(2, 30), dim=st.integers(1, 6), scale_init=_positive
)
_smears = st.builds(parts.SmearV1, init=_fraction, before_norm=st.booleans()) | st.just(
    parts.SmearV2(width=2, bos=0)
)
_activations = (
    st.just(parts.Relu2())
    | st.builds(parts.LeakyRelu2, slope=_fraction)
    | st.builds(parts.ReluPower, power=st.floats(1.0, 4.0))
    | st.just(parts.SwiGlu())
)
_unets = st.builds(
    parts.UNetSkips, init=_positive, gate=_maybe(st.builds(parts.SkipGate, init=_fraction))
)


@st.composite
def models(draw: st.DrawFn) -> parts.ModelSpec:
    """Draw small models with any choice of parts."""
    head_dim = draw(st.sampled_from((2, 4, 8)))
    attention = draw(attentions(head_dim))
    depth = draw(st.integers(1, 5))
    if depth >= 2:
        kv = st.just(parts.SharedKv()) | st.just(parts.SharedKv(last=depth // 2))
        attention = replace(attention, shared_kv=draw(_maybe(kv)))
    first = draw(st.integers(0, depth - 1))
    again = st.builds(
        parts.Recurrence,
        first=st.just(first),
        last=st.integers(first, depth - 1),
        passes=st.integers(2, 3),
    )
    values = st.builds(parts.ValueEmbedding, dim=st.integers(1, 6), last=st.integers(1, depth))
    return parts.ModelSpec(
        vocab_size=draw(st.integers(1, 40)),
        num_layers=depth,
        dim=attention.num_heads * head_dim,
        embedding=parts.Embedding(init_std=draw(_positive)),
        bigram=draw(_maybe(_hash_embeddings)),
        trigram=draw(_maybe(_hash_embeddings)),
        smear=draw(_maybe(_smears)),
        attention=attention,
        value_embedding=draw(_maybe(values)),
        mlp=parts.Mlp(mult=draw(st.floats(0.5, 4.0)), activation=draw(_activations)),
        residual_scale=draw(_maybe(st.builds(parts.ResidualScale, init=_positive))),
        x0_mix=draw(_maybe(st.just(parts.X0Mix()))),
        ln_scale=draw(_maybe(st.builds(parts.LnScale, learned=st.booleans()))),
        dtg=draw(_maybe(st.builds(parts.DtgGate, bias_init=_positive))),
        unet=draw(_maybe(_unets)) if depth >= 2 else None,
        recurrence=draw(_maybe(again)),
        softcap=draw(_maybe(st.builds(parts.Softcap, cap=_positive))),
        head=draw(_maybe(st.just(parts.UntiedHead()))),
        mtp=draw(_maybe(st.builds(parts.Mtp, num_heads=st.integers(1, 2), loss_weight=_positive))),
        ortho_init=draw(_maybe(st.builds(parts.OrthoInit, scaled_outputs=st.booleans()))),
    )


_adamws = st.builds(
    train.AdamW,
    lr=_positive,
    beta1=_fraction,
    beta2=_fraction,
    eps=_positive,
    weight_decay=_positive,
)
_muons = st.builds(
    train.Muon,
    lr=_positive,
    momentum=_fraction,
    ns_steps=_count,
    ns_dtype=st.sampled_from((None, "float32", "bfloat16")),
) | st.builds(train.Muon, coefficients=st.just("polar_express"), ns_steps=st.integers(1, 5))
# A rate that every schedule falls below, constant ones apart, which `trainings` avoids.
_lates = st.builds(train.Late, lr_scale=st.floats(0.5, 1.0)) | st.builds(
    train.Late, progress=st.floats(0.001, 0.999)
)
_averages = st.builds(
    train.Averages,
    ema_decay=st.floats(0.1, 0.999),
    ema_bank=st.lists(st.floats(0.1, 0.999), max_size=3).map(tuple),
    swa=_maybe(st.builds(train.Swa, start=_lates, every=_count)),
)
_widths = st.integers(2, 8)
_qats = st.builds(
    train.Qat,
    mlp_bits=_widths,
    attention_bits=_maybe(_widths),
    other_bits=_maybe(_widths),
    scale=st.sampled_from(("row", "tensor")),
    scale_floor=_positive,
    start=_maybe(_lates),
)


@st.composite
def trainings(draw: st.DrawFn) -> train.TrainSpec:
    seq_len, iterations = draw(_count), draw(_count)
    schedules = st.builds(
        train.Schedule,
        warmdown_iters=st.integers(1, iterations),
        min_lr_scale=st.floats(0.0, 0.4),
    ) | st.builds(train.Schedule, warmdown_iters=st.just(0), warmdown_fraction=st.floats(0.01, 1.0))
    return train.TrainSpec(
        iterations=iterations,
        batch_tokens=seq_len * draw(_count),
        seq_len=seq_len,
        micro_batch_tokens=draw(_maybe(st.just(seq_len))),
        max_clock_s=draw(_maybe(_positive)),
        dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        compile=draw(st.booleans()),
        order=draw(st.sampled_from(("sequential", "shuffled"))),
        schedule=draw(schedules),
        optimizer=draw(
            st.builds(
                train.Optimizer,
                matrix=_muons,
                embed=_adamws,
                scalar=_adamws,
                head=_adamws,
                grad_clip=_maybe(_positive),
            )
        ),
        averages=replace(draw(_averages), ema_every=draw(st.integers(1, iterations))),
        qat=draw(_maybe(_qats)),
    )


_stored_widths = st.integers(2, 8) | st.just(16)
_quantizes = st.builds(
    Quantize,
    bits=st.builds(
        Bits,
        mlp=_stored_widths,
        attention=_stored_widths,
        hash=_stored_widths,
        embed=_stored_widths,
        other=_stored_widths,
        scalar=st.sampled_from((16, 32)),
    ),
    clip=st.sampled_from(("none", "p5", "r9", "sd12", "sd12.85")),
    clip_scope=st.sampled_from(("row", "matrix")),
    scale_floor=_positive,
    symmetric=st.booleans(),
    int8=_maybe(st.builds(Int8Rule, quantile=st.floats(0.5, 1.0), scale_floor=_positive)),
    float16_keys=st.sampled_from(((), (0,))),  # every model's first layer has its own keys
)
_prunes = st.builds(
    Prune, ratio=_fraction, tables=st.booleans(), larger_than=st.integers(0, 100_000)
)
_zstds = st.builds(Zstd, level=st.integers(1, 22)) | st.builds(
    Zstd, long_distance=st.just(True), window_log=_maybe(st.integers(10, 27))
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw whole recipes; the model is small, the numbers are anything allowed."""
    window, model, train = draw(st.integers(1, 4096)), draw(models()), draw(trainings())
    if model.mtp is not None and model.mtp.num_heads >= train.seq_len:
        model = replace(model, mtp=None)  # it would look past the end of a sequence
    return Recipe(
        name=draw(st.text(min_size=1, max_size=20)),
        model=model,
        data=DataSpec(name="d", digest=draw(_maybe(st.text(max_size=9)))),
        train=train,
        final=FinalSpec(
            average=draw(st.sampled_from(("raw", "ema"))),
            prune=draw(_maybe(_prunes)),
            quantize=draw(_quantizes),
            compress=draw(_zstds),
        ),
        evaluate=EvaluateSpec(window=window, stride=draw(st.integers(1, window))),
        observe=draw(st.builds(Observe, log_every=_count, validate_every=_maybe(_count))),
    )

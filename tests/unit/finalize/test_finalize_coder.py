import math
import tracemalloc
from dataclasses import replace

import brotli
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.reference import coder_reference
from trainer.errors import DataError
from trainer.finalize.coder import Integers, Shape, decode, encode
from trainer.finalize.coder_tables import NUM_CLASSES, STREAM, octaves, weights

# What `encode` made of `golden()` when the format was settled.
GOLDEN = (
    (
        "5d57048672a53554ab37dd2964927876bc854806ade5ee8004fa10b4d85feaa469e97c6a4f36a76c3facd52d"
        "d39a1b65a4c98d8d92b3a8c05ce5cc88ab49ace79ac07b5342e936f2f73973789b0feb44b7be79cbfb162bf2"
        "f88daf42c7e377c85078a57690818eb95b22189b92bd19f0a0a41cca3d76906e3f19d6bdb70d68758f752795"
        "01943759904712e578063e4019f66029b7eadeaf7499cb752a01a8dc6c5c95cc8713ba282a763cb782e1456f"
        "4778ce08"
    ),
    (
        "a9aac513b6e03c06bfefcc07ec3579a41f9a6aafa6baa7f8cc6f22e3f0a22ee9fabe801fddef41247ac2f4f8"
        "ea1777e5d2981e63ec682cdcf87d1e93736710e56a030a589280413d0c552227941ad0ac7033e38ab4cbc906"
        "9aa454007a0a9c9d3293ad3f2e12c48c5e70efe4b64117a32a855dd645220bb84ea7442bed1967989ed4be68"
        "8b7434f9cd66a0bedbf2cafefba784590f8ddfbe19b51e64b32bc5138ba318f111d765cd7c25ffaee3c20efb"
        "01"
    ),
    (
        "062a6d4607f41cb60230629fa3fba03585ca16e02c83205f2209444fb9c9a10d1e8eb5626d7ba4cdb201c65a"
        "05971fcb56e30ec34ad50dd5ab0f1684958e4f0f94023f4254cfe59bf9908a2376c84416ca032ecde1a3092a"
        "eb343fa689e321d26900382e4b52ac7e433b0a80b5551b8c3d6cdf931b18485515381f6404d0113f6e80dadc"
        "8a388c1a69f07ac3bce6126ea2d40646ec0e462e16812a"
    ),
    "",
    (
        "fcc415cbf6d00fa5978af4c9779a190ae9bce2d09bb2794996eb13c8985e017942ccbf34af31e466698fe5cd"
        "10cdf7e0ad181c0afd3d24a85ed90656a0c413382ea20dc2595f52912b320b267c1a3e0e45081287e1fe4aa1"
        "808017ae858d059b17de0d4b35c306ad11080ac9c5c50d0c9cbf9609d5d9fb6cfc1708dd6906de1f6cea0d60"
        "3a951d2a5fd7fd53e995db33ebec0c14714c110d21640bd72df2e7772e17570c16b208dc5f62aced5c2407d9"
        "0d29093d0c3f1f85416915171c6b12afa9f11df6e105a14d2e1e6e4937beea84e8101fd71671f37bbf1f0cd5"
        "549eec179710198ac62997e09ce9dca8c1a9c5e3b744b8ed2dc8f3fc1de2e1c69f5016df18a8f5abfbb31f92"
        "9545233f1817ff6c802bf2ca3c3c87592a901e4d5cacd5feb100fc433f095ba3d614d2601cb5c343adb4877b"
        "938a90b2f31f86f53556c18e04a85af50c225f8b76fab27e8c6cc8f5f1b2bd93cb843caa21a5cd8a1963897e"
        "2bce23de093f1f618c324ddba1bdd0199c0b2968d40d9bb3f404df4ba3d86d2fae23fb476da286a37ae778a6"
        "0a"
    ),
)


def matrix(q, bits=6, scale=None, name="w"):
    q = np.asarray(q, np.int8)
    return Integers(name, q, bits, np.ones(len(q), np.float16) if scale is None else scale)


def shapes_of(matrices):
    return [Shape(m.name, *m.q.shape, m.bits, m.scale) for m in matrices]


def read(blobs, matrices):
    return decode(blobs, shapes_of(matrices), "file")


def rounded(weights_in_steps, bits=6):
    bound = 2 ** (bits - 1) - 1
    return np.clip(np.rint(weights_in_steps), -bound, bound).astype(np.int8)


def size(*matrices):
    """Return the bytes of the last matrix, written after the others."""
    return len(encode(matrices)[-1])


def golden():
    """Integers that need every part of the format, made without a random generator."""
    i, j = np.indices((10, 36))
    noise = (i * 7919 + j * 104729 + i * j * 31) % 61 - 30
    scale = (2.0 ** (np.arange(10) % 5) / 64).astype(np.float16)
    plain = noise * (1 + i % 3) // (2 + j % 4) // 3
    means = noise // 12 + (i % 4 - 2) * (j % 7 - 3) * 2
    i, j = np.indices((32, 48))
    noise = (i * 7919 + j * 104729 + i * j * 31) % 61 - 30
    together = np.where(i % 2 == j % 2, noise // 9, 0)
    return [
        matrix(plain, scale=scale),
        matrix(plain.T, bits=5),
        matrix(means, scale=scale),
        matrix(np.full((3, 2), -2), bits=2),
        matrix(together, bits=7),
    ]


def structured(seed, rows, cols, bits, kind):
    """Return integers of a kind that the coder has a model for."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal((rows, 1)) + 0.5 * rng.standard_normal(cols))
    if kind == "shifts":
        spread = spread * np.exp(
            np.sign(rng.standard_normal((rows, 1)) * rng.standard_normal(cols))
        )
    values = rng.standard_normal((rows, cols)) * spread
    if kind == "means":
        values += 3 * np.outer(rng.standard_normal(rows), rng.standard_normal(cols)) * spread
    if kind == "tails":
        values *= np.exp(rng.standard_normal((rows, cols)))
    scale = np.exp2(rng.uniform(-12, 3, rows)).astype(np.float16)
    return matrix(rounded(values * 2 ** (bits - 4), bits), bits, scale, f"{kind}{seed}")


@st.composite
def integers(draw):
    bits = draw(st.integers(2, 8))
    bound = 2 ** (bits - 1)
    low, high = sorted(draw(st.lists(st.integers(-bound, bound - 1), min_size=2, max_size=2)))
    rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    q = draw(npst.arrays(np.int8, (rows, cols), elements=st.integers(low, high)))
    scale = npst.arrays(np.float16, rows, elements=st.floats(2.0**-24, 65504.0, width=16))
    return matrix(q, bits, draw(scale))


def trained_like(seed, rows=256, cols=320, count=4):
    """Return matrices with rows and columns of different sizes, as training makes them, and the
    code length in bytes, to one in a thousand, for a reader who knows these sizes."""
    rng = np.random.default_rng(seed)
    made, bits = [], 0.0
    for _ in range(count):
        sigma = 4.0 * np.exp(0.4 * rng.standard_normal((rows, 1)) + 0.2 * rng.standard_normal(cols))
        made.append(matrix(rounded(sigma * rng.standard_normal((rows, cols)))))
        bits += 0.5 * np.log2(2 * np.pi * np.e * (sigma**2 + 1 / 12)).sum()
    return made, bits / 8


@given(st.lists(integers(), max_size=4))
@settings(max_examples=60)
def test_any_integers_come_back(matrices):
    for back, one in zip(read(encode(matrices), matrices), matrices, strict=True):
        assert back.dtype == np.int8
        assert np.array_equal(back, one.q)


@given(
    st.lists(
        st.builds(
            structured,
            st.integers(0, 99),
            st.sampled_from((1, 7, 24)),
            st.sampled_from((1, 7, 24)),
            st.integers(2, 8),
            st.sampled_from(("plain", "means", "shifts", "tails")),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=20)
def test_plain_reader_reads_the_same(matrices):
    earlier = {}
    for blob, one in zip(encode(matrices), matrices, strict=True):
        scale = one.scale.tolist()
        q, is_whole = coder_reference.decode(blob, *one.q.shape, one.bits, scale, earlier, set())

        assert is_whole
        assert np.array_equal(q, one.q)


def test_golden_blobs_are_read_alike_everywhere():
    blobs, wanted = [bytes.fromhex(blob) for blob in GOLDEN], golden()

    for back, one in zip(read(blobs, wanted), wanted, strict=True):
        assert np.array_equal(back, one.q)


def test_golden_blobs_have_every_part_of_the_format():
    earlier, used = {}, set()
    for blob, one in zip(GOLDEN, golden(), strict=True):
        scale = one.scale.tolist()
        coder_reference.decode(bytes.fromhex(blob), *one.q.shape, one.bits, scale, earlier, used)

    assert used == {"scales", "reference", "shape", "shifts", "means"}


def test_equal_matrices_give_equal_blobs():
    assert encode(golden()) == encode(golden())


@pytest.mark.parametrize(("low", "high"), [(-32, 31), (-1, 0), (-128, 127), (3, 9)])
@pytest.mark.parametrize("mean", [0, -40, 9])
def test_probabilities_are_the_gaussians(low, high, mean):
    classes = np.arange(0, NUM_CLASSES, 3)

    given_out = (weights(classes, np.full_like(classes, mean), 0, low, high) + 1) / 2**24

    sigma = 2.0 ** (classes / 16 - 3)[:, None]
    edges = np.arange(low, high) + 0.5
    normal = 0.5 * (1 + np.vectorize(math.erf)((edges / sigma - mean / 8) / 2**0.5))
    wanted = np.diff(normal, prepend=0.0, append=1.0, axis=1)
    assert given_out.sum(1) == pytest.approx(1.0, abs=1e-12)
    assert np.abs(given_out - wanted).max() < 3e-5


def test_log2_of_a_scale_is_exact_at_its_steps():
    every_half = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)

    assert np.array_equal(
        octaves(every_half), np.floor(np.log2(every_half.astype(np.float64)) * 16)
    )


def test_constant_matrices_take_at_most_a_word():
    for value in (-32, 0, 31):
        assert size(matrix(np.full((64, 64), value))) <= 4


def test_a_small_matrix_costs_few_bytes_beyond_its_entropy():
    q = rounded(5 * np.random.default_rng(0).standard_normal((8, 16)))
    _, counts = np.unique(q, return_counts=True)
    entropy = -(counts * np.log2(counts / q.size)).sum() / 8

    assert size(matrix(q)) < entropy + 16


def test_beats_brotli_and_knows_the_sizes_for_little():
    matrices, ideal = trained_like(seed=0)
    lines = sum(sum(one.q.shape) for one in matrices)

    total = sum(len(blob) for blob in encode(matrices))

    rivals = brotli.compress(b"".join(one.q.T.tobytes() for one in matrices), quality=11)
    assert total < 0.97 * len(rivals)
    assert total < 1.001 * ideal + 0.75 * lines


def test_scales_follow_those_of_an_earlier_matrix():
    rng = np.random.default_rng(0)
    units = np.exp(rng.standard_normal(400))
    up = rounded(4 * units[:, None] * rng.standard_normal((400, 100)))
    down = rounded(4 * units * rng.standard_normal((100, 400)))

    assert size(matrix(up), matrix(down)) < size(matrix(down)) - 100


def test_scales_follow_the_float16_scales_of_an_earlier_matrix():
    rng = np.random.default_rng(0)
    units = np.exp(rng.standard_normal(400))
    up = rounded(4 * rng.standard_normal((400, 100)))
    down = rounded(4 * units * rng.standard_normal((100, 400)))
    scaled = matrix(up, scale=(units / 100).astype(np.float16))

    assert size(scaled, matrix(down)) < size(matrix(up), matrix(down)) - 100


def test_common_parts_of_rows_are_taken_out():
    rng = np.random.default_rng(0)
    noise = 4 * rng.standard_normal((200, 200))
    common = 8 * np.outer(rng.standard_normal(200), rng.standard_normal(200))

    # Without means the matrix would take 1.2 bits more for each integer.
    assert size(matrix(rounded(noise + common, 8), 8)) < size(matrix(rounded(noise, 8), 8)) + 600


def test_sizes_that_row_and_column_only_give_together_are_found():
    rng = np.random.default_rng(0)
    together = np.exp(np.multiply.outer(rng.choice([-0.7, 0.7], 200), rng.choice([-1, 1], 200)))
    noise = rng.standard_normal((200, 200))
    apart = rng.permutation(together.ravel()).reshape(200, 200)

    assert size(matrix(rounded(6 * together * noise))) < 0.97 * size(
        matrix(rounded(6 * apart * noise))
    )


def test_wide_tails_are_modelled():
    rng = np.random.default_rng(0)
    q = rounded(rng.standard_t(3, (300, 300)), 8)
    _, counts = np.unique(q, return_counts=True)
    entropy = -(counts * np.log2(counts / q.size)).sum() / 8

    assert size(matrix(q, 8)) < 1.02 * entropy


def test_a_matrix_of_several_blocks_comes_back_within_bounded_memory():
    rows, cols = 6001, 1024
    one = matrix(rounded(3 * np.random.default_rng(0).standard_normal((rows, cols))))
    blobs = encode([one])

    tracemalloc.start()
    back = read(blobs, [one])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert np.array_equal(back[0], one.q)
    assert peak < rows * cols + 40 * 2**20


@given(st.integers(0, 2), st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=60)
@example(0, 0, 255)
@example(0, 179, 8)  # the last byte becomes 0
def test_a_changed_byte_gives_an_error_or_integers_of_the_grid(index, at, by):
    blobs = [bytes.fromhex(blob) for blob in GOLDEN]
    damaged = bytearray(blobs[index])
    damaged[at % len(damaged)] ^= by
    blobs[index] = bytes(damaged)

    assert_survives(blobs, golden())


@given(st.lists(st.binary(max_size=80), min_size=5, max_size=5))
@settings(max_examples=60)
def test_any_bytes_give_an_error_or_integers_of_the_grid(blobs):
    assert_survives(blobs, golden())


def assert_survives(blobs, matrices):
    try:
        back = read(blobs, matrices)
    except DataError:
        return
    for q, one in zip(back, matrices, strict=True):
        assert q.shape == one.q.shape
        assert -(2 ** (one.bits - 1)) <= q.min() <= q.max() < 2 ** (one.bits - 1)


@given(st.integers(0, 179))
@settings(max_examples=30)
def test_a_blob_that_ends_early_gives_an_error_or_integers_of_the_grid(length):
    assert_survives([bytes.fromhex(GOLDEN[0])[:length]], golden()[:1])


def test_a_blob_with_bytes_left_over_is_refused():
    matrices = golden()[:1]
    (blob,) = encode(matrices)

    for other in (blob + b"\0", blob + bytes(8), blob + blob, blob + b"left over"):
        with pytest.raises(DataError, match=r"^file: tensor 'w' is damaged; finalize"):
            read([other], matrices)


def test_a_lowest_integer_above_the_highest_is_refused():
    coder = STREAM.stack.AnsCoder()
    coder.encode_reverse(np.array([40, 30], np.int32), STREAM.model.Uniform(64))
    blob = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")

    with pytest.raises(DataError, match="'w' is damaged"):
        read([blob], [matrix(np.zeros((2, 2)))])


def test_blobs_in_another_order_do_not_crash():
    matrices = [structured(seed, 24, 24, 6, "plain") for seed in range(4)]
    blobs = encode(matrices)

    assert_survives(blobs[::-1], [replace(one, name="w") for one in matrices])

"""The public pr414 script's own losses, from its own weights, through our one forward."""

import numpy as np
import pytest
import torch

from tests import golden_pr414 as golden
from trainer.data.bytecount import ByteTable
from trainer.evaluate.sliding import score_stream
from trainer.model.build import build, load_state
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec


@pytest.fixture(scope="module")
def model():
    built = build(golden.model_spec())
    load_state(built, golden.our_state())
    return built.eval()


@pytest.mark.parametrize(("file", "rows"), [("nll_2x512.npy", 2), ("nll_1x2048.npy", 1)])
def test_per_token_losses_are_the_public_scripts(model, file, rows):
    expected = np.load(golden.FOLDER / file).ravel()
    tokens = torch.from_numpy(np.load(golden.FOLDER / "tokens.npy").astype(np.int64))
    inputs, targets = tokens[: len(expected)], tokens[1 : len(expected) + 1]

    with torch.no_grad():
        losses = model(inputs.view(rows, -1), targets.view(rows, -1))

    assert np.abs(losses.numpy().ravel() - expected).max() < 1e-4


def test_the_longer_sequence_would_differ_without_the_ntk_rule(model):
    tokens = torch.from_numpy(np.load(golden.FOLDER / "tokens.npy").astype(np.int64))[None]
    reference = model.rotary.ntk_reference

    with torch.no_grad():
        scaled = model(tokens[:, :2048], tokens[:, 1:2049])
        model.rotary.ntk_reference = None
        plain = model(tokens[:, :2048], tokens[:, 1:2049])
    model.rotary.ntk_reference = reference

    assert (scaled - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("num_targets", "stride"), [(1500, 2048), (3000, 1024)])
def test_a_window_that_the_end_cuts_short_turns_positions_like_a_whole_one(
    model, num_targets, stride
):
    """As the public script does, which fills every window up to its length."""
    ids = np.load(golden.FOLDER / "tokens.npy")[: num_targets + 1]
    table = ByteTable.load(golden.FOLDER / "tokenizer.model", golden.model_spec().vocab_size)
    spec = EvaluateSpec(window=2048, stride=stride)

    totals = score_stream(model, ids, table, spec, Ranks())

    nats, scored = 0.0, 0
    for start in range(0, max(num_targets - 2048 + stride, 1), stride):
        filled = np.zeros(2049, dtype=np.int64)
        part = ids[start : start + 2049]
        filled[: len(part)] = part
        whole = torch.from_numpy(filled)[None]
        first = 2048 - stride if start else 0
        with torch.no_grad():
            losses = model(whole[:, :-1], whole[:, 1:])[0, first : len(part) - 1]
        nats, scored = nats + float(losses.double().sum()), scored + len(losses)
    assert (totals.tokens, scored) == (num_targets, num_targets)
    assert totals.nats == pytest.approx(nats, rel=1e-6)

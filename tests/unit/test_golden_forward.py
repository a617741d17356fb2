"""The public pr414 script's own losses, from its own weights, through our one forward."""

import numpy as np
import pytest
import torch

from tests import golden_pr414 as golden
from trainer.model.build import build, load_state


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

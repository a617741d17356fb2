"""The public pr414 script's own losses, from its own weights, through our one forward."""

import numpy as np
import pytest
import torch

from tests import golden_pr414 as golden
from tests import tiny
from tests.models import off_its_start
from trainer.data.bytecount import ByteTable
from trainer.evaluate.sliding import score_stream
from trainer.model.build import build, load_state
from trainer.model.loss import token_loss
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


@pytest.fixture(scope="module")
def rich():
    """Every optional part, awake; its NTK rule binds beyond 6 tokens."""
    return off_its_start(build(tiny.rich_model(), seed=0)).eval()


@torch.no_grad()
def check_ends(model, tokens, ends):
    """Losses of the last positions, from what reaches them, are those of the whole forward."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole = token_loss(model.logits(model.hidden(inputs)), targets)
    for scored in ends:
        end = model(inputs, targets[:, -scored:])
        assert end.shape == (len(tokens), scored)
        torch.testing.assert_close(end, whole[:, -scored:], rtol=1e-5, atol=1e-5)


def test_what_cannot_reach_a_scored_position_changes_no_loss(model):
    tokens = torch.from_numpy(np.load(golden.FOLDER / "tokens.npy").astype(np.int64))[None]

    check_ends(model, tokens[:, :2049], (1, 64, 1000))


def test_nor_does_it_in_a_model_of_every_part(rich):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(64, size=(3, 13)))

    check_ends(rich, tokens, (1, 5, 12))


def test_the_last_layer_computes_for_the_scored_positions_alone(rich):
    widths: dict[str, set[int]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: widths.setdefault(name, set()).add(args[0].shape[1])
        )
        for name, module in rich.named_modules()
        if name.startswith("blocks.") and name.endswith((".query", ".value", ".out", ".mlp"))
    ]
    tokens = torch.from_numpy(np.random.default_rng(0).integers(64, size=(2, 13)))

    rich(tokens[:, :-1], tokens[:, -3:])

    for hook in hooks:
        hook.remove()
    last = {f"blocks.3.{part}" for part in ("attention.query", "attention.out", "mlp")}
    assert {name for name, seen in widths.items() if seen == {3}} == last
    assert all(seen == {12} for name, seen in widths.items() if name not in last)


@pytest.mark.parametrize("scored", [1, 7])
def test_the_beginning_of_a_window_turns_as_in_the_whole_one(rich, scored):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(64, size=(2, 21)))

    with torch.no_grad():
        whole = rich(tokens[:, :-1], tokens[:, 1:])[:, 8 - scored : 8]
        short = rich(tokens[:, :8], tokens[:, 9 - scored : 9], 20)
        untold = rich(tokens[:, :8], tokens[:, 9 - scored : 9])

    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
    assert (untold - whole).abs().max() > 1e-3


def test_gradients_of_scored_losses_are_those_of_the_whole_forward(rich):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(64, size=(2, 13)))
    inputs, targets = tokens[:, :-1], tokens[:, -3:]
    parameters = [p for name, p in rich.named_parameters() if not name.startswith("mtp")]

    end = torch.autograd.grad(rich(inputs, targets).sum(), parameters)

    hidden = rich.hidden(inputs)[:, -3:]
    whole = torch.autograd.grad(token_loss(rich.logits(hidden), targets).sum(), parameters)
    for ours, plain in zip(end, whole, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_forward_that_scores_an_end_is_one_graph():
    bare = build(tiny.bare_model(), seed=0).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(64, size=(2, 13)))

    compiled = torch.compile(bare, fullgraph=True, backend="eager")

    torch.testing.assert_close(
        compiled(tokens[:, :-1], tokens[:, -3:], 16), bare(tokens[:, :-1], tokens[:, -3:], 16)
    )

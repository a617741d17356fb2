from copy import deepcopy

import numpy as np
import pytest
import torch

from tests import tiny
from tests.models import off_its_start
from tests.mortal import Kill, Killed
from trainer.evaluate.audit import score_before_update
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.journal import Journal
from trainer.evaluate.tape import Tape
from trainer.evaluate.ttt.oracle import _adamw
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.ttt import OracleTtt, SgdTtt

ALONE = Ranks()
KINDS = ("adamw", "sgd")


@pytest.fixture(scope="module")
def model():
    return off_its_start(build(tiny.rich_model(mtp=None), seed=0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(64, size=121).astype(np.uint16)


def scored(model, tokens, ttt=None, **tape):
    found, own = Tape(tokens, **tape), deepcopy(model)
    evaluate(own, found, EvaluateSpec(window=16, stride=8, ttt=ttt), ALONE)
    return found, own


def ttt_of(kind="adamw", **changes):
    return OracleTtt(optimizer=kind, **({"epochs": 3, "batch_sequences": 2, "lr": 0.01} | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_zero_gives_the_plain_score(model, tokens, kind):
    found, _ = scored(model, tokens, ttt_of(kind, lr=0.0))

    assert (found.losses == scored(model, tokens)[0].losses).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_knows_a_text_without_any_pattern_before_it_is_scored(model, tokens, kind):
    ttt = ttt_of(kind, epochs=20, lr=0.01 if kind == "adamw" else 0.1)

    learned = scored(model, tokens, ttt)[0].losses

    base = scored(model, tokens)[0].losses
    assert learned.mean() < base.mean() - 1.0
    assert learned[:16].mean() < base[:16].mean() - 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_audit_fails_it_whatever_it_learns(model, tokens, kind):
    tape, _ = scored(model, tokens, ttt_of(kind, lr=0.0, epochs=1))

    assert score_before_update(tape).verdict == "fail"
    kinds = [event.kind for event in tape.events]
    assert kinds[0] == "peek"
    assert kinds[1:5] == ["update"] * 4
    assert set(kinds[5:]) == {"score"}
    lawful = SgdTtt(chunk_tokens=32, lr=0.0)
    assert score_before_update(scored(model, tokens, lawful)[0]).verdict == "pass"


def test_the_matrices_of_the_mlps_have_rates_of_their_own(model):
    optimizer = _adamw(model, ttt_of(mlp_down_lr=3.0, mlp_up_lr=0.5))

    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        factor = 3.0 if "mlp.down" in name else 0.5 if ".mlp." in name else 1.0
        assert rates[id(parameter)] == pytest.approx(0.01 * factor), name
    assert len(rates) == len(list(model.parameters()))
    assert all(group["weight_decay"] == 0.0 for group in optimizer.param_groups)


def test_the_first_step_of_adamw_moves_by_the_rates(model, tokens):
    one_step = ttt_of(epochs=1, batch_sequences=100, clip_norm=1e9, mlp_down_lr=4.0, mlp_up_lr=0.25)

    _, own = scored(model, tokens, one_step)

    after = dict(own.named_parameters())
    for name, factor in (
        ("mlp.down.weight", 4.0),
        ("mlp.up.weight", 0.25),
        ("attention.out.weight", 1),
    ):
        before = model.get_parameter(f"blocks.1.{name}")
        moved = (after[f"blocks.1.{name}"] - before).abs()
        assert moved.median().item() == pytest.approx(0.01 * factor, rel=0.01)


def test_every_token_is_trained_on_in_each_epoch(model, tokens):
    tape, own = Tape(tokens), deepcopy(model)
    seen = []
    own.register_forward_hook(
        lambda module, args, losses: seen.append(args[1].clone()) if losses.requires_grad else None
    )

    evaluate(own, tape, EvaluateSpec(window=16, stride=8, ttt=ttt_of("sgd", epochs=2)), ALONE)

    assert len(seen) == 2 * 4
    shown = torch.cat([targets.flatten() for targets in seen]).tolist()
    filled = 2 * (8 * 16 - 120)
    counts = np.bincount(shown, minlength=64) - 2 * np.bincount(tokens[1:], minlength=64)
    assert counts[0] == filled
    assert not counts[1:].any()


def test_sgd_goes_through_another_order_with_another_seed(model, tokens):
    one, other, again = (
        scored(model, tokens, ttt_of("sgd", seed=seed))[0].losses for seed in (0, 1, 0)
    )

    assert (one == again).all()
    assert (one != other).any()


def test_a_killed_oracle_scores_on_and_is_found_out_all_the_same(model, tokens, tmp_path):
    with pytest.raises(Killed):
        scored(
            model, tokens, ttt_of(), progress=Kill(1), journal=Journal(tmp_path, "me", every_s=0)
        )

    tape, _ = scored(model, tokens, ttt_of(), journal=Journal(tmp_path, "me"))

    assert (tape.losses == scored(model, tokens, ttt_of())[0].losses).all()
    assert score_before_update(tape).verdict == "fail"

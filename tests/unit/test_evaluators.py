from copy import deepcopy

import numpy as np
import pytest
import torch

from tests import tiny
from tests.models import off_its_start
from trainer.errors import TrainingError
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.sliding import slide
from trainer.evaluate.tape import Tape
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import Documents, EvaluateSpec
from trainer.specs.ttt import LoraTtt, OracleTtt, Phases, SgdTtt

ALONE = Ranks()
LORA = LoraTtt(rank=2, lr=0.01, batch_documents=3)
DOCUMENTS = Documents(bos=1)
SPECS = {
    "sliding": EvaluateSpec(window=16, stride=8),
    "blocks": EvaluateSpec(window=16, stride=16),
    "variant A": EvaluateSpec(window=16, stride=8, variant="A"),
    "documents": EvaluateSpec(window=16, stride=8, documents=DOCUMENTS),
    "lora": EvaluateSpec(window=16, stride=8, documents=DOCUMENTS, ttt=LORA),
    "phased": EvaluateSpec(
        window=16,
        stride=8,
        documents=DOCUMENTS,
        ttt=LoraTtt(rank=2, batch_documents=1, phases=Phases(documents=4, count=2)),
    ),
    "sgd": EvaluateSpec(window=16, stride=8, ttt=SgdTtt(chunk_tokens=32)),
    "oracle": EvaluateSpec(window=16, stride=8, ttt=OracleTtt(epochs=1)),
}


@pytest.fixture(scope="module")
def model():
    return off_its_start(build(tiny.full_model(), seed=0))


def text_of(num_tokens):
    tokens = np.random.default_rng(2).integers(2, 64, size=num_tokens)
    tokens[::19] = 1
    return tokens.astype(np.uint16)


@pytest.mark.parametrize("num_tokens", [2, 3, 17, 18, 100])
@pytest.mark.parametrize("name", SPECS)
def test_every_prediction_is_scored(model, name, num_tokens):
    spec = SPECS[name]
    tape = Tape(text_of(num_tokens), again=spec.variant == "A")

    evaluate(deepcopy(model), tape, spec, ALONE)

    assert (tape.times >= 1).all()
    assert (tape.times == 1).all() or spec.variant == "A"
    assert (tape.losses > 0).all()


@pytest.mark.parametrize("name", ["sliding", "blocks", "variant A", "documents"])
def test_without_adaptation_it_is_the_plain_score_and_moves_nothing(model, name):
    spec, own = SPECS[name], deepcopy(model)
    tapes = [Tape(text_of(100), again=spec.variant == "A") for _ in range(2)]

    evaluate(own, tapes[0], spec, ALONE)
    slide(model, tapes[1], spec, ALONE)

    assert (tapes[0].losses == tapes[1].losses).all()
    assert {event.kind for event in tapes[0].events} == {"score"}
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["lora", "phased", "sgd", "oracle"])
@pytest.mark.parametrize("is_training", [True, False])
def test_an_adaptation_leaves_the_mode_the_flags_and_the_parameters_names(model, name, is_training):
    own = deepcopy(model).train(is_training)

    evaluate(own, Tape(text_of(100)), SPECS[name], ALONE)

    assert own.training == is_training
    assert all(p.requires_grad and p.grad is None for p in own.parameters())
    assert list(own.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(("name", "advice"), [("sliding", "weights"), ("lora", "ttt.lr")])
def test_losses_that_are_no_numbers_stop_the_evaluation(model, name, advice):
    broken = deepcopy(model)
    with torch.no_grad():
        broken.blocks[0].mlp.up.weight[0, 0] = torch.nan

    with pytest.raises(TrainingError, match=rf"losses of 99 predictions, from 0 on, .*{advice}$"):
        evaluate(broken, Tape(text_of(100)), SPECS[name], ALONE)


def test_multi_token_heads_are_left_out_of_what_is_trained(model):
    spec = tiny.rich_model(smear=None)
    with_heads, tape = build(spec, seed=0), Tape(text_of(100))
    before = deepcopy(with_heads.mtp.state_dict())

    evaluate(with_heads, tape, SPECS["sgd"], ALONE)

    for name, tensor in with_heads.mtp.state_dict().items():
        assert torch.equal(tensor, before[name])

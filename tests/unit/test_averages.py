import pytest
import torch
from torch import nn

from trainer.optim.averages import AverageBank
from trainer.specs.train import Averages, Late, Swa

DECAYS = (0.5, 0.9, 0.997)


def walk(spec, num_steps=8, dtype=torch.float32, scales=None):
    """Move a small model at random, folding every step in; return the bank and all weights."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    bank, visited = None, []
    for step in range(num_steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        visited.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
        if bank is None:
            bank = AverageBank(model, spec)
        else:
            scale = 1.0 if scales is None else scales[step - 1]
            bank.update(step, scale, (step - 1) / num_steps)
    return bank, visited


@pytest.mark.parametrize("decay", DECAYS)
def test_a_shadow_is_the_plain_recursion_from_the_initial_weights(decay):
    bank, visited = walk(Averages(ema_bank=DECAYS))

    for name, found in bank.entries()[f"ema-{decay!r}"].items():
        expected = visited[0][name]
        for weights in visited[1:]:
            expected = decay * expected + (1 - decay) * weights[name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_shadow_that_moves_every_tenth_step_moves_by_the_tenth_power():
    bank, visited = walk(Averages(ema_decay=0.997, ema_every=10), num_steps=25)

    for name, found in bank.entries()["ema-0.997"].items():
        expected = visited[0][name]
        for step in (10, 20):
            expected = 0.97040 * expected + (1 - 0.97040) * visited[step][name]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_all_decays_at_once_equal_each_alone_bit_for_bit():
    together, _ = walk(Averages(ema_bank=DECAYS))

    for decay in DECAYS:
        alone, _ = walk(Averages(ema_decay=decay))
        entry = f"ema-{decay!r}"
        for name, tensor in alone.entries()[entry].items():
            assert torch.equal(tensor, together.entries()[entry][name])


def test_shadows_of_bfloat16_weights_move_by_less_than_a_bfloat16_step():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    bank = AverageBank(model, Averages(ema_decay=0.999))

    with torch.no_grad():
        model.weight.fill_(1.5)
    bank.update(1, 1.0, 0.0)

    assert float(bank.entries()["ema-0.999"]["weight"]) == pytest.approx(1.0005, abs=1e-6)


def test_swa_is_the_mean_of_the_snapshots_once_the_rate_is_low():
    scales = [1.0, 1.0, 0.4, 0.39, 0.3, 0.2, 0.1, 0.05]
    bank, visited = walk(Averages(swa=Swa(start=Late(lr_scale=0.4), every=2)), scales=scales)

    for name, found in bank.entries()["swa"].items():
        expected = sum(visited[step][name] for step in (4, 6, 8)) / 3
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_swa_can_begin_by_the_share_of_the_run_that_is_done():
    bank, visited = walk(Averages(swa=Swa(start=Late(progress=0.5), every=1)))

    for name, found in bank.entries()["swa"].items():
        expected = sum(visited[step][name] for step in (5, 6, 7, 8)) / 4
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_swa_without_a_snapshot_is_no_entry():
    bank, _ = walk(Averages(ema_decay=0.9, swa=Swa(start=Late(lr_scale=0.4), every=2)))

    assert list(bank.entries()) == ["raw", "ema-0.9"]


def test_the_raw_entry_is_the_last_weights_in_float32():
    bank, visited = walk(Averages(), dtype=torch.bfloat16)

    raw = bank.entries()["raw"]

    assert {tensor.dtype for tensor in raw.values()} == {torch.float32}
    assert all(torch.equal(raw[name].double(), visited[-1][name]) for name in raw)


def test_a_restored_bank_goes_on_to_the_same_bits():
    spec = Averages(ema_bank=DECAYS, swa=Swa(start=Late(progress=0.0), every=1))
    model = nn.Linear(5, 3)
    straight = AverageBank(model, spec)
    straight.update(1, 1.0, 0.0)
    resumed = AverageBank(nn.Linear(5, 3), spec)

    resumed.load_state_dict(straight.state_dict())
    resumed.sources = straight.sources
    for bank in (straight, resumed):
        bank.update(2, 1.0, 0.5)

    for entry, tensors in straight.entries().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed.entries()[entry][name])


def test_snapshots_that_are_undone_count_no_more():
    spec = Averages(swa=Swa(start=Late(progress=0.0), every=1))
    bank = AverageBank(nn.Linear(5, 3), spec)
    before = bank.state_dict()
    bank.update(1, 1.0, 0.0)

    bank.load_state_dict(before)
    bank.update(2, 1.0, 0.0)

    # Of one snapshot, the mean is itself.
    for name, tensor in bank.entries()["swa"].items():
        assert torch.equal(tensor, bank.entries()["raw"][name])

"""Which attention a spec gets on a device, and what is said where it gets none."""

import sys
from dataclasses import replace

import pytest
import torch

from tests.tiny import full_model
from trainer.errors import UsageError
from trainer.kernels.attention import at_hand, attend, attention_of
from trainer.kernels.chosen import PLAIN, kernels_of
from trainer.model.build import build
from trainer.specs.kernels import AttentionKernel
from trainer.specs.model import Mtp, ReluPower, SwiGlu
from trainer.specs.train import Schedule, TrainSpec

CPU = torch.device("cpu")
TOKENS = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(3))


def test_without_a_spec_torch_chooses():
    assert at_hand(None, CPU, "bfloat16", "train.attention") == "torch"
    assert kernels_of(None, CPU, "bfloat16", "train.attention") == PLAIN
    assert attention_of("torch") is attend


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash_attn_4", "flash_attn_3", "flash_attn_2"])
def test_a_kernel_for_gpus_is_refused_on_a_cpu_by_its_field(name):
    with pytest.raises(UsageError, match=f"train.attention.name={name}: .*CUDA"):
        at_hand(AttentionKernel(name=name), CPU, "bfloat16", "train.attention")


def test_a_kernel_for_half_precision_leaves_a_float32_model_to_its_substitute(hopper):
    kernel = AttentionKernel(name="cudnn", substitute="torch")
    device = torch.device("cuda")

    assert at_hand(kernel, device, "bfloat16", "evaluate.attention") == "cudnn"
    assert at_hand(kernel, device, "float32", "evaluate.attention") == "torch"
    with pytest.raises(UsageError, match=r"^evaluate.attention.name=cudnn: it needs bfloat16, thi"):
        at_hand(replace(kernel, substitute=None), device, "float32", "evaluate.attention")


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A device that all packages run on, and a place that packages may be put."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_one_flash_attention_is_not_taken_for_another_whose_folder_it_has(hopper):
    broken = hopper / "flash_attn" / "cute"
    broken.mkdir(parents=True)
    (broken.parent / "__init__.py").write_text("raise ImportError('undefined symbol')")
    (broken / "__init__.py").touch()
    kernel = AttentionKernel(name="flash_attn_4", substitute="cudnn")

    assert at_hand(kernel, torch.device("cuda"), "bfloat16", "train.attention") == "cudnn"
    with pytest.raises(UsageError, match=r'flash-attn-4 is not installed; pip install -e "\.\[fa4'):
        at_hand(
            replace(kernel, substitute=None), torch.device("cuda"), "bfloat16", "train.attention"
        )


def test_a_package_that_cannot_be_imported_is_named_with_its_fault(hopper):
    (hopper / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: x')")
    kernel = AttentionKernel(name="flash_attn_3")

    with pytest.raises(UsageError, match=r"^train.attention: flash_attn_3 .*undefined symbol: x"):
        kernels_of(kernel, torch.device("cuda"), "bfloat16", "train.attention")


def test_own_kernels_need_triton_on_a_gpu_alone(hopper, monkeypatch):
    monkeypatch.setattr("trainer.kernels.chosen.find_spec", lambda name: None)

    assert kernels_of(None, CPU, "bfloat16", "train.attention", fused=True).fused
    assert kernels_of(None, CPU, "bfloat16", "evaluate.attention", scores=True).scores
    cuda = torch.device("cuda")
    with pytest.raises(UsageError, match=r"^train.fused: triton is not installed"):
        kernels_of(None, cuda, "bfloat16", "train.attention", fused=True)
    with pytest.raises(UsageError, match=r"^evaluate.fused: .* or set evaluate.fused=false"):
        kernels_of(None, cuda, "bfloat16", "evaluate.attention", scores=True)


def test_the_mlp_has_a_kernel_on_hopper_in_bfloat16_and_its_twin_on_a_cpu(hopper, monkeypatch):
    monkeypatch.setattr("trainer.kernels.chosen.find_spec", lambda name: True)

    def has(device, dtype="bfloat16"):
        return kernels_of(None, torch.device(device), dtype, "train.attention", fused=True).mlp

    assert (has("cpu"), has("cpu", "float32"), has("cuda")) == (True, True, True)
    assert not has("cuda", "float32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not has("cuda")


def test_a_loss_over_more_tokens_than_its_kernel_holds_is_the_plain_one(monkeypatch):
    def refuse(*given):
        raise AssertionError("the twin of the kernel is slower than the plain loss")

    monkeypatch.setattr("trainer.model.gpt.capped_loss", refuse)
    monkeypatch.setattr("trainer.model.gpt.WIDEST", full_model().vocab_size - 1)

    fused, _ = trained_once(full_model(), fused=True)

    torch.testing.assert_close(fused, trained_once(full_model(), fused=False)[0])


def test_torch_which_runs_everywhere_takes_no_substitute():
    with pytest.raises(ValueError, match="leave out substitute=cudnn"):
        AttentionKernel(substitute="cudnn")


def test_a_named_substitute_stands_in_for_what_is_missing():
    kernel = AttentionKernel(name="flash_attn_4", substitute="torch")

    assert at_hand(kernel, CPU, "bfloat16", "train.attention") == "torch"


def test_a_substitute_that_cannot_run_either_is_refused_with_both_reasons():
    kernel = AttentionKernel(name="flash_attn_4", substitute="cudnn")

    with pytest.raises(UsageError, match=r"name=flash_attn_4: .*substitute=cudnn: .*CUDA"):
        at_hand(kernel, CPU, "bfloat16", "evaluate.attention")


def test_a_substitute_is_another_one():
    with pytest.raises(ValueError, match="leave it out"):
        AttentionKernel(name="cudnn", substitute="cudnn")


def test_kernels_for_half_precision_are_refused_for_a_float32_training():
    lengths = {"iterations": 1, "batch_tokens": 8, "seq_len": 8}
    lengths["schedule"] = Schedule(warmdown_iters=0)

    with pytest.raises(ValueError, match=r"attention.name=cudnn needs dtype=bfloat16"):
        TrainSpec(**lengths, attention=AttentionKernel(name="cudnn"))
    TrainSpec(**lengths, attention=AttentionKernel(name="cudnn"), dtype="bfloat16")


def trained_once(spec, *, fused, dtype="float32"):
    """The losses of one batch and every gradient."""
    model = build(spec, seed=5, dtype=dtype, kernels=replace(PLAIN, fused=fused, mlp=fused))
    for parameter in model.parameters():  # what starts at zero would hide what reaches it
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        ).to(parameter.dtype)
    losses = model(TOKENS[:, :-1], TOKENS[:, 1:])
    losses.mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), grads


MODELS = {
    "full": full_model(),
    "bare": replace(full_model(), residual_scale=None, x0_mix=None, softcap=None, ln_scale=None),
    "cubic": replace(full_model(), mlp=replace(full_model().mlp, activation=ReluPower())),
    "gated": replace(full_model(), mlp=replace(full_model().mlp, activation=SwiGlu())),
    "several tokens": replace(full_model(), mtp=Mtp()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_has_the_plain_ones_losses_and_gradients(name):
    plain, plain_grads = trained_once(MODELS[name], fused=False)
    fused, fused_grads = trained_once(MODELS[name], fused=True)

    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert fused_grads.keys() == plain_grads.keys()
    for path, grad in plain_grads.items():
        torch.testing.assert_close(fused_grads[path], grad, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_a_score_by_own_kernels_is_the_plain_one(name, monkeypatch):
    taken = []

    def spied(path):
        module, _, function = path.rpartition(".")
        kernel = getattr(sys.modules[module], function)
        spy = lambda *given: (taken.append(function), kernel(*given))[1]  # noqa: E731
        monkeypatch.setattr(path, spy)

    spied("trainer.model.attention.turn_heads")
    spied("trainer.model.mlp.relu2_mlp")
    own = replace(PLAIN, scores=True, mlp=True)
    plain, model = (build(MODELS[name], seed=5, kernels=each).eval() for each in (PLAIN, own))

    found = model(TOKENS[:, :-1], TOKENS[:, 1:])

    torch.testing.assert_close(found, plain(TOKENS[:, :-1], TOKENS[:, 1:]), rtol=1e-5, atol=1e-5)
    num_layers, has_mlp = len(model.blocks), name not in ("cubic", "gated")
    assert taken.count("turn_heads") == 2 * num_layers
    assert taken.count("relu2_mlp") == has_mlp * num_layers
    taken.clear()
    model.train()(TOKENS[:, :-1], TOKENS[:, 1:])
    assert not taken


def test_a_fused_model_scores_as_the_plain_one_to_the_last_bit():
    kernels = [replace(PLAIN, fused=on, mlp=on) for on in (False, True)]
    models = [build(full_model(), seed=5, kernels=each) for each in kernels]

    plain, fused = (model.eval()(TOKENS[:, :-1], TOKENS[:, 1:]) for model in models)

    assert torch.equal(plain, fused)

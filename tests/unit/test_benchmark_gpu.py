"""What the GPU benchmarks conclude from what they measured: classes of kernels, counts, noise."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trainer.codec import parse
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module("gpu_parts", monkeypatch)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module("kernel_noise", monkeypatch)


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a benchmark as its own command finds it: by the folder that it lies in."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for other in ("gpu", "gpu_parts", "kernel_noise"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    return __import__(name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        (
            "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90",
            "attention",
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matmul"),
        ("triton_tem_fused_mm_3", "matmul"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_backward_7", "other"),
        ("triton_per_fused_mm_rms_norm_12", "other"),
        ("_mix_norm_forward", "own"),
        ("_mix_norm_forward_2", "own"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_a_kernel_is_classed_by_what_it_is_and_not_by_what_was_fused_into_it(
    parts: ModuleType, name: str, kind: str
) -> None:
    assert parts.class_of(name, {"_mix_norm_forward"}) == kind


def test_a_trace_is_summed_over_what_the_device_did_and_nothing_else(parts: ModuleType) -> None:
    events = [
        {"cat": "kernel", "name": "nvjet_a", "dur": 1000.0},
        {"cat": "kernel", "name": "nvjet_a", "dur": 500.0},
        {"cat": "gpu_memset", "name": "Memset (Device)", "dur": 250.0},
        {"cat": "gpu_user_annotation", "name": "Torch-Compiled Region", "dur": 9999.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9999.0},
        {"ph": "M", "name": "process_name"},
    ]

    found = parts.by_class(events, set())

    assert found["matmul"] == 1.5
    assert found["memory"] == 0.25
    assert sum(found[kind] for kind in parts.CLASSES) == 1.75
    assert found["launches"] == 3
    assert found["longest"] == {"matmul: nvjet_a": 1.5, "memory: Memset (Device)": 0.25}


def test_a_step_of_pr414_is_180_tflop_and_every_position_of_a_million_2_6_pflop(
    parts: ModuleType,
) -> None:
    """By hand: 26.6 M matrix weights, 786,432 tokens of 2,048; windows of 2,048 by 64."""
    work = parts.work_of(parse(Recipe, load_recipe("pr414", "test"), "pr414"))

    assert work["step_flop"] == pytest.approx(180e12, rel=0.01)
    assert work["evaluation_flop_a_prediction"] * (1 << 20) == pytest.approx(2.55e15, rel=0.01)


def rows(*figures: tuple[float, float]) -> dict[tuple[str, int, str], dict[str, float]]:
    """Pairs (plain, fast) of as many seeds."""
    return {
        ("sequential", seed, column): {"val_bpb": value}
        for seed, pair in enumerate(figures)
        for column, value in zip(("plain", "fast"), pair, strict=True)
    }


def test_a_difference_below_the_deviation_of_seeds_is_noise(noise: ModuleType) -> None:
    verdict = noise.compare(rows((1.50, 1.501), (1.51, 1.508), (1.49, 1.492)), "val_bpb")

    assert verdict["pairs"] == 3
    assert verdict["mean"] == pytest.approx(0.001 / 3)
    assert verdict["seed_deviation"] == pytest.approx(0.01)
    assert verdict["within_noise"]
    low, high = verdict["interval"]  # of gaps that deviate by 0.00208, two degrees
    assert (low + high) / 2 == pytest.approx(verdict["mean"])
    assert high - low == pytest.approx(2 * 4.303 * 0.00208167 / 3**0.5, rel=1e-4)


def test_a_difference_above_the_deviation_of_seeds_is_no_noise(noise: ModuleType) -> None:
    verdict = noise.compare(rows((1.50, 1.53), (1.51, 1.54), (1.49, 1.52)), "val_bpb")

    assert not verdict["within_noise"]


def test_seeds_of_different_orders_are_not_held_against_each_other(noise: ModuleType) -> None:
    """Two orders that lie far apart say nothing of how far seeds do."""
    near = rows((1.50, 1.50), (1.51, 1.51))
    far: dict[Any, Any] = {("shuffled", s, c): {"val_bpb": 2.0 + 0.01 * s} for _, s, c in near}

    verdict = noise.compare(near | far, "val_bpb")

    assert verdict["pairs"] == 4
    assert verdict["seed_deviation"] == pytest.approx(0.01 / 2**0.5)


def test_one_pair_alone_gets_no_verdict(noise: ModuleType) -> None:
    assert "within_noise" not in noise.compare(rows((1.5, 1.6)), "val_bpb")
    assert noise.compare({}, "val_bpb") == {}

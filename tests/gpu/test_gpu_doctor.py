"""The preflight on a CUDA device: what the driver's tool says, and which kernel torch takes."""

from pathlib import Path

import pytest

from service.attention import Kernel, Question, ask
from service.machine import look
from trainer.kernels.attention import lacking
from trainer.specs.kernels import AttentionKernel

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PR414 = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "seq_len": 2048}


def test_the_visible_gpus_are_those_that_torch_sees() -> None:
    here = look(Path())

    assert [gpu.name for gpu in here.gpus] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    assert all(gpu.memory_mib > 1000 and gpu.driver for gpu in here.gpus)


def test_flash_runs_in_bfloat16_and_not_in_float32() -> None:
    half = ask(Question("cuda", "bfloat16", **PR414))
    full = ask(Question("cuda", "float32", **PR414))

    assert half.backend in ("flash", "cudnn"), half
    assert half.why == ""
    assert full.backend not in ("flash", "cudnn", None), full
    assert "dtype" in full.why.lower(), full.why


def test_an_attention_that_keeps_documents_apart_is_run_as_it_trains() -> None:
    told = ask(Question("cuda", "bfloat16", **PR414, keeps_documents=True))

    assert told.backend not in ("flash", None), told
    assert "mask" in told.why.lower(), told.why


def test_a_package_keeps_documents_apart_or_is_refused() -> None:
    why = lacking("flash_attn_4", torch.device("cuda"), "bfloat16")
    if why is not None:
        pytest.skip(why)
    kernel = Kernel("train.attention", AttentionKernel(name="flash_attn_4"))

    told = ask(Question("cuda", "bfloat16", **PR414, kernel=kernel, keeps_documents=True))

    assert told.backend == "flash_attn_4", told

"""What a worker computes with, as torch in its own process tells it."""

from dataclasses import replace

import torch
from torch.cuda import nccl

from service.facts import (
    Gpu,
    WorkerFacts,
    nvidia_driver,
    process_facts,
    version_of,
)
from trainer.kernels.attention import PACKAGES


def worker_facts(device: torch.device, attention: str | None = None) -> WorkerFacts:
    """Read what this process computes with on its device; `attention` is the kernel in use."""
    is_cuda = device.type == "cuda"
    facts = replace(
        process_facts(),
        device="cuda" if is_cuda else "cpu",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=_dotted(torch.backends.cudnn.version()) if is_cuda else None,
        nccl=".".join(map(str, nccl.version())) if is_cuda else None,
        driver=nvidia_driver() if is_cuda else None,
        gpus=(_gpu(device),) if is_cuda else (),
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        cudnn_deterministic=torch.backends.cudnn.deterministic,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        matmul_precision=torch.get_float32_matmul_precision(),
    )
    return with_attention(facts, attention)


def with_attention(facts: WorkerFacts, attention: str | None) -> WorkerFacts:
    """Add the kernel in use, and the version of the package that it comes from."""
    package = PACKAGES.get(attention or "")
    found = None if package is None else version_of(package.distribution)
    return replace(facts, attention=attention, flash_attn=found)


def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    return Gpu(name=properties.name, uuid=None if uuid is None else str(uuid))


def _dotted(number: int | None) -> str | None:
    """cuDNN's version as it is written: 91900 is 9.19.0."""
    if number is None:
        return None
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"

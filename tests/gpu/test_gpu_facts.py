"""The facts of a worker on a CUDA device."""

import pytest

from service.machine import look

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_worker_names_its_gpu_as_the_driver_does(tmp_path) -> None:
    from service.worker_facts import worker_facts

    facts = worker_facts(torch.device("cuda", 0))

    driver = look(tmp_path).gpus[0]
    (gpu,) = facts.gpus
    assert (gpu.name, facts.driver) == (driver.name, driver.driver)
    assert gpu.uuid is not None
    assert driver.uuid.endswith(gpu.uuid.removeprefix("GPU-"))
    assert facts.device == "cuda"
    assert facts.nccl is not None
    assert (facts.cudnn or "").startswith("9.")

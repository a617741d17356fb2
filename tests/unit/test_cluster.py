"""What a gang lacks just now, in the words that a waiting sweep shows."""

from pathlib import Path

import pytest

from service.cluster import shortage, worker_environment
from service.specs import Resources

EIGHT = Resources(workers=8, gpus_per_worker=1)
FOUR = Resources(workers=4)


def nodes(*amounts: tuple[float, float]) -> list[dict[str, float]]:
    return [{"CPU": cpus, "GPU": gpus} for cpus, gpus in amounts]


@pytest.mark.parametrize(
    ("resources", "free", "lack"),
    [
        (EIGHT, nodes((32, 8)), None),
        (EIGHT, nodes((32, 7)), "need 8 GPUs, free 7"),
        (EIGHT, nodes((32, 7), (32, 3)), "need 8 GPUs on one node, free 7"),
        (EIGHT, nodes((7, 8)), "need 8 CPUs, free 7"),
        (
            EIGHT,
            nodes((32, 0), (0, 8)),
            "need 8 CPUs + 8 GPUs on one node, free for 0 of 8 workers",
        ),
        (FOUR, [], "need 4 CPUs, free 0"),
        (FOUR, nodes((2, 0), (2, 0)), "need 4 CPUs on one node, free 2"),
        (Resources(workers=4, placement="PACK"), nodes((2, 0), (2, 0)), None),
        (Resources(workers=4, placement="SPREAD"), nodes((2, 0), (1, 0)), "need 4 CPUs, free 3"),
        (
            Resources(workers=2, placement="STRICT_SPREAD"),
            nodes((9, 0)),
            "need 2 nodes with 1 CPU each, free 1",
        ),
        (Resources(workers=1, cpus_per_worker=2), nodes((1.5, 0)), "need 2 CPUs, free 1.5"),
    ],
)
def test_what_is_short_is_named_with_what_is_free(resources, free, lack):
    assert shortage(resources, free) == lack


def test_workers_keep_what_they_compile_in_the_home_unless_told_elsewhere(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    def place():
        told = worker_environment(FOUR, Path("home/compiled"), is_ours=True)
        return told["TORCHINDUCTOR_CACHE_DIR"]

    assert place() == str(Path("home/compiled").absolute())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert place() == "/elsewhere"

"""What all tests on a CUDA device share."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let packages of other releases than the pinned ones warn."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))

"""Every test starts from the same random state; `plain` ones stay out of the session that checks types.

`pytest --jaxtyping-packages=torchfilm,beartype.beartype tests/test_*.py` executes the shapes in the library's
signatures. A type checker answers before our own errors can, and cannot be compiled: hence the marker.
"""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "plain: messages, compile and export; left out where types are checked"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("jaxtyping_packages", default=None):
        for item in items:
            if item.get_closest_marker("plain"):
                item.add_marker(pytest.mark.skip(reason="types are checked in this session"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

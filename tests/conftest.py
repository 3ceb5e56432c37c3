"""Every test starts from the same random state; `plain` ones stay out of the session that checks types.

`make shapes` executes the shapes in the library's signatures. A type checker answers before our own errors
can, and cannot be compiled: hence the marker.
"""

import os
from pathlib import Path

import pytest
import torch

from kernels import Counted
from torchfilm import native, onepass


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


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are built once for all processes of this run, each of which has a folder in this one."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"


@pytest.fixture
def calls(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that take also few channels; what they took, and what torch did for them on the way back."""
    monkeypatch.setattr(onepass, "_CHANNELS_FROM", 1)
    native.enable(kernel_folder)
    counted = Counted(native.kernels)
    native.disable()
    monkeypatch.setattr(native, "kernels", counted)
    for name in ("film_gradients", "norm_gradients"):
        monkeypatch.setattr(onepass, name, counted.counting(getattr(onepass, name)))
    return counted.taken

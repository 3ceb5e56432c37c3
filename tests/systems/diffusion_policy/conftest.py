"""Demonstrations that several tests learn from."""

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with four demonstrations."""
    from torchfilm.data.table.demonstrations import generate_demonstrations

    out = tmp_path_factory.mktemp("table") / "demonstrations"
    generate_demonstrations(out, 4, seed=3)
    return out

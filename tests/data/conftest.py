"""What several files of tests of data read: a tiny VAE."""

import pytest
from photos import save_tiny_vae


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))

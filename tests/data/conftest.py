"""What several files of tests of data read: a tiny VAE, and photos that it makes latents of."""

import pytest
from photos import save_noise, save_tiny_vae

from mclr.train.data.write import prepare_images


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A dataset of 24 images of 64 pixels, which are latents of 8; not to be written to."""
    path = tmp_path_factory.mktemp("photos")
    prepare_images(save_noise(path / "src", 24, 64), path / "data", resolution=64)
    return path / "data"

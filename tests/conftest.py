"""Every test runs with uninitialised memory poisoned: what `torch.empty` gives is NaN, so reading it before writing shows.

Triton kernels run in Triton's interpreter, which must be said before they are imported.

Also here: what the tests of training read, the digits and a tokenizer that has learned nothing.
"""

import os

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"

from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.train.data.write import prepare_digits
from mclr.train.weights.folder import save_weights

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What a user's cache holds (converted weights, statistics of references) is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits as a dataset folder; not to be written to."""
    path = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A weights folder: tokens of 8x8 gray images at scales 1, 2 and 4."""
    path = tmp_path_factory.mktemp("weights") / "tokenizer"
    torch.manual_seed(0)
    config = VQVAEConfig(img_channels=1, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, vocab_size=16, scales=(1, 2, 4))
    save_weights(path, VQVAE(config))
    return path

"""Every test runs with uninitialised memory poisoned: what `torch.empty` gives is NaN, so reading it before writing shows.

Triton kernels run in Triton's interpreter, which must be said before they are imported.

Also here: what the tests of training read, the digits and a tokenizer that has learned nothing.
"""

import os
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root

os.environ["TRITON_INTERPRET"] = "1"

from models.vqvae import VQVAE, VQVAEConfig
from train.prepare import prepare_digits
from train.weights import save_weights

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What a user's cache holds (converted weights, statistics of references) is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        folder, built = tmp_path_factory.mktemp("cache"), Path(get_default_build_root())
        built.mkdir(parents=True, exist_ok=True)
        # else every session would compile DeepSpeed's operator again
        (folder / "torch_extensions").symlink_to(built)
        patch.setenv("XDG_CACHE_HOME", str(folder))
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

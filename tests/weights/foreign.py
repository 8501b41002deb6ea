"""Files of other programs, as tests of weights need them, and the command that reads them."""

import io
import zipfile
from functools import partial

import torch
from golden_weights import load_golden, rule_weights

from mclr.train import convert
from mclr.train.system.console import run
from mclr.train.system.files import in_memory

# golden file -> kind, what has to be said beside the file, our names of the reference's arguments
GOLDEN = {
    "var_tiny.npz": ("var", [], {}),
    "var_tiny_shared_aln.npz": ("var", [], {}),
    "vqvae_tiny.npz": ("vqvae", [], {"v_patch_nums": "scales"}),
    "vqvae_10scales.npz": ("vqvae", [], {"v_patch_nums": "scales"}),
    "edm2_tiny.npz": ("edm2", ["channels_per_head=16"], {"label_dim": "num_classes"}),
}


def published(file):
    """(state dict as published, constants included; kind; settings; the config it was made with)."""
    kind, settings, renamed = GOLDEN[file]
    _, config, names = load_golden(file)
    constants = {name: torch.zeros(shape) for name, shape in names.items()}
    if kind == "var":
        scale_L = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 4, 9, 16]))
        constants["lvl_1L"] = scale_L[None]
        mask = torch.zeros(30, 30).masked_fill(scale_L[:, None] < scale_L[None], -torch.inf)
        constants["attn_bias_for_masking"] = mask[None, None]
    config = {renamed.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return constants | rule_weights(names), kind, settings, config


def convert_(*argv):
    return run(convert.main, [str(arg) for arg in argv])


def archive(members, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def saved(content, **how):
    """What torch.save writes."""
    return in_memory(partial(torch.save, content), **how)

"""The golden files: numbers of the published implementations at small sizes, and the rule that makes their weights.

The weights are not stored: they follow from the published parameter name and shape, so a test that uses them also checks the
translation of names in models/convert.py.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mclr.models.convert import Published, misfits

FOLDER = Path(__file__).parent / "golden"
NOT_BY_RULE = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")  # constants and counters


def load_golden(file: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[int]]]:
    """tests/golden/<file> -> (arrays, config, names): tensors (lists where text), the reference's arguments, name -> shape."""
    with np.load(FOLDER / file) as stored:
        entries = {key: stored[key] for key in stored.files}
    config, names = (json.loads(str(entries.pop(key))) for key in ("config", "names"))
    arrays = {key: value.tolist() if value.dtype.kind == "U" else torch.from_numpy(value) for key, value in entries.items()}
    return arrays, config, names


def rule_weights(names: dict[str, list[int]]) -> dict[str, Tensor]:
    """Published name -> shape becomes published name -> fp32 tensor; the first rule that fits counts."""
    return {name: _weight(name, shape) for name, shape in names.items() if not name.endswith(NOT_BY_RULE)}


def load_rule(net: nn.Module, names: dict[str, list[int]], published: Published) -> nn.Module:
    """The network with the weights of the rule, for inference."""
    ours, weights = published.entries(net), rule_weights(names)
    assert misfits(ours, weights) == ""
    for name, entry in ours.items():
        entry.copy_(weights[name])
    return net.eval()


def relative_rms(value: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected, in fp64; the shapes must be equal."""
    assert value.shape == expected.shape, f"{tuple(value.shape)} is not {tuple(expected.shape)}"
    value, expected = value.detach().double(), expected.double()
    return ((value - expected).square().mean() / expected.square().mean()).sqrt().item()


def _weight(name: str, shape: list[int]) -> Tensor:
    u = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(shape) * 2 - 1
    if name.endswith("freqs"):
        w = 2 * math.pi * math.sqrt(3) * u
    elif name.endswith("phases"):
        w = math.pi * (u + 1)
    elif len(shape) == 0:
        w = 0.5 + 0.1 * u
    elif len(shape) == 1 and "norm" in name and name.endswith("weight"):
        w = 1 + 0.1 * u
    elif len(shape) == 1:
        w = 0.1 * u
    elif name.endswith(("embedding.weight", "class_emb.weight", "lvl_embed.weight")):
        w = math.sqrt(3) * u
    elif name.endswith(("pos_start", "pos_1LC", "ada_gss")):
        w = 0.5 * u
    elif name.endswith("scale_mul_1H11"):
        w = math.log(4) + 0.1 * u
    else:
        w = u * math.sqrt(3 / math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(w, dtype=np.float32))
